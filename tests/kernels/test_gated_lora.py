"""`gated` and `gated_lora`: the gate of an MLP against float64, what is kept of it, and the errors."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from petune.kernels.gated_lora import gated, gated_lora
from petune.kernels.lora_linear import lora_linear
from tests.conftest import TOLERANCE, relative_error
from tests.kernels.operands import fixed_dy, gradients, in_double, kept_tensors

OPS = torch.ops.petune
SCALE = 1.5
IN_FEATURES = 17
ACTIVATIONS = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
}
EDGES = (0.0, -0.0, 5.0, -5.0, 13.0, -13.0, 100.0, -100.0, 1e4, -1e4)
EVERY_ACTIVATION = pytest.mark.parametrize("activation", ACTIVATIONS)


def operands(*lead, dtype=torch.float32, adapter_dtype=None):
    """gate, up, weight, bias, a, b of odd sizes, with an update about as large as the frozen output."""
    adapter_dtype = adapter_dtype or dtype
    gate, up = (torch.randn(*(lead or (13,)), IN_FEATURES, dtype=dtype, requires_grad=True) for _ in range(2))
    weight, bias = torch.randn(23, IN_FEATURES, dtype=dtype), torch.randn(23, dtype=dtype)
    a = torch.randn(3, IN_FEATURES, dtype=adapter_dtype, requires_grad=True)
    b = torch.randn(23, 3, dtype=adapter_dtype, requires_grad=True)
    return [gate, up, weight, bias, a, b]


def plain_gate(gate, up, activation="silu"):
    return ACTIVATIONS[activation](gate) * up


def plain(gate, up, weight, bias, a, b, activation="silu", mask=None):
    """The formula in the operands' own dtype, with an explicit mask."""
    h = plain_gate(gate, up, activation)
    dropped = h if mask is None else h * mask
    return nn.functional.linear(h, weight, bias) + SCALE * (dropped @ a.T) @ b.T


def ours(gate, up, weight, bias, a, b, activation="silu", dropout_p=0.0):
    return gated_lora(gate, up, activation, weight, bias, a, b, SCALE, dropout_p)


def scaled_mask(tokens, dropout_p, dtype=torch.float32):
    """The mask of the next call: A = B = I shows it, on a gate whose output is 1."""
    eye, up = torch.eye(IN_FEATURES, dtype=dtype), torch.ones(tokens, IN_FEATURES, dtype=dtype)
    gate = torch.full_like(up, 60.0)  # silu is the identity here
    mask = gated_lora(gate, up / 60, "silu", eye * 0, None, eye, eye, 1.0, dropout_p)
    assert 0 < (mask == 0).sum() < mask.numel()
    return mask


# --- the formula ---------------------------------------------------------------------------------------------------


