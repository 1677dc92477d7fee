"""`grouped_lora`: against a loop over the adapters, what they must not see of each other, dropout, and its errors."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from petune.kernels.grouped_lora import RowGroups, grouped_lora, reference
from petune.kernels.lora_linear import lora_linear
from tests.conftest import TOLERANCE, relative_error
from tests.kernels.grouped import (
    IN,
    OUT,
    RANKS,
    ROWS,
    SCALES,
    Batch,
    batch,
    detached,
    gradients,
    grouped,
    in_double,
    loop,
    tokens_of,
)
from tests.kernels.operands import kept_tensors

OPS = torch.ops.petune
FP32 = torch.float32
ANY_RANKS = pytest.mark.parametrize("ranks", [RANKS, (4,) * 5], ids=["ranks differ", "one rank"])
"""Adapters of one rank with equally many rows are one batched product."""


# --- the formula ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_row", [1, 13])
@pytest.mark.parametrize("ids", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16, torch.float16], ids=str)
@ANY_RANKS
def test_output_and_gradients_match_a_loop_in_float64(ranks, dtype, ids, per_row):
    tensors = batch(7, per_row, dtype=dtype, ranks=ranks)
    exact = in_double(tensors)
    for out, peer, expected in zip(
        gradients(grouped(tensors, ids), tensors),
        gradients(loop(tensors, ids), tensors),
        gradients(loop(exact, ids), exact),
        strict=True,
    ):
        assert out.dtype == dtype
        assert relative_error(out, expected) <= max(2 * TOLERANCE[dtype], 1.1 * relative_error(peer, expected))


@pytest.mark.parametrize("lead", [(7,), (14,), (7, 5), (7, 2, 3), (0, 4), (7, 0)], ids=str)
def test_any_leading_axes_divide_into_rows(lead):
    tensors = batch(*lead)
    ids = ROWS["scattered"] if lead[0] else ()
    y = grouped(tensors, ids)
    assert y.shape == (*lead, OUT)
    for out, exact in zip(gradients(y, tensors), gradients(loop(tensors, ids), tensors), strict=True):
        assert relative_error(out, exact) <= 2 * TOLERANCE[FP32]


@pytest.mark.parametrize("dropout_p", [0.0, (0.3, 0.0, 0.5, 0.1, 0.0)], ids=str)
@pytest.mark.parametrize("trained", ["xab", "x", "a", "b", "xwc"])
def test_gradcheck_in_double(trained, dropout_p):
    tensors = in_double(batch(7, 2, in_features=4, out_features=3, ranks=(1, 2, 3, 1, 2)))
    x, weight, bias, a, b = tensors
    for name, group in zip("xwcab", ([x], [weight], [bias], a, b), strict=True):
        for t in group:
            t.requires_grad_(name in trained)

    def replayed(x, weight, bias, *factors):
        seeds = [7, 11, 13, 17, 19]
        return grouped(
            Batch(x, weight, bias, factors[:5], factors[5:]), (4, 0, 3, -1, 0, 2, 4), dropout_p=dropout_p, seeds=seeds
        )

    assert torch.autograd.gradcheck(replayed, (x, weight, bias, *a, *b))


def test_fp32_adapters_on_a_bf16_base_get_fp32_gradients_nearer_to_float64_than_bf16_adapters():
    tensors, ids = batch(7, 64, dtype=torch.bfloat16, adapter_dtype=FP32), ROWS["sorted"]
    x, weight, bias, a, b = tensors
    low = Batch(x, weight, bias, *([t.detach().bfloat16().requires_grad_() for t in half] for half in (a, b)))
    exact = in_double(tensors)
    sums = gradients(loop(exact, ids), exact)[2:]
    ours, theirs = gradients(grouped(tensors, ids), tensors)[2:], gradients(grouped(low, ids), low)[2:]
    assert {t.dtype for t in ours} == {FP32}
    error = [sum(relative_error(out, sum_) for out, sum_ in zip(side, sums, strict=True)) for side in (ours, theirs)]
    assert error[0] < 0.7 * error[1]


def test_adapters_of_different_dtypes_each_get_their_own():
    x, weight, bias, a, b = batch(7, 2)
    a[1], b[3] = (t.detach().bfloat16().requires_grad_() for t in (a[1], b[3]))
    found = gradients(grouped(Batch(x, weight, bias, a, b), ROWS["sorted"]), Batch(x, weight, bias, a, b))
    assert [t.dtype for t in found[2:]] == [t.dtype for t in (*a, *b)]


def test_a_trainable_base_gets_its_gradient_from_plain_torch():
    tensors = batch(7, 2)
    exact = in_double(tensors)
    for base in (tensors, exact):
        base.weight.requires_grad_(), base.bias.requires_grad_()
    ours = torch.autograd.grad(grouped(tensors, ROWS["scattered"]).square().sum(), tensors[1:3])
    plain = torch.autograd.grad(loop(exact, ROWS["scattered"]).square().sum(), exact[1:3])
    for out, expected in zip(ours, plain, strict=True):
        assert relative_error(out, expected) <= 2 * TOLERANCE[FP32]


def test_strides_are_read_in_place_and_a_bias_may_be_absent():
    x, weight, bias, a, b = batch(7, 2)
    expected = grouped(Batch(x, weight, bias * 0, a, b), ROWS["sorted"])
    strided = Batch(x.transpose(0, 1).contiguous().transpose(0, 1), weight.T.contiguous().T, None, a, b)
    assert relative_error(grouped(strided, ROWS["sorted"]), expected) <= TOLERANCE[FP32]


def test_in_place_operators_may_follow():
    tensors = batch(7, 2)
    y = grouped(tensors, ROWS["sorted"])
    y += 1
    y.relu_().sum().backward()
    exact = torch.autograd.grad((loop(tensors, ROWS["sorted"]) + 1).relu().sum(), tensors.a[3])[0]
    assert relative_error(tensors.a[3].grad, exact) <= 2 * TOLERANCE[FP32]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    ids=st.lists(st.integers(-1, 3), max_size=9),
    per_row=st.integers(0, 5),
    ranks=st.lists(st.integers(1, 3), min_size=4, max_size=4),
)
def test_any_batch_matches_the_loop(ids, per_row, ranks):
    tensors = in_double(batch(len(ids), per_row, ranks=tuple(ranks), in_features=5, out_features=4))
    scales = SCALES[:4]
    ours, theirs = (f(tensors, ids, scales=scales) for f in (grouped, loop))
    for out, exact in zip(gradients(ours, tensors), gradients(theirs, tensors), strict=True):
        assert relative_error(out, exact) <= TOLERANCE[torch.float64]


# --- nobody sees his neighbours ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("where", ["a", "b", "x", "dy"])
@pytest.mark.parametrize("ids", [ROWS["sorted"], ROWS["scattered"]], ids=["sorted", "scattered"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@ANY_RANKS
def test_a_non_finite_adapter_or_row_changes_no_bit_of_another(ranks, dropout_p, ids, where, value):
    tensors, dy = batch(7, 3, ranks=ranks), torch.randn(7, 3, OUT)

    def run() -> list[Tensor]:
        return gradients(grouped(tensors, ids, dropout_p=dropout_p, seeds=range(5)), tensors, dy)

    clean = run()
    own = torch.tensor([i == 4 for i in ids])
    poisoned = {"a": tensors.a[4], "b": tensors.b[4], "x": tensors.x, "dy": dy}[where].detach()
    poisoned[own if where in ("x", "dy") else 0] = value
    y, dx, *factors = run()
    assert torch.equal(y[~own], clean[0][~own])
    assert torch.equal(dx[~own], clean[1][~own])
    for i, (out, before) in enumerate(zip(factors, clean[2:], strict=True)):
        assert torch.equal(out, before) or i % 5 == 4, i
    hit = dx if where == "dy" else y
    assert not hit[own].isfinite().all()


# --- dropout -------------------------------------------------------------------------------------------------------


def drawn(seed: int) -> Tensor:
    """What `lora_linear` draws after torch.manual_seed."""
    torch.manual_seed(seed)
    return torch.randint(2**63 - 1, (1,))


@pytest.mark.parametrize("ids", [ROWS["beside each other"], ROWS["scattered"]], ids=["beside", "scattered"])
@ANY_RANKS
def test_each_adapter_gets_what_lora_linear_gives_its_rows_alone(ranks, ids):
    tensors, dy = batch(7, 13, ranks=ranks), torch.randn(7, 13, OUT)
    dropout_p = (0.3, 0.0, 0.5, 0.2, 0.1)
    ours = gradients(grouped(tensors, ids, dropout_p=dropout_p, seeds=[drawn(i) for i in range(5)]), tensors, dy)
    x, weight, bias, a, b = tensors
    for i in sorted({*ids} - {-1}):
        own = torch.tensor(tokens_of(i, ids, 91))
        part = x.detach().view(-1, IN)[own].requires_grad_()
        torch.manual_seed(i)
        y = lora_linear(part, weight, bias, a[i], b[i], SCALES[i], dropout_p[i])
        alone = [y, *torch.autograd.grad(y, (part, a[i], b[i]), dy.view(-1, OUT)[own])]
        together = ours[0].view(-1, OUT)[own], ours[1].view(-1, IN)[own], ours[2 + i], ours[7 + i]
        for out, exact in zip(together, alone, strict=True):
            assert relative_error(out, exact) <= TOLERANCE[FP32]


def masks(ids, tokens: int, p, **given) -> Tensor:
    """The masks themselves, with their 1/q: of A = B = I on ones."""
    eye = [torch.eye(IN)] * (1 + max(ids))
    base = torch.zeros(IN, IN)
    return grouped_lora(
        torch.ones(tokens, IN), base, None, eye, eye, [1.0] * len(eye), RowGroups.of(ids, len(eye)), p, **given
    )


def test_one_adapter_drops_bit_for_bit_what_lora_linear_drops():
    torch.manual_seed(5)
    ours = masks([0, 0, 0], 39, 0.4)
    torch.manual_seed(5)
    eye = torch.eye(IN)
    theirs = lora_linear(torch.ones(39, IN), eye * 0, None, eye, eye, 1.0, 0.4)
    assert 0 < (ours == 0).sum() < ours.numel()
    assert torch.equal(ours, theirs)


def test_a_token_index_gives_padded_tokens_the_mask_they_have_alone():
    alone = masks([0, 0], 10, 0.4, seeds=[9]).view(2, 5, IN)
    index = torch.arange(8).expand(4, 8).clone()
    index[:, 5:] = 0  # padding
    index[2] += 5
    index[2, 5:] = 0
    together = masks([0, 1, 0, 1], 32, 0.4, seeds=[9, 10], token_index=index.flatten()).view(4, 8, IN)
    assert torch.equal(together[[0, 2], :5], alone)
    assert not torch.equal(together[[1, 3], :5], alone)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_a_token_index_that_counts_the_own_tokens_is_the_default(index_dtype):
    ids, tensors = ROWS["scattered"], batch(7, 3)
    index = torch.zeros(21, dtype=index_dtype)
    for i in range(5):
        own = tokens_of(i, ids, 21)
        index[own] = torch.arange(len(own), dtype=index_dtype)
    runs = (grouped(tensors, ids, dropout_p=0.5, seeds=range(5), **given) for given in ({}, {"token_index": index}))
    for out, exact in zip(*(gradients(y, tensors) for y in runs), strict=True):
        assert torch.equal(out, exact)


def test_dx_is_the_base_s_alone_exactly_where_x_was_dropped():
    tensors = batch(7, 3)
    dropped = masks([0] * 7, 21, 0.4, seeds=[3]) == 0
    x, weight, bias, a, b = tensors
    y = grouped_lora(x, weight * 0, bias, a[:1], b[:1], [1.5], RowGroups.of([0] * 7, 1), 0.4, [3])
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0].view(21, IN) == 0, dropped)


@pytest.mark.parametrize("ids", ROWS.values(), ids=ROWS)
@ANY_RANKS
def test_a_rank_mask_lies_between_the_factors_of_each_adapter(ranks, ids):
    tensors, dy = batch(7, 13, ranks=ranks), torch.randn(7, 13, OUT)
    mask = torch.rand(91, max(ranks)).bernoulli().mul(2)
    ours = gradients(grouped(tensors, ids, rank_mask=mask), tensors, dy)
    x, weight, bias, a, b = tensors
    for i in sorted({*ids} - {-1}):
        own = torch.tensor(tokens_of(i, ids, 91))
        part = x.detach().view(-1, IN)[own].requires_grad_()
        y = lora_linear(part, weight, bias, a[i], b[i], SCALES[i], 0.0, mask[own, : ranks[i]])
        alone = [y, *torch.autograd.grad(y, (part, a[i], b[i]), dy.view(-1, OUT)[own])]
        together = ours[0].view(-1, OUT)[own], ours[1].view(-1, IN)[own], ours[2 + i], ours[7 + i]
        for out, exact in zip(together, alone, strict=True):
            assert relative_error(out, exact) <= TOLERANCE[FP32]


def test_seeds_are_drawn_in_order_for_the_adapters_that_drop():
    tensors, dropout_p = batch(7, 3), (0.0, 0.3, 0.0, 0.5, 0.2)
    torch.manual_seed(1)
    given = [
        0,
        *torch.randint(2**63 - 1, (1,)),
        0,
        torch.randint(2**63 - 1, (1,)),
        int(torch.randint(2**63 - 1, (1,))),
    ]
    torch.manual_seed(1)
    y = grouped(tensors, ROWS["sorted"], dropout_p=dropout_p)
    assert torch.equal(y, grouped(tensors, ROWS["sorted"], dropout_p=dropout_p, seeds=given))
    assert not torch.equal(y, grouped(tensors, ROWS["sorted"], dropout_p=dropout_p))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_replays_the_masks(use_reentrant):
    tensors = batch(7, 3)
    torch.manual_seed(2)
    direct = gradients(grouped(tensors, ROWS["scattered"], dropout_p=0.5), tensors)
    torch.manual_seed(2)

    def again(x, *factors):
        return grouped(Batch(x, *tensors[1:3], factors[:5], factors[5:]), ROWS["scattered"], dropout_p=0.5)

    y = checkpoint(again, tensors.x, *tensors.a, *tensors.b, use_reentrant=use_reentrant)
    y.backward(torch.linspace(-1, 1, y.numel()).bfloat16().float().view(y.shape))
    for out, tensor in zip(direct[1:], tensors.trained, strict=True):
        assert torch.equal(out, torch.zeros_like(out) if tensor.grad is None else tensor.grad)


# --- rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form", [list, torch.tensor, lambda ids: torch.tensor(ids).int()], ids=["list", "int64", "int32"]
)
def test_an_adapter_in_no_row_has_no_gradient_as_if_it_had_not_been_in_the_batch(form):
    tensors = batch(7, 2)
    ids = ROWS["beside each other"]
    grouped(tensors, form(ids)).sum().backward()
    for i in range(5):
        assert (tensors.a[i].grad is None, tensors.b[i].grad is None) == (i not in ids, i not in ids)


def test_ids_rewritten_in_place_are_read_anew_and_checked_again():
    tensors, ids = batch(7, 2), torch.tensor(ROWS["sorted"])
    groups = RowGroups.of(ids, 5)
    assert torch.equal(grouped(tensors, groups), grouped(tensors, ROWS["sorted"]))
    ids.copy_(torch.tensor(ROWS["scattered"]))
    assert torch.equal(grouped(tensors, groups), grouped(tensors, ROWS["scattered"]))
    ids[3] = 5
    with pytest.raises(ValueError, match="row 3 asks for adapter 5 of 5"):
        grouped(tensors, groups)


def test_inference_mode_rewrites_its_own_ids():
    tensors = detached(batch(7, 2))
    with torch.inference_mode():
        ids = torch.tensor(ROWS["sorted"])
        groups = RowGroups.of(ids, 5)
        assert torch.equal(grouped(tensors, groups), grouped(tensors, ROWS["sorted"]))
        ids.copy_(torch.tensor(ROWS["scattered"]))
        assert torch.equal(grouped(tensors, groups), grouped(tensors, ROWS["scattered"]))


def test_rows_are_sorted_once_for_all_layers():
    tensors = batch(7, 2)
    groups = RowGroups.of(torch.tensor(ROWS["scattered"]), 5)
    with mock.patch.object(torch, "sort", wraps=torch.sort) as sort:
        for _ in range(3):
            gradients(grouped(tensors, groups), tensors)
    assert sort.call_count == 1


class Operators(TorchDispatchMode):
    """Counts what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def operators(ids, ranks=RANKS) -> list[str]:
    x, weight, bias, a, b = detached(batch(len(ids), 2, ranks=ranks))
    order, offsets = RowGroups.of(ids, len(ranks)).sorted_on(x.device)
    layout = (1.0,) * len(ranks), order, offsets, [0.0] * len(ranks), None, None, None
    with Operators() as log:
        y, s = reference.forward(x, [weight], [bias], a, b, *layout, FP32)
        reference.backward([y], x, [s], [weight], a, b, *layout, True, [True] * len(ranks), [True] * len(ranks))
    return log.names


