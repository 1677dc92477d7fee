"""`lora_linear` with a mask between A and B: its gradients, what it keeps for backward, and its errors."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from petune.kernels.lora_linear import lora_linear
from tests.conftest import TOLERANCE, relative_error
from tests.kernels.operands import fixed_dy, gradients, in_double, kept_tensors

OPS = torch.ops.petune
SCALE = 1.5
KEEP = 0.75


def operands(*lead: int, in_features=17, out_features=23, rank=3, dtype=torch.float32, adapter_dtype=None):
    """x, weight, bias, a, b of odd sizes, with an update about as large as the frozen output."""
    adapter_dtype = adapter_dtype or dtype
    x = torch.randn(*lead, in_features, dtype=dtype, requires_grad=True)
    weight, bias = torch.randn(out_features, in_features, dtype=dtype), torch.randn(out_features, dtype=dtype)
    a = torch.randn(rank, in_features, dtype=adapter_dtype, requires_grad=True)
    b = torch.randn(out_features, rank, dtype=adapter_dtype, requires_grad=True)
    return x, weight, bias, a, b


def drawn(x: Tensor, a: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """0 or 1/keep, [tokens, rank], from the default generator; every value is exact in every dtype but 1/keep."""
    mask = torch.empty(x.shape[:-1].numel(), a.shape[0], dtype=dtype, device=x.device)
    return mask.bernoulli_(KEEP).div_(KEEP)


def plain(x, weight, bias, a, b, rank_mask, input_mask=1.0):
    """The formula in the operands' own dtype."""
    s = ((x * input_mask) @ a.T) * rank_mask.to(a.dtype).view(*x.shape[:-1], a.shape[0])
    return nn.functional.linear(x, weight, bias) + SCALE * s @ b.T


def ours(x, weight, bias, a, b, rank_mask, dropout_p=0.0):
    return lora_linear(x, weight, bias, a, b, SCALE, dropout_p, rank_mask)


