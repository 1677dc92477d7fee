"""`lora_group`: several projections of one input against float64, their one mask, what is kept, and the errors."""

from itertools import product

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from petune.kernels.lora_group import lora_group
from petune.kernels.lora_linear import lora_linear
from tests.conftest import TOLERANCE, relative_error
from tests.kernels.operands import fixed_dy, gradients, in_double, kept_tensors

OPS = torch.ops.petune
IN_FEATURES = 17
SIZES = ((23, 3), (7, 5), (11, 2))  # (out_features, rank) of q, k, v
SCALES = (1.5, 0.5, 2.0)


def operands(*lead, sizes=SIZES, dtype=torch.float32, adapter_dtype=None):
    """[x, weights, biases, a, b] in one flat list, with updates about as large as the frozen outputs."""
    adapter_dtype = adapter_dtype or dtype
    x = torch.randn(*(lead or (13,)), IN_FEATURES, dtype=dtype, requires_grad=True)
    weights = [torch.randn(n, IN_FEATURES, dtype=dtype) for n, _ in sizes]
    biases = [torch.randn(n, dtype=dtype) for n, _ in sizes]
    a = [torch.randn(r, IN_FEATURES, dtype=adapter_dtype, requires_grad=True) for _, r in sizes]
    b = [torch.randn(n, r, dtype=adapter_dtype, requires_grad=True) for n, r in sizes]
    return [x, *weights, *biases, *a, *b]


def columns(flat):
    size = len(flat) // 4
    return [flat[i : i + size] for i in range(0, len(flat), size)]