def products(names: list[str]) -> int:
    """But for the two of the base."""
    return sum(map(names.count, ("mm", "addmm", "linear", "bmm", "baddbmm_"))) - 2


def test_rows_beside_each_other_are_views_and_take_two_skinny_products_forward_and_four_backward():
    names = operators(ROWS["sorted"])
    assert not {"index_select", "index_copy_", "clone", "_to_copy"} & {*names}
    assert products(names) == 5 * (2 + 4)
    assert operators(ROWS["scattered"]).count("index_select") == 3  # x twice and dy


@pytest.mark.parametrize("order", [[*range(16)], [*range(0, 16, 2), *range(1, 16, 2)]], ids=["sorted", "scattered"])
def test_adapters_of_one_rank_and_as_many_rows_take_no_more_products_than_one(order):
    assert products(operators([row // 2 for row in order], (4,) * 8)) == 2 + 4
    assert products(operators([row // 2 for row in order], (4,) * 4 + (2,) * 4)) == 2 * (2 + 4)


# --- what is kept for backward -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_x_itself_and_a_rank_for_each_token_are_kept(dropout_p):
    tensors = batch(7, 9)
    kept = kept_tensors(lambda: grouped(tensors, ROWS["scattered"], dropout_p=dropout_p))
    own = {t.data_ptr() for t in (tensors.x, tensors.weight, *tensors.a, *tensors.b)}
    assert tensors.x.data_ptr() in {t.data_ptr() for t in kept}
    assert sum(t.nbytes for t in kept if t.data_ptr() not in own) <= 63 * max(RANKS) * 4 + 8 * (7 + 6 + 5)


def test_frozen_down_projections_keep_no_x_and_calls_without_gradients_nothing():
    tensors = batch(7, 9)
    for t in tensors.a:
        t.requires_grad_(False)
    kept = kept_tensors(lambda: grouped(tensors, ROWS["scattered"]))
    assert tensors.x.data_ptr() not in {t.data_ptr() for t in kept}
    with torch.no_grad():
        assert kept_tensors(lambda: grouped(tensors, ROWS["scattered"], dropout_p=0.5)) == []


# --- torch's own machinery -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_linear_does(dtype):
    tensors = batch(7, 3)
    with torch.autocast("cpu", dtype):
        y = grouped(tensors, ROWS["sorted"])
        assert y.dtype == nn.functional.linear(*tensors[:3]).dtype == dtype
    found = gradients(y.float(), tensors)
    assert {t.dtype for t in found[1:]} == {FP32}
    with torch.autocast("cpu", dtype):
        peer = loop(tensors, ROWS["sorted"])
    exact = gradients(loop(tensors, ROWS["sorted"]), tensors)
    for out, other, expected in zip(found, gradients(peer.float(), tensors), exact, strict=True):
        # a sum of few tokens loses more than storage rounding in torch itself
        assert relative_error(out, expected) <= max(3 * TOLERANCE[dtype], 1.1 * relative_error(other, expected))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_ops_pass_opcheck(dropout_p):
    x, weight, bias, a, b = detached(batch(7, 2))
    order, offsets = RowGroups.of(ROWS["scattered"], 5).sorted_on(x.device)
    seeds, index = (torch.arange(5), torch.arange(14)) if dropout_p else (None, None)
    mask = torch.rand(14, max(RANKS)).round() if dropout_p else None
    layout = list(SCALES), order, offsets, [dropout_p] * 5, seeds, index, mask
    forward = x, [weight], [bias], a, b, *layout, FP32, True
    torch.library.opcheck(OPS.grouped_lora_forward.default, forward)
    y, s = OPS.grouped_lora_forward(*forward)
    some = [False, True, True, False, True]
    needs = (False, some, [False] * 5) if dropout_p else (True, [True] * 5, some)
    backward = [y], x, [s], [weight], a, b, *layout, *needs
    torch.library.opcheck(OPS.grouped_lora_backward.default, backward)


@pytest.mark.parametrize(("autocast", "form"), [(False, list), (True, torch.tensor)], ids=["list", "autocast-tensor"])
def test_compiles_into_one_graph(autocast, form):
    tensors, ids = batch(7, 3), form(ROWS["scattered"])

    def step(x, a, b):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            groups = RowGroups.of(ids, 5)
            return grouped(Batch(x, *tensors[1:3], a, b), groups, dropout_p=0.5, seeds=[1, 2, 3, 4, 5]).float()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    ours, eager = (gradients(f(tensors.x, tensors.a, tensors.b), tensors) for f in (compiled, step))
    for out, exact in zip(ours, eager, strict=True):
        assert relative_error(out, exact) <= 1e-6
    with torch.no_grad():
        assert torch.equal(compiled(tensors.x, tensors.a, tensors.b), eager[0])


def test_a_compiled_function_takes_groups_made_outside():
    tensors, groups = batch(7, 3), RowGroups.of(ROWS["scattered"], 5)
    compiled = torch.compile(lambda x: grouped(Batch(x, *tensors[1:]), groups), backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(tensors.x), grouped(tensors, groups)) <= 1e-6


def test_meta_tensors_give_shapes():
    x, weight, bias, a, b = detached(batch(7, 3, adapter_dtype=torch.bfloat16))
    moved = Batch(*(t.to("meta") for t in (x, weight, bias)), *([t.to("meta") for t in half] for half in (a, b)))
    y = grouped(moved, ROWS["scattered"], dropout_p=0.1)
    assert (y.shape, y.device.type) == ((7, 3, OUT), "meta")


def test_flops_count_the_base_for_all_tokens_and_each_adapter_for_its_own():
    tensors = batch(7, 3)
    own = 3 * sum(RANKS[i] for i in ROWS["scattered"] if i >= 0)
    with FlopCounterMode(display=False) as counter:
        y = grouped(tensors, ROWS["scattered"])
    forward = counter.get_total_flops()
    assert forward == 2 * (21 * IN * OUT + own * (IN + OUT))
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == forward + 2 * own * (IN + OUT)
