"""`lora_linear`: the operator against float64, its dropout, what it keeps for backward, and its errors."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from petune.kernels.lora_linear import lora_linear
from tests.conftest import TOLERANCE, relative_error
from tests.kernels.operands import kept_tensors

OPS = torch.ops.petune
SCALE = 1.5


def operands(*lead: int, in_features=17, out_features=23, rank=3, dtype=torch.float32, adapter_dtype=None):
    """x, weight, bias, a, b of odd sizes, with an update about as large as the frozen output."""
    lead = lead or (13,)
    adapter_dtype = adapter_dtype or dtype
    x = torch.randn(*lead, in_features, dtype=dtype, requires_grad=True)
    weight, bias = torch.randn(out_features, in_features, dtype=dtype), torch.randn(out_features, dtype=dtype)
    a = torch.randn(rank, in_features, dtype=adapter_dtype, requires_grad=True)
    b = torch.randn(out_features, rank, dtype=adapter_dtype, requires_grad=True)
    return x, weight, bias, a, b


def plain(x, weight, bias, a, b, scale=SCALE, mask=None):
    """The formula in the operands' own dtype, with an explicit mask."""
    dropped = x if mask is None else x * mask
    return nn.functional.linear(x, weight, bias) + scale * (dropped @ a.T) @ b.T


def gradients(function, inputs, dy=None):
    y = function(*inputs)
    wanted = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape) if dy is None else dy
    return [y, *torch.autograd.grad(y, wanted, dy)]


def in_double(tensors):
    return tuple(t.detach().double().requires_grad_(t.requires_grad) for t in tensors)


# --- the formula ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(), (1,), (13,), (2, 5), (2, 3, 5), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_output_and_gradients_match_float64(lead, dtype):
    tensors = operands(3, dtype=dtype)
    tensors = (torch.randn(*lead, 17, dtype=dtype, requires_grad=True), *tensors[1:])
    ours, peer = gradients(lambda *t: lora_linear(*t, SCALE), tensors), gradients(plain, tensors)
    for out, other, reference in zip(ours, peer, gradients(plain, in_double(tensors)), strict=True):
        assert out.dtype == dtype
        assert out.shape == reference.shape
        # fp16 products of one token lose more than storage rounding in torch itself
        assert relative_error(out, reference) <= max(2 * TOLERANCE[dtype], 1.1 * relative_error(other, reference))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("trained", ["xab", "xa", "xb", "ab", "a", "b", "xwcab", "wc"])
def test_gradcheck_in_double(dropout_p, trained):
    tensors = operands(7, in_features=5, out_features=6, dtype=torch.float64)
    for name, tensor in zip("xwcab", tensors, strict=True):
        tensor.requires_grad_(name in trained)

    def replayed(*tensors):
        torch.manual_seed(3)
        return lora_linear(*tensors, SCALE, dropout_p)

    assert torch.autograd.gradcheck(replayed, tensors)


def test_no_bias_is_a_bias_of_zeros():
    x, weight, bias, a, b = operands()
    assert torch.equal(lora_linear(x, weight, None, a, b, SCALE), lora_linear(x, weight, bias * 0, a, b, SCALE))