def group(x, *flat, dropout_p=0.0):
    return lora_group(x, *columns(flat), SCALES[: len(flat) // 4], dropout_p)


def plain(x, *flat, mask=None):
    """The formula, one projection after the other, with an explicit mask."""
    dropped = x if mask is None else x * mask
    return tuple(
        nn.functional.linear(x, weight, bias) + scale * (dropped @ a.T) @ b.T
        for weight, bias, a, b, scale in zip(*columns(flat), SCALES, strict=False)
    )


def scaled_mask(tokens, dropout_p, dtype=torch.float32):
    """The mask of the next call: A = B = I shows it in every output."""
    eye, ones = torch.eye(IN_FEATURES, dtype=dtype), torch.ones(tokens, IN_FEATURES, dtype=dtype)
    masks = lora_group(ones, [eye * 0] * 2, [None] * 2, [eye] * 2, [eye] * 2, (1.0, 1.0), dropout_p)
    assert torch.equal(*masks)
    assert 0 < (masks[0] == 0).sum() < masks[0].numel()
    return masks[0]


# --- the formula ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(), (1,), (2, 5), (2, 3, 5), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_outputs_and_gradients_match_float64(lead, dtype):
    tensors = operands(3, dtype=dtype)
    tensors[0] = torch.randn(*lead, IN_FEATURES, dtype=dtype, requires_grad=True)
    ours, peer = gradients(group, tensors), gradients(plain, tensors)
    for out, other, reference in zip(ours, peer, gradients(plain, in_double(tensors)), strict=True):
        assert out.dtype == dtype
        assert out.shape == reference.shape
        # fp16 products of one token lose more than storage rounding in torch itself
        assert relative_error(out, reference) <= max(TOLERANCE[dtype], 1.1 * relative_error(other, reference))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_each_projection_is_the_lora_linear_of_x(count):
    tensors = operands(9, sizes=(*SIZES, (5, 4))[:count])
    x, parts = tensors[0], columns(tensors[1:])
    scales = (*SCALES, 0.25)[:count]
    for y, *projection in zip(lora_group(x, *parts, scales), *parts, scales, strict=True):
        assert relative_error(y, lora_linear(x, *projection)) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(
    "trained",
    [
        ("x", "a0", "a1", "b0", "b1"),
        ("x",),
        ("a0",),
        ("b1",),
        ("a1", "b0"),
        ("x", "b0"),
        ("w0", "c1"),
        ("x", "w1", "a0"),
    ],
    ids="+".join,
)
def test_gradcheck_in_double(trained, dropout_p):
    tensors = operands(7, sizes=((6, 2), (4, 3)), dtype=torch.float64)
    names = ["x", *(f"{letter}{i}" for letter, i in product("wcab", range(2)))]
    for name, tensor in zip(names, tensors, strict=True):
        tensor.requires_grad_(name in trained)

    def replayed(*tensors):
        torch.manual_seed(3)
        # an output that depends on nothing trained gives gradcheck nothing to check
        return tuple(y for y in group(*tensors, dropout_p=dropout_p) if y.requires_grad)

    assert torch.autograd.gradcheck(replayed, tuple(tensors))


def test_no_bias_is_a_bias_of_zeros():
    tensors = operands()
    without = [None if 4 <= i < 7 else tensor for i, tensor in enumerate(tensors)]
    zeros = [tensor * 0 if 4 <= i < 7 else tensor for i, tensor in enumerate(tensors)]
    for left, right in zip(gradients(group, without), gradients(group, zeros), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("used", [(0,), (2,), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_an_unused_output_gives_its_factors_no_gradient_and_nothing_to_dx(used, dropout_p):
    tensors = operands(dtype=torch.float64)
    torch.manual_seed(5)
    mask = scaled_mask(13, dropout_p, torch.float64) if dropout_p else None
    torch.manual_seed(5)
    ours, exact = group(*tensors, dropout_p=dropout_p), plain(*tensors, mask=mask)
    wanted = [t for t in tensors if t.requires_grad]
    results = [
        torch.autograd.grad(sum(ys[i].square().sum() for i in used), wanted, allow_unused=True) for ys in (ours, exact)
    ]
    for out, reference in zip(*results, strict=True):
        assert (out is None) == (reference is None)
        assert out is None or relative_error(out, reference) <= TOLERANCE[torch.float64]


def test_fp32_adapters_on_a_bf16_base_get_fp32_gradients_nearer_to_float64_than_bf16_adapters():
    torch.manual_seed(1)
    tensors = operands(512, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    low = [t.detach().bfloat16().requires_grad_(t.requires_grad) for t in tensors]
    dy = [torch.randn(512, n).bfloat16() for n, _ in SIZES]
    exact = gradients(plain, in_double(tensors), [t.double() for t in dy])[4:]
    ours, theirs = gradients(group, tensors, dy)[4:], gradients(plain, low, dy)[4:]  # dA and dB
    for out, other, reference in zip(ours, theirs, exact, strict=True):
        assert out.dtype == torch.float32
        assert relative_error(out, reference) < relative_error(other, reference)


def test_one_fp32_adapter_among_bf16_adapters_leaves_each_gradient_in_its_own_dtype():
    tensors = operands(dtype=torch.bfloat16)
    tensors[7], tensors[10] = (t.detach().float().requires_grad_() for t in (tensors[7], tensors[10]))
    grads = gradients(group, tensors)[3:]
    assert [g.dtype for g in grads] == [t.dtype for t in tensors if t.requires_grad]


def test_strided_inputs_give_the_same_result_and_are_kept_without_a_copy():
    tensors = operands(6, 4)
    x, weights = tensors[0].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(), tensors[1:4]
    conv1d = [weight.T.contiguous().T for weight in weights]  # GPT-2 keeps [in_features, out_features]
    assert not x.is_contiguous()
    strided = [x, *conv1d, *tensors[4:]]
    for left, right in zip(gradients(group, strided), gradients(group, tensors), strict=True):
        assert relative_error(left, right) <= 1e-6
    assert {t.data_ptr() for t in kept_tensors(lambda: group(*strided))} <= {t.data_ptr() for t in strided}


def test_backward_leaves_x_and_every_incoming_gradient_as_they_were():
    tensors = operands()
    dy = [torch.randn(13, n) for n, _ in SIZES]
    before = [t.clone() for t in (tensors[0], *dy)]
    ys = group(*tensors)
    for _ in range(2):  # a second pass over the same graph finds what the first one found
        torch.autograd.grad(ys, tensors[0], dy, retain_graph=True)
    assert all(torch.equal(*pair) for pair in zip(before, (tensors[0], *dy), strict=True))


# --- dropout -------------------------------------------------------------------------------------------------------


def test_one_mask_serves_every_output_and_every_gradient():
    tensors = operands(11, dtype=torch.float64)
    torch.manual_seed(5)
    mask = scaled_mask(11, 0.4, torch.float64)
    torch.manual_seed(5)
    ours = gradients(lambda *t: group(*t, dropout_p=0.4), tensors)
    for out, reference in zip(ours, gradients(lambda *t: plain(*t, mask=mask), tensors), strict=True):
        assert relative_error(out, reference) <= TOLERANCE[torch.float64]


def test_dx_is_zero_exactly_where_x_was_dropped_if_the_base_weights_are_zero():
    tensors = [tensor * 0 if 1 <= i < 4 else tensor for i, tensor in enumerate(operands(11))]
    torch.manual_seed(5)
    mask = scaled_mask(11, 0.4)
    torch.manual_seed(5)
    sum(y.sum() for y in group(*tensors, dropout_p=0.4)).backward()
    assert torch.equal(tensors[0].grad == 0, mask == 0)


def test_manual_seed_replays_the_mask_and_calls_differ():
    tensors = operands()
    torch.manual_seed(1)
    first, second = group(*tensors, dropout_p=0.5), group(*tensors, dropout_p=0.5)
    torch.manual_seed(1)
    for one, other, replayed in zip(first, second, group(*tensors, dropout_p=0.5), strict=True):
        assert torch.equal(one, replayed)
        assert not torch.equal(one, other)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_replays_the_mask(use_reentrant):
    tensors = operands()
    wanted = [t for t in tensors if t.requires_grad]
    torch.manual_seed(2)
    direct = gradients(lambda *t: group(*t, dropout_p=0.5), tensors)
    torch.manual_seed(2)
    ys = checkpoint(lambda *t: group(*t, dropout_p=0.5), *tensors, use_reentrant=use_reentrant)
    torch.autograd.backward(ys, [fixed_dy(y) for y in ys])
    for out, reference in zip((*ys, *(t.grad for t in wanted)), direct, strict=True):
        assert torch.equal(out, reference)


# --- what is kept for backward -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_x_is_kept_once_for_three_projections_and_nothing_else_of_its_size(dropout_p):
    tensors = operands(2, 9)
    kept = kept_tensors(lambda: group(*tensors, dropout_p=dropout_p))
    parameters = {t.data_ptr() for t in tensors[1:]}
    others = [t for t in kept if t.data_ptr() not in parameters]
    assert [t.data_ptr() for t in others if t.nbytes > 8] == [tensors[0].data_ptr()]
    assert len(others) == (2 if dropout_p else 1)  # the other is the seed, 8 bytes


def test_autocast_keeps_the_fp32_input_and_no_copy_of_it():
    tensors = operands()
    with torch.autocast("cpu", torch.bfloat16):
        kept = kept_tensors(lambda: group(*tensors))
    assert {t.data_ptr() for t in kept} <= {t.data_ptr() for t in tensors}


def test_frozen_down_projections_keep_the_rank_sized_products_and_not_x():
    tensors = [t.detach().requires_grad_(i == 0 or i > 9) for i, t in enumerate(operands(50))]
    kept = kept_tensors(lambda: group(*tensors, dropout_p=0.5))
    own = {t.data_ptr() for t in tensors[1:]}
    assert max(t.nbytes for t in kept if t.data_ptr() not in own) == 50 * (3 + 5 + 2) * 4


def test_nothing_is_kept_without_gradients():
    with torch.no_grad():
        assert kept_tensors(lambda: group(*operands(), dropout_p=0.5)) == []


# --- torch's own machinery -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_linear_does(dtype):
    tensors = operands(9)
    with torch.autocast("cpu", dtype):
        ys = group(*tensors)
        assert {y.dtype for y in group(tensors[0].to(dtype), *tensors[1:])} == {dtype}  # what an outer layer has cast
        assert {y.dtype for y in group(*(t.double() for t in tensors))} == {torch.float64}
    assert {y.dtype for y in ys} == {dtype}
    sum(y.float().sum() for y in ys).backward()
    exact = gradients(plain, tensors, [torch.ones(9, n) for n, _ in SIZES])
    for out, reference in zip((*ys, *(t.grad for t in tensors if t.requires_grad)), exact, strict=True):
        assert relative_error(out, reference) <= 2 * TOLERANCE[dtype]
    assert {t.grad.dtype for t in tensors if t.requires_grad} == {torch.float32}


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_ops_pass_opcheck(dropout_p):
    x, *flat = (t.detach() for t in operands())
    weights, biases, a, b = columns(flat)
    biases[1] = None
    seed = torch.tensor([5]) if dropout_p else None
    arguments = (x, weights, biases, a, b, SCALES, dropout_p, seed, torch.float32)
    for dtype in (torch.float32, torch.bfloat16):  # the latter is autocast's
        torch.library.opcheck(OPS.lora_group_forward.default, (*arguments[:-1], dtype))
    *ys, s = OPS.lora_group_forward(*arguments)
    parts = list(s.split([3, 5, 2], dim=1))
    for kept, needs in ((parts, [True] * 5), ([], [False, True, True, False, True]), ([], [True] + [False] * 4)):
        arguments = (torch.cat(a), x, kept, ys, weights, b, SCALES, dropout_p, seed, needs)
        torch.library.opcheck(OPS.lora_group_backward.default, arguments)


@pytest.mark.parametrize("case", ["fp32", "autocast", "no_grad"])
def test_compiles_into_one_graph(case):
    tensors = operands(2, 5)

    def step(*tensors):
        with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
            return tuple(y.float() for y in group(*tensors))

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    if case == "no_grad":
        with torch.no_grad():
            results = [compiled(*tensors), step(*tensors)]
    else:
        results = [gradients(compiled, tensors), gradients(step, tensors)]
    for out, reference in zip(*results, strict=True):
        assert relative_error(out, reference) <= 1e-6


def test_torch_func_differentiates_it_twice_and_per_sample():
    x, *flat = (t.detach() for t in operands(4, dtype=torch.float64))

    def loss(function, x, a):
        return sum(y.square().sum() for y in function(x, *flat[:6], a, *flat[7:]))

    for transform in (torch.func.hessian, lambda f: torch.func.vmap(torch.func.grad(f), in_dims=(0, None))):
        ours, exact = (transform(lambda x, a, f=f: loss(f, x, a))(x, flat[6]) for f in (group, plain))
        assert relative_error(ours, exact) <= TOLERANCE[torch.float64]


def test_torch_func_drops_the_same_elements_for_the_whole_group():
    eye, ones = torch.eye(IN_FEATURES), torch.ones(11, IN_FEATURES)
    args = ([eye * 0] * 2, [None] * 2, [eye] * 2, [eye] * 2, (1.0, 1.0), 0.5)
    first, second = torch.func.vmap(lambda x: lora_group(x, *args), randomness="different")(ones)
    assert torch.equal(first, second)
    assert (first == 0).any()
    assert abs(first.mean().item() - 1) < 5 * (1 / first.numel()) ** 0.5


def test_meta_tensors_give_shapes():
    ys = group(*(t.detach().to("meta") for t in operands(2, 5, adapter_dtype=torch.float64)), dropout_p=0.1)
    assert [(y.shape, y.device.type) for y in ys] == [((2, 5, n), "meta") for n, _ in SIZES]


def test_flops_count_the_base_and_the_low_rank_products():
    tensors = operands(13)
    with FlopCounterMode(display=False) as counter:
        ys = group(*tensors)
    forward = counter.get_total_flops()
    assert forward == sum(2 * 13 * (IN_FEATURES * n + r * (IN_FEATURES + n)) for n, r in SIZES)
    with FlopCounterMode(display=False) as counter:
        sum(y.sum() for y in ys).backward()
    # dA, dB and s once more
    assert counter.get_total_flops() == forward + sum(2 * 13 * r * (2 * IN_FEATURES + n) for n, r in SIZES)


# --- errors --------------------------------------------------------------------------------------------------------


def test_a_second_derivative_is_refused_and_not_lost():
    tensors = operands()
    first = torch.autograd.grad(group(*tensors)[0].sum(), tensors[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"lora_group was asked for a second derivative.*use peft\.LoraConfig"):
        first.square().sum().backward()


@pytest.mark.parametrize(
    ("field", "shape"),
    [
        ("x", (4, 16)),
        ("x", ()),
        ("weights[1]", (7, 16)),
        ("weights[1]", (8, 17)),
        ("biases[2]", (12,)),
        ("a[0]", (3, 18)),
        ("a[0]", (2, 17)),
        ("b[1]", (7, 4)),
        ("b[1]", (6, 5)),
        ("b[1]", (35,)),
    ],
    ids=str,
)
def test_shapes_that_disagree_are_named(field, shape):
    names = ["x", *(f"{name}[{i}]" for name, i in product(("weights", "biases", "a", "b"), range(3)))]
    tensors = dict(zip(names, operands(4), strict=True)) | {field: torch.randn(shape)}
    with pytest.raises(ValueError, match=r"lora_group: x \(.*do not fit; pass") as error:
        group(*tensors.values())
    assert f"{field} {tuple(shape)}" in str(error.value)


@pytest.mark.parametrize("count", [1, 5])
def test_a_group_has_two_to_four_projections(count):
    tensors = operands(sizes=((6, 2),) * count)
    with pytest.raises(
        ValueError, match=f"have {', '.join([str(count)] * 5)} entries; pass equally many of each, 2 to 4"
    ):
        lora_group(tensors[0], *columns(tensors[1:]), [1.0] * count)


def test_lists_of_different_lengths_are_refused():
    x, *flat = operands()
    with pytest.raises(ValueError, match="weights, biases, a, b and scales have 3, 3, 3, 3, 2 entries"):
        lora_group(x, *columns(flat), SCALES[:2])


@pytest.mark.parametrize("dropout_p", [-0.1, 1.0, float("nan")])
def test_dropout_out_of_range_is_refused(dropout_p):
    with pytest.raises(ValueError, match=r"lora_group: dropout_p=.* is not in \[0, 1\)"):
        group(*operands(), dropout_p=dropout_p)


@pytest.mark.parametrize("index", [2, 5], ids=["weight", "bias"])
def test_dtypes_that_disagree_are_refused_outside_of_autocast(index):
    tensors = operands()
    tensors[index] = tensors[index].bfloat16()
    with pytest.raises(
        ValueError, match=r"x \(13, 17\) torch.float32 cpu, weights\[1\] \(7, 17\).*bfloat16.*autocast"
    ):
        group(*tensors)


@pytest.mark.parametrize("index", [0, 2, 8, 12])
def test_devices_that_disagree_are_named(index):
    tensors = operands()
    tensors[index] = tensors[index].detach().to("meta")
    with pytest.raises(ValueError, match=r"lora_group: x.*meta.*are not on one device; move the model"):
        group(*tensors)


def test_non_finite_values_are_passed_through():
    tensors = operands()
    with torch.no_grad():
        tensors[0][3] = float("nan")
    for y in group(*tensors):
        assert y.isnan().any(dim=-1).tolist() == [row == 3 for row in range(13)]
