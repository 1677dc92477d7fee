"""`lora_linear` on its Triton kernels, forward and backward, against the formula in float64."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from petune.kernels.dropout import mask_of, philox_lanes
from petune.kernels.lora_linear import gemm, kernel, lora_linear, skinny
from tests.conftest import TOLERANCE, relative_error

SCALE = 1.5
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _triton_or_an_error(monkeypatch):
    monkeypatch.setenv("PETUNE_KERNELS", "triton")


def tolerance(dtype: torch.dtype) -> float:
    # s and the low-rank term are each rounded once to the storage dtype; the interpreter truncates to bf16
    return TOLERANCE[dtype] * (4 if dtype == torch.bfloat16 else 2)


def operands(tokens, device, *, in_features=40, out_features=36, rank=5, dtype=torch.float32, adapter_dtype=None):
    def draw(*shape, dtype=dtype, trained=False):
        return torch.randn(*shape, device=device).to(dtype).requires_grad_(trained)

    x = draw(tokens, in_features, trained=True)
    weight, bias = draw(out_features, in_features), draw(out_features)
    a = draw(rank, in_features, dtype=adapter_dtype or dtype, trained=True)
    b = draw(out_features, rank, dtype=adapter_dtype or dtype, trained=True)
    return x, weight, bias, a, b


def exact(tensors, dy: Tensor, mask: Tensor | float = 1.0, rank_mask: Tensor | float = 1.0) -> list[Tensor]:
    """The update y - x Wᵀ - bias, then dx - dy W, dA and dB, in float64."""
    x, _, _, a, b = (t.detach().double().requires_grad_(t.requires_grad) for t in tensors)
    update = SCALE * (((x * mask) @ a.T) * rank_mask) @ b.T
    return [update, *torch.autograd.grad(update, (x, a, b), dy.double())]


def ours(tensors, dy: Tensor, dropout_p: float = 0.0, rank_mask: Tensor | None = None, seed: int = 0) -> list[Tensor]:
    x, weight, bias, a, b = tensors
    torch.manual_seed(seed)
    y = lora_linear(*tensors, SCALE, dropout_p, rank_mask)
    dx, da, db = torch.autograd.grad(y, (x, a, b), dy)
    # rounding of y and dx would hide a broken update: what the base contributes is taken away
    base = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    return [y.double() - base, dx.double() - dy.double() @ weight.double(), da, db]


def drawn_mask(tokens: int, features: int, dropout_p: float, device, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    mask = mask_of(dropout_p, torch.randint(2**63 - 1, (1,), device=device))
    assert mask is not None
    return philox_lanes(tokens, features, mask.seed).ge(mask.threshold) / mask.keep_probability


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32], ids=["same", "fp32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_update_and_every_gradient_match_float64(dtype, adapter_dtype, dropout_p, device):
    tensors = operands(23, device, dtype=dtype, adapter_dtype=adapter_dtype)
    dy = torch.randn(23, 36, device=device).to(dtype)
    mask = drawn_mask(23, 40, dropout_p, device) if dropout_p else 1.0
    for out, reference, trained in zip(
        ours(tensors, dy, dropout_p), exact(tensors, dy, mask), (None, None, *tensors[3:]), strict=True
    ):
        # an update is about as large as the frozen output here, so that the output's own rounding counts once more
        assert relative_error(out, reference) <= 2 * tolerance(dtype)
        if trained is not None:
            assert out.dtype == trained.dtype


@pytest.mark.parametrize("keep_s", [True, False], ids=["s kept", "s again"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mask_between_a_and_b_is_in_the_update_and_in_every_gradient(dtype, dropout_p, keep_s, device):
    tensors = operands(23, device, dtype=dtype, adapter_dtype=torch.float32)
    dy = torch.randn(23, 36, device=device).to(dtype)
    mask = drawn_mask(23, 40, dropout_p, device) if dropout_p else 1.0
    rank_mask = torch.empty(23, 5, device=device).bernoulli_(0.75) / 0.75
    found = ours(tensors, dy, dropout_p, rank_mask)
    if keep_s:  # a CPU makes s again, a GPU keeps it
        x, weight, bias, a, b = (t.detach() for t in tensors)
        torch.manual_seed(0)
        seed = torch.randint(2**63 - 1, (1,), device=device) if dropout_p else None
        _, s = kernel.forward(x, weight, bias, a, b, SCALE, dropout_p, seed, dtype, rank_mask)
        needs = (False, False, True)
        found[3] = kernel.backward(dy, None, s, weight, a, b, SCALE, dropout_p, seed, needs, rank_mask)[2]
    for out, reference in zip(found, exact(tensors, dy, mask, rank_mask), strict=True):
        assert relative_error(out, reference) <= 2 * tolerance(dtype)


@pytest.mark.parametrize("tokens", [0, 1, 2, 17])
@pytest.mark.parametrize("rank", [1, 16, 33])
def test_any_number_of_tokens_and_any_rank(tokens, rank, device):
    tensors = operands(tokens, device, rank=rank)
    dy = torch.randn(tokens, 36, device=device)
    for out, reference in zip(ours(tensors, dy), exact(tensors, dy), strict=True):
        assert relative_error(out, reference) <= 4 * tolerance(torch.float32)


@pytest.mark.parametrize("trained", ["x", "a", "b", "xa", "xb", "ab"])
def test_each_subset_of_gradients_is_the_same_as_all_of_them(trained, device):
    tensors = operands(9, device)
    dy = torch.randn(9, 36, device=device)
    names = dict(zip("xwcab", tensors, strict=True))
    torch.manual_seed(1)
    whole = torch.autograd.grad(lora_linear(*tensors, SCALE, 0.3), [names[n] for n in trained], dy)
    for name, tensor in names.items():
        tensor.requires_grad_(name in trained)
    torch.manual_seed(1)
    part = torch.autograd.grad(lora_linear(*tensors, SCALE, 0.3), [names[n] for n in trained], dy)
    for out, reference in zip(part, whole, strict=True):
        assert relative_error(out, reference) <= TOLERANCE[torch.float32]


def test_conv1d_weights_and_strided_inputs_give_the_same_result(device):
    x, weight, bias, a, b = operands(12, device)
    strided = x.detach().T.contiguous().T.requires_grad_()
    conv1d_weight = weight.T.contiguous()
    same = lora_linear(strided, conv1d_weight.T, bias, a.detach().T.contiguous().T, b, SCALE)
    reference = lora_linear(x, weight, bias, a, b, SCALE)
    assert relative_error(same, reference) <= TOLERANCE[torch.float32]
    same.sum().backward()  # an expanded dy: both strides are zero
    expected = exact((x, weight, bias, a, b), torch.ones(12, 36, device=device))[1]
    assert relative_error(strided.grad.double() - weight.double().sum(0), expected) <= 2 * tolerance(torch.float32)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_replays_the_mask(use_reentrant, device):
    tensors = operands(9, device)
    direct = ours(tensors, torch.ones(9, 36, device=device), 0.5)
    torch.manual_seed(0)
    y = checkpoint(lambda *t: lora_linear(*t, SCALE, 0.5), *tensors, use_reentrant=use_reentrant)
    y.sum().backward()
    assert relative_error(tensors[3].grad, direct[2]) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_every_variant_of_the_product_gives_the_same_update(dropout_p, device):
    dtype = torch.float16  # fp32 has no fused variant
    x, weight, bias, a, b = (t.detach() for t in operands(20, device, in_features=64, out_features=48, dtype=dtype))
    mask = mask_of(dropout_p, torch.tensor([7], device=device) if dropout_p else None)
    dy, ds = torch.randn(20, 48, device=device).to(dtype), torch.randn(20, 5, device=device).to(dtype)
    s = skinny.shrink(x, a)
    forward = kernel.variants(x, weight, s, b, SCALE, bias, None)
    backward = kernel.variants(dy, weight.T, ds, a.T, 1.0, None, mask)
    assert len(forward) >= 2 + len({c.form for c in gemm.configs(dtype, 16, (9, 0))})
    kept = torch.ones_like(x) if mask is None else philox_lanes(20, 64, mask.seed).ge(mask.threshold)
    update = SCALE * s.double() @ b.double().T
    update_back = kept * (ds.double() @ a.double())
    for name, call in forward.items():
        out = call().double() - x.double() @ weight.double().T - bias.double()
        assert relative_error(out, update) <= 2 * tolerance(dtype), name
    for name, call in backward.items():
        out = call().double() - dy.double() @ weight.double()
        assert relative_error(out, update_back) <= 2 * tolerance(dtype), name


def test_non_finite_values_pass_through(device):
    x, weight, bias, a, b = (t.detach() for t in operands(6, device))
    x[2, 3] = float("nan")
    x[4, 1] = float("inf")
    y = lora_linear(x, weight, bias, a, b, SCALE)
    assert y[2].isnan().all()
    assert not y[4].isfinite().any()
    assert y[[0, 1, 3, 5]].isfinite().all()


def test_ranks_and_dtypes_beyond_the_kernels_are_an_error_that_says_why(device):
    with pytest.raises(
        RuntimeError, match=r"PETUNE_KERNELS=triton, but lora_linear cannot run .*: rank 257 is above 256"
    ):
        lora_linear(*operands(3, device, rank=257), SCALE)
    with pytest.raises(RuntimeError, match=r"torch.float64 is none of torch.float32"):
        lora_linear(*operands(3, device, dtype=torch.float64), SCALE)


def test_the_output_may_be_written_into(device):
    tensors = operands(6, device)
    y = lora_linear(tensors[0].view(2, 3, -1), *tensors[1:], SCALE)
    expected = torch.autograd.grad(lora_linear(*tensors, SCALE).sum(), tensors[3:])
    y += 1  # as models do that add to their residual stream in place
    assert [a.equal(b) for a, b in zip(torch.autograd.grad(y.sum(), tensors[3:]), expected, strict=True)] == [True] * 2