@pytest.mark.parametrize("lead", [(), (1,), (13,), (2, 5), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32], ids=["same", "fp32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_output_and_gradients_match_float64(lead, adapter_dtype, dtype):
    tensors = operands(*lead, dtype=dtype, adapter_dtype=adapter_dtype)
    mask = drawn(tensors[0], tensors[3])
    exact = gradients(plain, (*in_double(tensors), mask.double()))
    for out, reference in zip(gradients(ours, (*tensors, mask)), exact, strict=True):
        assert out.shape == reference.shape
        assert relative_error(out, reference) <= 3 * TOLERANCE[dtype]  # s, ds and the output are each rounded


def test_a_dropped_element_of_s_reaches_neither_the_output_nor_a_gradient():
    x, weight, bias, a, b = operands(5)
    mask = torch.ones(5, 3)
    mask[:, 1] = 0
    mask[2] = 0
    y, dx, da, db = gradients(ours, (x, weight, bias, a, b, mask))
    assert relative_error(y[2], nn.functional.linear(x[2], weight, bias)) <= 1e-6
    assert relative_error(dx[2], fixed_dy(y)[2] @ weight) <= 1e-6
    assert torch.equal(da[1], torch.zeros(17))
    assert torch.equal(db[:, 1], torch.zeros(23))
    assert da[0].count_nonzero() == 17
    assert db[:, 2].count_nonzero() == 23


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("trained", ["xab", "xa", "xb", "ab", "a", "b", "xwcab", "wc"])
def test_gradcheck_in_double(dropout_p, trained):
    tensors = operands(7, in_features=5, out_features=6, dtype=torch.float64)
    mask = drawn(tensors[0], tensors[3], torch.float64)
    for name, tensor in zip("xwcab", tensors, strict=True):
        tensor.requires_grad_(name in trained)

    def replayed(*tensors):
        torch.manual_seed(3)
        return ours(*tensors, mask, dropout_p)

    assert torch.autograd.gradcheck(replayed, tensors)


def test_the_masks_of_x_and_of_s_are_two():
    x, weight, bias, a, b = operands(11, in_features=9, dtype=torch.float64)
    rank_mask, eye = drawn(x, a, torch.float64), torch.eye(9, dtype=torch.float64)
    torch.manual_seed(5)
    input_mask = lora_linear(torch.ones_like(x), eye * 0, None, eye, eye, 1.0, 0.4)  # A = B = I shows the scaled mask
    torch.manual_seed(5)
    found = gradients(lambda *t: ours(*t, 0.4), (x, weight, bias, a, b, rank_mask))
    exact = gradients(lambda *t: plain(*t, input_mask), (x, weight, bias, a, b, rank_mask))
    for out, reference in zip(found, exact, strict=True):
        assert relative_error(out, reference) <= TOLERANCE[torch.float64]


def test_a_mask_of_ones_changes_no_bit():
    tensors = operands(2, 9)
    with_mask, without = gradients(ours, (*tensors, torch.ones(18, 3))), gradients(ours, (*tensors, None))
    assert all(torch.equal(left, right) for left, right in zip(with_mask, without, strict=True))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_a_mask_drawn_inside_is_replayed_by_activation_checkpointing(use_reentrant, dropout_p):
    def layer(*tensors):
        return ours(*tensors, drawn(tensors[0], tensors[3]), dropout_p)

    tensors = operands(13)
    torch.manual_seed(2)
    direct = gradients(layer, tensors)
    torch.manual_seed(2)
    y = checkpoint(layer, *tensors, use_reentrant=use_reentrant)
    y.backward(fixed_dy(y))
    for out, reference in zip((y, tensors[0].grad, tensors[3].grad, tensors[4].grad), direct, strict=True):
        assert torch.equal(out, reference)


# --- what is kept for backward -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_the_mask_is_all_that_is_kept_more(dropout_p):
    x, weight, bias, a, b = operands(2, 9)
    mask = drawn(x, a)
    kept = {t.data_ptr(): t.nbytes for t in kept_tensors(lambda: ours(x, weight, bias, a, b, mask, dropout_p))}
    without = kept_tensors(lambda: ours(x, weight, bias, a, b, None, dropout_p))
    assert kept[mask.data_ptr()] == 18 * 3 * 4
    assert sum(kept.values()) - mask.nbytes == sum(t.nbytes for t in without)


def test_a_frozen_down_projection_keeps_s_and_the_mask_and_not_x():
    x, weight, bias, a, b = operands(50)
    a.requires_grad_(False)
    mask = drawn(x, a)
    kept = {t.data_ptr(): t for t in kept_tensors(lambda: ours(x, weight, bias, a, b, mask, 0.5))}
    own = {t.data_ptr() for t in (weight, a, b, mask)}
    assert x.data_ptr() not in kept
    assert sorted(t.nbytes for pointer, t in kept.items() if pointer not in own) == [8, 50 * 3 * 4]  # the seed and s


# --- torch's own machinery -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_ops_pass_opcheck(dropout_p):
    x, weight, bias, a, b = operands(13)
    mask, seed = drawn(x, a), torch.tensor([5]) if dropout_p else None
    options = (SCALE, dropout_p, seed, torch.float32, mask)
    torch.library.opcheck(OPS.lora_linear_forward.default, (x, weight, bias, a, b, *options))
    x, a, b = x.detach(), a.detach(), b.detach()
    y, s = OPS.lora_linear_forward(x, weight, bias, a, b, *options)
    for kept_s, needs in ((s, [True, True, True]), (None, [False, True, True]), (s, [True, False, False])):
        arguments = (y, x, kept_s, weight, a, b, SCALE, dropout_p, seed, needs, mask)
        torch.library.opcheck(OPS.lora_linear_backward.default, arguments)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_compiles_into_one_graph(dtype):
    tensors = operands(2, 5)
    inputs = (*tensors, drawn(tensors[0], tensors[3]))

    def step(*inputs):
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            return ours(*inputs).float()

    compiled = gradients(torch.compile(step, backend="aot_eager", fullgraph=True), inputs)
    for out, reference in zip(compiled, gradients(step, inputs), strict=True):
        assert relative_error(out, reference) <= 1e-6


def test_torch_func_differentiates_it_twice_and_per_sample():
    x, weight, bias, a, b = (t.detach() for t in operands(4, 5, dtype=torch.float64))
    masks = torch.stack([drawn(x[0], a, torch.float64) for _ in range(4)])

    def hessian(function):
        return torch.func.hessian(lambda a: function(x[0], weight, bias, a, b, masks[0]).square().sum())(a)

    def per_sample(function):
        return torch.func.vmap(lambda x, mask: function(x, weight, bias, a, b, mask))(x, masks)

    for transform in (hessian, per_sample):
        assert relative_error(transform(ours), transform(plain)) <= TOLERANCE[torch.float64]


def test_meta_tensors_give_shapes():
    tensors = [t.detach().to("meta") for t in operands(2, 5)]
    assert ours(*tensors, torch.ones(10, 3, device="meta"), 0.1).shape == (2, 5, 23)


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mask",
    [torch.ones(10, 4), torch.ones(9, 3), torch.ones(2, 5, 3), torch.ones(10, 3).bool(), torch.ones(10, 3).to("meta")],
    ids=lambda mask: f"{tuple(mask.shape)} {mask.dtype} {mask.device}",
)
def test_a_mask_that_does_not_fit_is_named(mask):
    tensors = operands(2, 5)
    with pytest.raises(
        ValueError, match=r"lora_linear: x \(2, 5, 17\).*rank_mask \(.*pass a .*\[10, 3\] on the device"
    ):
        ours(*tensors, mask)


def test_a_mask_that_asks_for_a_gradient_is_refused_and_its_gradient_not_lost():
    with pytest.raises(ValueError, match=r"rank_mask asks for a gradient.*pass rank_mask\.detach\(\)"):
        ours(*operands(4), torch.ones(4, 3, requires_grad=True))