def test_fp32_adapters_on_a_bf16_base_get_fp32_gradients_nearer_to_float64_than_bf16_adapters():
    tensors = operands(512, in_features=96, out_features=64, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    low = tuple(t.detach().bfloat16().requires_grad_(t.requires_grad) for t in tensors)
    dy = torch.randn(512, 64).bfloat16()
    exact = gradients(plain, in_double(tensors), dy.double())
    ours, theirs = gradients(lambda *t: lora_linear(*t, SCALE), tensors, dy), gradients(plain, low, dy)
    frozen = nn.functional.linear(*in_double(tensors)[:3])
    for series in (ours, theirs, exact):
        series[0] = series[0].double() - frozen  # the update: rounding of the output itself would hide its error
    assert ours[2].dtype == ours[3].dtype == torch.float32
    for out, other, reference in zip(ours, theirs, exact, strict=True):
        assert relative_error(out, reference) < relative_error(other, reference)


def test_strided_inputs_are_read_in_place_and_give_the_same_result():
    x, weight, bias, a, b = operands(6, 4)
    strided = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    conv1d_weight = weight.T.contiguous()  # GPT-2 keeps [in_features, out_features]
    assert not strided.is_contiguous()
    ours = gradients(lambda *t: lora_linear(t[0], conv1d_weight.T, bias, t[1], t[2], SCALE), (strided, a, b))
    same = gradients(lambda *t: lora_linear(t[0], weight, bias, t[1], t[2], SCALE), (x, a, b))
    for left, right in zip(ours, same, strict=True):
        assert relative_error(left, right) <= 1e-6
    kept = kept_tensors(lambda: lora_linear(strided, conv1d_weight.T, bias, a, b, SCALE))
    assert {t.data_ptr() for t in kept} <= {t.data_ptr() for t in (strided, conv1d_weight, a, b)}


def test_in_place_operators_may_follow():
    x, weight, bias, a, b = operands()
    y = lora_linear(x, weight, bias, a, b, SCALE)
    y += 1
    y.relu_().sum().backward()
    reference = torch.autograd.grad((plain(x, weight, bias, a, b) + 1).relu().sum(), a)[0]
    assert relative_error(a.grad, reference) <= TOLERANCE[torch.float32]


# --- dropout -------------------------------------------------------------------------------------------------------


def test_one_mask_serves_the_output_and_every_gradient():
    x, weight, bias, a, b = operands(11, in_features=9, dtype=torch.float64)
    p = 0.4
    eye, ones = torch.eye(9, dtype=torch.float64), torch.ones_like(x)
    torch.manual_seed(5)
    mask = lora_linear(ones, eye * 0, None, eye, eye, 1.0, p)  # A = B = I shows the scaled mask
    assert 0 < (mask == 0).sum() < mask.numel()
    torch.manual_seed(5)
    ours = gradients(lambda *t: lora_linear(*t, SCALE, p), (x, weight, bias, a, b))
    exact = gradients(lambda *t: plain(*t, mask=mask), (x, weight, bias, a, b))
    for out, reference in zip(ours, exact, strict=True):
        assert relative_error(out, reference) <= TOLERANCE[torch.float64]


def test_dx_is_zero_exactly_where_x_was_dropped_if_the_base_weight_is_zero():
    x, weight, _, a, b = operands(11, in_features=9)
    eye = torch.eye(9)
    torch.manual_seed(5)
    mask = lora_linear(torch.ones(11, 9), eye * 0, None, eye, eye, 1.0, 0.4)
    torch.manual_seed(5)
    lora_linear(x, weight * 0, None, a, b, SCALE, 0.4).sum().backward()
    assert torch.equal(x.grad == 0, mask == 0)


def test_manual_seed_replays_the_mask_and_calls_differ():
    tensors = operands()
    torch.manual_seed(1)
    first, second = lora_linear(*tensors, SCALE, 0.5), lora_linear(*tensors, SCALE, 0.5)
    torch.manual_seed(1)
    assert torch.equal(first, lora_linear(*tensors, SCALE, 0.5))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_replays_the_mask(use_reentrant):
    tensors = operands()
    torch.manual_seed(2)
    direct = gradients(lambda *t: lora_linear(*t, SCALE, 0.5), tensors)
    torch.manual_seed(2)
    y = checkpoint(lambda *t: lora_linear(*t, SCALE, 0.5), *tensors, use_reentrant=use_reentrant)
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
    for out, reference in zip((y, tensors[0].grad, tensors[3].grad, tensors[4].grad), direct, strict=True):
        assert torch.equal(out, reference)


# --- what is kept for backward -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_only_x_itself_is_kept(dropout_p):
    x, weight, bias, a, b = operands(2, 9)
    kept = kept_tensors(lambda: lora_linear(x, weight, bias, a, b, SCALE, dropout_p))
    own = {t.data_ptr() for t in (x, weight, a, b)}
    assert x.data_ptr() in {t.data_ptr() for t in kept}
    assert sum(t.nbytes for t in kept if t.data_ptr() not in own) <= 8  # the seed


def test_autocast_keeps_the_fp32_input_and_no_copy_of_it():
    x, weight, bias, a, b = operands()
    with torch.autocast("cpu", torch.bfloat16):
        kept = kept_tensors(lambda: lora_linear(x, weight, bias, a, b, SCALE))
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (x, weight, a, b)}


def test_a_frozen_down_projection_keeps_the_rank_sized_product_and_not_x():
    x, weight, bias, a, b = operands(50)
    a.requires_grad_(False)
    kept = kept_tensors(lambda: lora_linear(x, weight, bias, a, b, SCALE, 0.5))
    assert x.data_ptr() not in {t.data_ptr() for t in kept}
    assert (
        max(t.nbytes for t in kept if t.data_ptr() not in {weight.data_ptr(), a.data_ptr(), b.data_ptr()})
        == 50 * 3 * 4
    )


def test_nothing_is_kept_without_gradients():
    with torch.no_grad():
        assert kept_tensors(lambda: lora_linear(*operands(), SCALE, 0.5)) == []


