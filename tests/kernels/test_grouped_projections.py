"""`grouped_lora_projections`: several projections of one x, against one after the other and against `lora_group`."""

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from petune.kernels.grouped_lora import RowGroups, grouped_lora, grouped_lora_projections, reference
from petune.kernels.lora_group import lora_group
from tests.conftest import TOLERANCE, relative_error
from tests.kernels.grouped import ROWS, tokens_of
from tests.kernels.test_grouped_lora import Operators

FP32 = torch.float32
IN, OUTS = 17, (23, 8, 11)
RANKS = ((1, 3, 8, 2, 5), (4, 3, 2, 2, 1), (1, 1, 6, 2, 3))  # of a projection's five adapters
EQUAL = ((4,) * 5, (2,) * 5, (3,) * 5)
SCALES = ((0.5, 2.0, 1.5, -1.0, 0.75), (1.0, 0.25, -2.0, 0.5, 1.0), (2.0, 2.0, 1.0, 1.5, -0.5))
ANY_RANKS = pytest.mark.parametrize("ranks", [RANKS, EQUAL], ids=["ranks differ", "one rank"])


class Layers(NamedTuple):
    """What projections of one x take."""

    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    a: list[list[Tensor]]
    b: list[list[Tensor]]

    @property
    def trained(self) -> list[Tensor]:
        """x, and the factors of the first projection, then of the next."""
        return [self.x, *(t for own in zip(self.a, self.b, strict=True) for half in own for t in half)]


def layers(*lead: int, dtype: torch.dtype = FP32, ranks=RANKS, device: torch.device | None = None) -> Layers:
    def draw(*shape: int, trained: bool = False) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device).requires_grad_(trained)

    biases = [draw(OUTS[0]), None, draw(OUTS[2])]
    a = [[draw(rank, IN, trained=True) for rank in own] for own in ranks]
    b = [[draw(out, rank, trained=True) for rank in own] for out, own in zip(OUTS, ranks, strict=True)]
    return Layers(draw(*lead, IN, trained=True), [draw(out, IN) for out in OUTS], biases, a, b)


def together(given: Layers, ids, **dropout) -> tuple[Tensor, ...]:
    return grouped_lora_projections(*given, SCALES, RowGroups.of(ids, 5), **dropout)


def apart(given: Layers, ids, **dropout) -> list[Tensor]:
    x, *columns = given
    return [grouped_lora(x, *own, RowGroups.of(ids, 5), **dropout) for own in zip(*columns, SCALES, strict=True)]


def directions(ys: Sequence[Tensor]) -> list[Tensor]:
    return [torch.linspace(-1, 1, y.numel(), device=y.device).to(y.dtype).view(y.shape) for y in ys]


def gradients(ys: Sequence[Tensor], given: Layers) -> list[Tensor]:
    """All y, then the gradient of all that trains: zero where it is None."""
    found = torch.autograd.grad(ys, given.trained, directions(ys), allow_unused=True)
    return [*ys, *(torch.zeros_like(t) if g is None else g for t, g in zip(given.trained, found, strict=True))]


# --- the formula ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("dropout", [{}, {"dropout_p": (0.3, 0.0, 0.5, 0.2, 0.1), "seeds": range(5)}], ids=str)
@ANY_RANKS
def test_each_projection_is_what_it_is_by_itself(ranks, dropout, ids):
    given = layers(7, 3, dtype=torch.float64, ranks=ranks)
    ours, theirs = (gradients(f(given, ids, **dropout), given) for f in (together, apart))
    for out, exact in zip(ours, theirs, strict=True):
        assert relative_error(out, exact) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16], ids=str)
def test_each_adapter_gets_what_lora_group_gives_its_rows_alone(dtype):
    given, ids = layers(7, 13, dtype=dtype), ROWS["scattered"]
    p, drawn = (0.3, 0.0, 0.5, 0.2, 0.1), []
    for i in range(5):
        torch.manual_seed(i)
        drawn.append(torch.randint(2**63 - 1, (1,)))
    ours = gradients(together(given, ids, dropout_p=p, seeds=drawn), given)
    ys, (dx, *factors) = ours[:3], ours[3:]
    for i in sorted({*ids} - {-1}):
        own = torch.tensor(tokens_of(i, ids, 91))
        part = given.x.detach().view(-1, IN)[own].requires_grad_()
        a, b, scales = ([column[i] for column in columns] for columns in (given.a, given.b, SCALES))
        torch.manual_seed(i)
        alone = lora_group(part, given.weights, given.biases, a, b, scales, p[i])
        dys = [dy.view(91, -1)[own] for dy in directions(ys)]
        expected = [*alone, *torch.autograd.grad(alone, (part, *a, *b), dys)]
        found = [*(y.view(91, -1)[own] for y in ys), dx.view(91, -1)[own]]
        found += [factors[10 * projection + 5 * half + i] for half in (0, 1) for projection in range(3)]
        for out, exact in zip(found, expected, strict=True):
            assert relative_error(out, exact) <= 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("ids", [ROWS["sorted"], ROWS["scattered"]], ids=["sorted", "scattered"])
def test_one_mask_of_the_rank_serves_all_projections(ids):
    given, mask = layers(7, 3, dtype=torch.float64), torch.rand(21, 8).bernoulli().mul(2)
    ours = gradients(together(given, ids, rank_mask=mask), given)
    x, *columns = given
    columns = zip(*columns, SCALES, RANKS, strict=True)
    theirs = [grouped_lora(x, *own, RowGroups.of(ids, 5), rank_mask=mask[:, : max(ranks)]) for *own, ranks in columns]
    for out, exact in zip(ours, gradients(theirs, given), strict=True):
        assert relative_error(out, exact) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@ANY_RANKS