@EVERY_ACTIVATION
@pytest.mark.parametrize("lead", [(1,), (2, 3, 5), (0,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_gate_and_its_gradients_match_float64(activation, lead, dtype):
    tensors = [(3 * torch.randn(*lead, 19)).to(dtype).requires_grad_() for _ in range(2)]
    result = gradients(lambda *t: gated(*t, activation), tensors)
    exact = gradients(lambda *t: plain_gate(*t, activation), in_double(tensors))
    for out, reference in zip(result, exact, strict=True):
        assert out.dtype == dtype
        assert out.shape == reference.shape
        assert relative_error(out, reference) <= TOLERANCE[dtype]


@EVERY_ACTIVATION
def test_the_gate_is_rounded_once_and_not_after_each_factor(activation):
    gate, up = (torch.randn(500).bfloat16() for _ in range(2))
    assert torch.equal(gated(gate, up, activation), plain_gate(gate.float(), up.float(), activation).bfloat16())
    assert not torch.equal(gated(gate, up, activation), plain_gate(gate, up, activation))


@EVERY_ACTIVATION
def test_the_gate_saturates_without_overflow(activation):
    gate = torch.tensor(EDGES, requires_grad=True)
    up = torch.full_like(gate, 0.7, requires_grad=True)
    result = gradients(lambda *t: gated(*t, activation), (gate, up))
    exact = gradients(lambda *t: plain_gate(*t, activation), in_double((gate, up)))
    for out, reference in zip(result, exact, strict=True):
        assert out.isfinite().all()
        torch.testing.assert_close(out, reference.float(), rtol=1e-5, atol=1e-6)


@EVERY_ACTIVATION
@pytest.mark.parametrize("lead", [(), (13,), (2, 3, 5), (0,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_output_and_gradients_match_float64(activation, lead, dtype):
    gate, up = (torch.randn(*lead, IN_FEATURES, dtype=dtype, requires_grad=True) for _ in range(2))
    tensors = [gate, up, *operands(dtype=dtype)[2:]]
    result = gradients(lambda *t: ours(*t, activation), tensors)
    peer = gradients(lambda *t: plain(*t, activation), tensors)
    exact = gradients(lambda *t: plain(*t, activation), in_double(tensors))
    for out, other, reference in zip(result, peer, exact, strict=True):
        assert out.dtype == dtype
        assert out.shape == reference.shape
        # h and s are rounded on the way; fp16 products of one token lose more than that in torch itself
        assert relative_error(out, reference) <= max(2 * TOLERANCE[dtype], 1.1 * relative_error(other, reference))


@EVERY_ACTIVATION
@pytest.mark.parametrize("trained", ["gu", "g", "u"])
def test_gradcheck_of_the_gate_in_double(activation, trained):
    tensors = [torch.randn(3, 5, dtype=torch.float64, requires_grad=name in trained) for name in "gu"]
    assert torch.autograd.gradcheck(lambda *t: gated(*t, activation), tensors)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("trained", ["guab", "g", "u", "a", "b", "ab", "ua", "gb", "w", "c", "guwcab"])
def test_gradcheck_in_double(trained, dropout_p):
    tensors = operands(5, dtype=torch.float64)
    for name, tensor in zip("guwcab", tensors, strict=True):
        tensor.requires_grad_(name in trained)

    def replayed(*tensors):
        torch.manual_seed(3)
        return ours(*tensors, "gelu_tanh", dropout_p)

    assert torch.autograd.gradcheck(replayed, tensors)


def test_it_is_the_lora_linear_of_the_gate():
    gate, up, *projection = operands(2, 5)
    expected = lora_linear(gated(gate, up, "gelu"), *projection, SCALE)
    assert torch.equal(gated_lora(gate, up, "gelu", *projection, SCALE), expected)


def test_fp32_adapters_on_a_bf16_base_get_fp32_gradients_nearer_to_float64_than_bf16_adapters():
    tensors = operands(512, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    low = [t.detach().bfloat16().requires_grad_(t.requires_grad) for t in tensors]
    dy = torch.randn(512, 23).bfloat16()
    exact = gradients(plain, in_double(tensors), dy.double())[1:]
    result, theirs = gradients(ours, tensors, dy)[1:], gradients(plain, low, dy)[1:]
    assert [g.dtype for g in result] == [t.dtype for t in tensors if t.requires_grad]
    for out, other, reference in zip(result, theirs, exact, strict=True):
        assert relative_error(out, reference) < relative_error(other, reference)


def test_halves_of_one_packed_projection_give_the_same_result_and_are_kept_without_a_copy():
    gate, up, *rest = operands(6)
    packed = torch.cat((gate, up), dim=-1).detach().requires_grad_()
    halves = packed.chunk(2, dim=-1)
    kept = kept_tensors(lambda: ours(*halves, *rest))
    assert {t.untyped_storage().data_ptr() for t in kept if t.shape == (6, IN_FEATURES)} == {packed.data_ptr()}
    ours(*halves, *rest).square().sum().backward()
    exact = torch.autograd.grad(plain(gate, up, *rest).square().sum(), (gate, up))
    assert relative_error(packed.grad, torch.cat(exact, dim=-1)) <= TOLERANCE[torch.float32]


def test_backward_leaves_the_inputs_and_the_incoming_gradient_as_they_were():
    tensors, dy, dh = operands(), torch.randn(13, 23), torch.randn(13, IN_FEATURES)
    before = [t.clone() for t in (*tensors[:2], dy, dh)]
    y, h = ours(*tensors), gated(*tensors[:2], "silu")
    for _ in range(2):  # a second pass over the same graph finds what the first one found
        torch.autograd.grad((y, h), tensors[:2], (dy, dh), retain_graph=True)
    assert all(torch.equal(*pair) for pair in zip(before, (*tensors[:2], dy, dh), strict=True))


# --- dropout -------------------------------------------------------------------------------------------------------


def test_one_mask_serves_the_output_and_every_gradient():
    tensors = operands(11, dtype=torch.float64)
    torch.manual_seed(5)
    mask = scaled_mask(11, 0.4, torch.float64)
    torch.manual_seed(5)
    result = gradients(lambda *t: ours(*t, dropout_p=0.4), tensors)
    for out, reference in zip(result, gradients(lambda *t: plain(*t, mask=mask), tensors), strict=True):
        assert relative_error(out, reference) <= TOLERANCE[torch.float64]


def test_dgate_is_zero_exactly_where_h_was_dropped_if_the_base_weight_is_zero():
    gate, up, weight, _, a, b = operands(11)
    torch.manual_seed(5)
    mask = scaled_mask(11, 0.4)
    torch.manual_seed(5)
    ours(gate, up, weight * 0, None, a, b, dropout_p=0.4).sum().backward()
    assert torch.equal(gate.grad == 0, mask == 0)
    assert torch.equal(up.grad == 0, mask == 0)


def test_manual_seed_replays_the_mask_and_calls_differ():
    tensors = operands()
    torch.manual_seed(1)
    first, second = ours(*tensors, dropout_p=0.5), ours(*tensors, dropout_p=0.5)
    torch.manual_seed(1)
    assert torch.equal(first, ours(*tensors, dropout_p=0.5))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_replays_the_mask(use_reentrant):
    tensors = operands()
    torch.manual_seed(2)
    direct = gradients(lambda *t: ours(*t, dropout_p=0.5), tensors)
    torch.manual_seed(2)
    y = checkpoint(lambda *t: ours(*t, dropout_p=0.5), *tensors, use_reentrant=use_reentrant)
    y.backward(fixed_dy(y))
    for out, reference in zip((y, *(t.grad for t in tensors if t.requires_grad)), direct, strict=True):
        assert torch.equal(out, reference)


# --- what is kept for backward -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_only_gate_and_up_are_kept_and_never_h(dropout_p):
    tensors = operands(2, 9)
    kept = kept_tensors(lambda: ours(*tensors, dropout_p=dropout_p))
    own = {t.data_ptr() for t in tensors}
    assert {tensors[0].data_ptr(), tensors[1].data_ptr()} <= {t.data_ptr() for t in kept}
    assert sum(t.nbytes for t in kept if t.data_ptr() not in own) <= 8  # the seed


def test_the_gate_alone_keeps_its_two_inputs_where_torch_keeps_a_third_tensor():
    gate, up = operands(9)[:2]
    kept = kept_tensors(lambda: gated(gate, up, "silu"))
    assert [t.data_ptr() for t in kept] == [gate.data_ptr(), up.data_ptr()]
    assert len({t.data_ptr() for t in kept_tensors(lambda: plain_gate(gate, up))}) == 3


def test_autocast_keeps_the_fp32_inputs_and_no_copies_of_them():
    tensors = operands()
    with torch.autocast("cpu", torch.bfloat16):
        kept = kept_tensors(lambda: ours(*tensors))
    assert {t.data_ptr() for t in kept} <= {t.data_ptr() for t in tensors}


def test_a_lone_up_projection_keeps_the_rank_sized_product_and_neither_gate_nor_up():
    tensors = [t.detach().requires_grad_(i == 5) for i, t in enumerate(operands(50))]
    kept = kept_tensors(lambda: ours(*tensors, dropout_p=0.5))
    own = {t.data_ptr() for t in tensors[2:]}
    assert max(t.nbytes for t in kept if t.data_ptr() not in own) == 50 * 3 * 4


def test_nothing_is_kept_without_gradients():
    with torch.no_grad():
        assert kept_tensors(lambda: ours(*operands(), dropout_p=0.5)) == []


# --- torch's own machinery -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_linear_does_and_leaves_the_gate_alone(dtype):
    tensors = operands(9)
    with torch.autocast("cpu", dtype):
        y, h = ours(*tensors), gated(*tensors[:2], "silu")
        low = [t.to(dtype) for t in tensors[:2]]
        assert ours(*low, *tensors[2:]).dtype == gated(*low, "silu").dtype == dtype  # what an outer layer has cast
        assert ours(*(t.double() for t in tensors)).dtype == torch.float64
    assert (y.dtype, h.dtype) == (dtype, torch.float32)
    y.float().sum().backward()
    exact = gradients(plain, tensors, torch.ones(9, 23))
    for out, reference in zip((y, *(t.grad for t in tensors if t.requires_grad)), exact, strict=True):
        assert relative_error(out, reference) <= 2 * TOLERANCE[dtype]
    assert {t.grad.dtype for t in tensors if t.requires_grad} == {torch.float32}


def test_the_gates_ops_pass_opcheck():
    gate, up = operands()[:2]
    for dtype in (torch.float32, torch.bfloat16):  # the latter is autocast's
        torch.library.opcheck(OPS.gated_forward.default, (gate, up, "gelu", dtype))
    gate, up = gate.detach(), up.detach()
    torch.library.opcheck(OPS.gated_backward.default, (gate * up, gate, up, "gelu"))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_ops_pass_opcheck(dropout_p):
    gate, up, *linear = operands()
    seed = torch.tensor([5]) if dropout_p else None
    rest = (SCALE, dropout_p, seed)
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(OPS.gated_lora_forward.default, (gate, up, "silu", *linear, *rest, dtype))
    gate, up, weight, bias, a, b = (t.detach() for t in (gate, up, *linear))
    y, s = OPS.gated_lora_forward(gate, up, "silu", weight, bias, a, b, *rest, torch.float32)
    for kept_s, needs in ((s, [True, True, True]), (None, [False, True, True]), (s, [True, False, False])):
        arguments = (y, gate, up, kept_s, "silu", weight, a, b, *rest, needs)
        torch.library.opcheck(OPS.gated_lora_backward.default, arguments)


@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_into_one_graph(autocast):
    tensors = operands(2, 5)

    def step(gate, up, *linear):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return ours(gate, gated(gate, up, "gelu"), *linear).float()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for out, reference in zip(gradients(compiled, tensors), gradients(step, tensors), strict=True):
        assert relative_error(out, reference) <= 1e-6


def test_torch_func_differentiates_them_twice_and_per_sample():
    gate, up, *rest = (t.detach() for t in operands(4, dtype=torch.float64))

    def through_ops(gate):
        return ours(gate, gated(gate, up[0], "gelu"), *rest).square().sum()

    def through_torch(gate):
        return plain(gate, plain_gate(gate, up[0], "gelu"), *rest).square().sum()

    for transform in (lambda f: torch.func.vmap(torch.func.hessian(f)), lambda f: torch.func.vmap(torch.func.grad(f))):
        assert relative_error(transform(through_ops)(gate), transform(through_torch)(gate)) <= 1e-11


def test_meta_tensors_give_shapes():
    tensors = [t.detach().to("meta") for t in operands(2, 5)]
    assert (ours(*tensors, dropout_p=0.1).shape, gated(*tensors[:2], "gelu").shape) == (
        (2, 5, 23),
        (2, 5, IN_FEATURES),
    )


def test_flops_count_the_base_and_the_low_rank_products():
    tensors = operands(13)
    with FlopCounterMode(display=False) as counter:
        y = ours(*tensors)
    forward = counter.get_total_flops()
    assert forward == 2 * 13 * (IN_FEATURES * 23 + 3 * (IN_FEATURES + 23))
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    # dA, dB and s once more
    assert counter.get_total_flops() == forward + 2 * 13 * 3 * (2 * IN_FEATURES + 23)


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", ["gated", "gated_lora"])
def test_a_second_derivative_is_refused_and_not_lost(operator):
    tensors = operands()
    y = ours(*tensors) if operator == "gated_lora" else gated(*tensors[:2], "silu")
    first = torch.autograd.grad(y.sum(), tensors[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match=rf"{operator} was asked for a second derivative.*use peft\.LoraConfig"):
        first.square().sum().backward()


@pytest.mark.parametrize("operator", ["gated", "gated_lora"])
@pytest.mark.parametrize(
    "up",
    [torch.randn(13, 16), torch.randn(17), torch.randn(13, 17).half(), torch.randn(13, 17, device="meta")],
    ids=["features", "lead", "dtype", "device"],
)
def test_gate_and_up_that_disagree_are_named(operator, up):
    gate, _, *rest = operands()
    call = (lambda: ours(gate, up, *rest)) if operator == "gated_lora" else (lambda: gated(gate, up, "silu"))
    with pytest.raises(
        ValueError, match=rf"{operator}: gate \(13, 17\) torch.float32 cpu, up .*do not fit; pass two"
    ) as e:
        call()
    assert f"up {tuple(up.shape)} {up.dtype} {up.device}" in str(e.value)


def test_an_unknown_activation_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="activation='relu' is not one of silu, gelu, gelu_tanh; apply any other"):
        gated(*operands()[:2], "relu")


@pytest.mark.parametrize(
    ("index", "name", "shape"),
    [
        (2, "weight", (23, 16)),
        (3, "bias", (22,)),
        (4, "a", (2, 17)),
        (4, "a", (3, 18)),
        (5, "b", (22, 3)),
        (5, "b", (9,)),
    ],
)
def test_shapes_that_disagree_are_named(index, name, shape):
    tensors = operands(4)
    tensors[index] = torch.randn(shape)
    with pytest.raises(ValueError, match=r"gated_lora: gate \(4, 17\).*do not fit; pass") as error:
        ours(*tensors)
    assert f"{name} {tuple(shape)}" in str(error.value)


@pytest.mark.parametrize("dropout_p", [-0.1, 1.0, float("nan")])
def test_dropout_out_of_range_is_refused(dropout_p):
    with pytest.raises(ValueError, match=r"gated_lora: dropout_p=.* is not in \[0, 1\)"):
        ours(*operands(), dropout_p=dropout_p)


@pytest.mark.parametrize("index", [2, 3], ids=["weight", "bias"])
def test_dtypes_that_disagree_are_refused_outside_of_autocast(index):
    tensors = operands()
    tensors[index] = tensors[index].bfloat16()
    with pytest.raises(ValueError, match=r"gate \(13, 17\) torch.float32 cpu, weight.*bfloat16.*or use autocast"):
        ours(*tensors)


@pytest.mark.parametrize("index", [2, 3, 4, 5])
def test_devices_that_disagree_are_named(index):
    tensors = operands()
    tensors[index] = tensors[index].detach().to("meta")
    with pytest.raises(ValueError, match=r"gated_lora: gate.*meta.*are not on one device; move the model"):
        ours(*tensors)


@EVERY_ACTIVATION
def test_non_finite_values_are_passed_through(activation):
    tensors = operands()
    with torch.no_grad():
        tensors[0][3, 2] = tensors[1][5, 1] = float("nan")
    tensors = [tensors[0], tensors[1], *tensors[2:]]
    assert ours(*tensors, activation).isnan().any(dim=-1).nonzero().flatten().tolist() == [3, 5]