# --- torch's own machinery -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_linear_does(dtype):
    x, weight, bias, a, b = operands(9)
    with torch.autocast("cpu", dtype):
        y = lora_linear(x, weight, bias, a, b, SCALE)
        assert y.dtype == nn.functional.linear(x, weight, bias).dtype == dtype
        assert lora_linear(x.to(dtype), weight, bias, a, b, SCALE).dtype == dtype  # what an outer layer has cast
        assert lora_linear(x.double(), weight.double(), None, a, b, SCALE).dtype == torch.float64
    y.float().sum().backward()
    assert x.grad.dtype == a.grad.dtype == b.grad.dtype == torch.float32
    exact = gradients(plain, (x, weight, bias, a, b), torch.ones(9, 23))
    for out, reference in zip((y, x.grad, a.grad, b.grad), exact, strict=True):
        assert relative_error(out, reference) <= 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_ops_pass_opcheck(dropout_p):
    x, weight, bias, a, b = operands()
    seed = torch.tensor([5]) if dropout_p else None
    torch.library.opcheck(
        OPS.lora_linear_forward.default, (x, weight, bias, a, b, SCALE, dropout_p, seed, torch.float32)
    )
    x, a, b = x.detach(), a.detach(), b.detach()
    y, s = OPS.lora_linear_forward(x, weight, bias, a, b, SCALE, dropout_p, seed, torch.float32)
    for kept_s, needs in ((s, [True, True, True]), (None, [False, True, True]), (s, [True, False, False])):
        arguments = (y, x, kept_s, weight, a, b, SCALE, dropout_p, seed, needs)
        torch.library.opcheck(OPS.lora_linear_backward.default, arguments)


@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_into_one_graph(autocast):
    tensors = operands(2, 5)

    def step(*tensors):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return lora_linear(*tensors, SCALE).float()

    compiled = gradients(torch.compile(step, backend="aot_eager", fullgraph=True), tensors)
    for out, reference in zip(compiled, gradients(step, tensors), strict=True):
        assert relative_error(out, reference) <= 1e-6


def test_torch_func_differentiates_it_twice_and_per_sample():
    x, weight, bias, a, b = (t.detach() for t in operands(dtype=torch.float64))

    def loss(function, a, x):
        return function(x, weight, bias, a, b, SCALE).square().sum()

    for transform in (torch.func.hessian, lambda f: torch.func.vmap(torch.func.grad(f), in_dims=(None, 0))):
        ours, exact = (transform(partial(loss, function))(a, x) for function in (lora_linear, plain))
        assert relative_error(ours, exact) <= TOLERANCE[torch.float64]


def test_torch_func_gives_each_sample_its_own_mask():
    x, weight, bias, a, b = (t.detach() for t in operands())
    once = torch.func.vmap(lambda x: lora_linear(x, weight, bias, a, b, SCALE, 0.5), randomness="different")
    assert (once(x[:1].expand(50, -1)).std(0) > 0).all()


def test_meta_tensors_give_shapes():
    tensors = [t.detach().to("meta") for t in operands(2, 5, adapter_dtype=torch.float32)]
    y = lora_linear(*tensors, SCALE, 0.1)
    assert (y.shape, y.device.type) == ((2, 5, 23), "meta")


def test_flops_count_the_base_and_the_low_rank_products():
    x, weight, bias, a, b = operands(13)
    with FlopCounterMode(display=False) as counter:
        y = lora_linear(x, weight, bias, a, b, SCALE)
    forward = counter.get_total_flops()
    assert forward == 2 * 13 * (17 * 23 + 3 * (17 + 23))
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == forward + 2 * 13 * 3 * (17 + 17 + 23)  # dA, dB and s once more


# --- errors --------------------------------------------------------------------------------------------------------


def test_a_second_derivative_is_refused_and_not_lost():
    x, weight, bias, a, b = operands()
    first = torch.autograd.grad(lora_linear(x, weight, bias, a, b, SCALE).sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"second derivative.*use peft\.LoraConfig"):
        first.square().sum().backward()


@pytest.mark.parametrize(
    ("field", "shape"),
    [
        ("x", (4, 16)),
        ("weight", (23, 16)),
        ("bias", (22,)),
        ("a", (3, 18)),
        ("a", (2, 17)),
        ("b", (22, 3)),
        ("b", (23, 4)),
        ("x", ()),
    ],
    ids=str,
)
def test_shapes_that_disagree_are_named(field, shape):
    tensors = dict(zip(("x", "weight", "bias", "a", "b"), operands(4), strict=True)) | {field: torch.randn(shape)}
    with pytest.raises(ValueError, match=rf"{field}\W+\(.*do not fit") as error:
        lora_linear(*tensors.values(), SCALE)
    assert str(tuple(shape)) in str(error.value)


@pytest.mark.parametrize("dropout_p", [-0.1, 1.0, float("nan")])
def test_dropout_out_of_range_is_refused(dropout_p):
    with pytest.raises(ValueError, match=r"dropout_p=.* is not in \[0, 1\)"):
        lora_linear(*operands(), SCALE, dropout_p)


def test_dtypes_that_disagree_are_refused_outside_of_autocast():
    x, weight, bias, a, b = operands()
    with pytest.raises(
        ValueError, match=r"x \(13, 17\) torch.float32 cpu, weight \(23, 17\) torch.bfloat16.*autocast"
    ):
        lora_linear(x, weight.bfloat16(), bias.bfloat16(), a, b, SCALE)


@pytest.mark.parametrize("moved", range(5))
def test_devices_that_disagree_are_named(moved):
    tensors = list(operands())
    tensors[moved] = tensors[moved].detach().to("meta")
    with pytest.raises(ValueError, match=r"cpu.*are not on one device; move the model"):
        lora_linear(*tensors, SCALE)