def test_a_non_finite_adapter_changes_no_bit_of_another(ranks, value):
    given, ids = layers(7, 3, ranks=ranks), ROWS["scattered"]
    clean = gradients(together(given, ids), given)
    own = torch.tensor([i == 4 for i in ids])
    given.a[1][4].detach().fill_(value)
    found = gradients(together(given, ids), given)
    for out, before in zip(found[:4], clean[:4], strict=True):
        assert torch.equal(out[~own], before[~own])
    for i, (out, before) in enumerate(zip(found[4:], clean[4:], strict=True)):
        assert i % 5 == 4 or torch.equal(out, before)
    assert not found[1][own].isfinite().all()


def test_an_output_that_nothing_uses_gives_its_factors_no_gradient():
    given, ids = layers(7, 2, dtype=torch.float64), ROWS["beside each other"]
    ys = together(given, ids)
    dys = directions(ys)
    found = torch.autograd.grad((ys[0], ys[2]), given.trained, (dys[0], dys[2]), allow_unused=True)
    expected = torch.autograd.grad(apart(given, ids)[::2], given.trained, (dys[0], dys[2]), allow_unused=True)
    assert [t is None for t in found] == [t is None for t in expected]
    assert all(t is None for t in found[11:21])
    for out, exact in zip(found, expected, strict=True):
        assert out is None or relative_error(out, exact) <= TOLERANCE[torch.float64]


def test_trainable_bases_get_their_gradients():
    given, ids = layers(7, 2, dtype=torch.float64), ROWS["scattered"]
    bases = [t.requires_grad_() for t in (*given.weights, *given.biases) if t is not None]
    ours, theirs = (
        torch.autograd.grad(sum(y.square().sum() for y in f(given, ids)), bases) for f in (together, apart)
    )
    for out, exact in zip(ours, theirs, strict=True):
        assert relative_error(out, exact) <= TOLERANCE[torch.float64]


# --- what it costs -------------------------------------------------------------------------------------------------


def test_equal_adapters_take_one_product_for_all_down_projections():
    x, weights, biases, a, b = layers(5, 2, ranks=EQUAL)
    a, b = ([t.detach() for own in half for t in own] for half in (a, b))
    layout = [0.5] * 15, *RowGroups.of(range(5), 5).sorted_on(x.device), [0.0] * 5, None, None, None
    with torch.no_grad(), Operators() as forward:
        found = reference.forward(x, weights, biases, a, b, *layout, FP32)
    ys, ss = found[:3], found[3:]
    with torch.no_grad(), Operators() as backward:
        reference.backward(ys, x, ss, weights, a, b, *layout, True, [True] * 15, [True] * 15)
    assert [log.names.count("bmm") for log in (forward, backward)] == [1, 3 + 3 + 1]  # s; ds, dB, and dA of all
    assert [log.names.count("baddbmm_") for log in (forward, backward)] == [3, 1]  # y; dx of all


def test_flops_are_those_of_the_projections_one_by_one():
    given, ids = layers(7, 3), ROWS["scattered"]
    counted = []
    for f in (together, apart):
        with FlopCounterMode(display=False) as counter:
            ys = f(given, ids)
            sum(y.sum() for y in ys).backward()
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0


# --- torch's own machinery -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_ops_pass_opcheck(dropout_p):
    x, weights, biases, a, b = layers(7, 2)
    x, a, b = x.detach(), *([t.detach() for own in half for t in own] for half in (a, b))
    order, offsets = RowGroups.of(ROWS["scattered"], 5).sorted_on(x.device)
    seeds, index = (torch.arange(5), torch.arange(14)) if dropout_p else (None, None)
    mask = torch.rand(14, 8).round() if dropout_p else None
    scales = [one for own in SCALES for one in own]
    layout = scales, order, offsets, [dropout_p] * 5, seeds, index, mask
    forward = x, weights, biases, a, b, *layout, FP32, True
    torch.library.opcheck(torch.ops.petune.grouped_lora_forward.default, forward)
    found = torch.ops.petune.grouped_lora_forward(*forward)
    some = [False, True, True, False, True] * 3
    backward = found[:3], x, found[3:], weights, a, b, *layout, not dropout_p, some, [True] * 15
    torch.library.opcheck(torch.ops.petune.grouped_lora_backward.default, backward)


def test_compiles_into_one_graph():
    given, ids = layers(7, 3), ROWS["scattered"]

    def step(x, a, b):
        return together(Layers(x, given.weights, given.biases, a, b), ids, dropout_p=0.5, seeds=[1, 2, 3, 4, 5])

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    ours, eager = (gradients(f(given.x, given.a, given.b), given) for f in (compiled, step))
    for out, exact in zip(ours, eager, strict=True):
        assert relative_error(out, exact) <= 1e-6


# --- bad input -----------------------------------------------------------------------------------------------------


def test_projections_that_differ_in_number_are_refused():
    x, weights, biases, a, b = layers(7, 2)
    with pytest.raises(ValueError, match="have 3, 3, 2, 3, 3 entries; pass one of each for every projection"):
        grouped_lora_projections(x, weights, biases, a[:2], b, SCALES, RowGroups.of(ROWS["sorted"], 5))
    with pytest.raises(ValueError, match="have 0, 0, 0, 0, 0 entries"):
        grouped_lora_projections(x, [], [], [], [], [], RowGroups.of(ROWS["sorted"], 5))


def test_a_projection_that_does_not_fit_is_named():
    x, weights, biases, a, b = layers(7, 2)
    b[1][3] = b[1][3][:-1]
    with pytest.raises(ValueError, match=r"grouped_lora: .*weight \(8, 17\).*b\[3\] \(7, 2\).* do not fit"):
        grouped_lora_projections(x, weights, biases, a, b, SCALES, RowGroups.of(ROWS["sorted"], 5))
