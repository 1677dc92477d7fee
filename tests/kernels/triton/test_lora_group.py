"""`lora_group` on Triton, forward and backward, against float64 with the mask that its kernels make."""

import pytest
import torch

from petune.kernels.dropout import mask_of, philox_lanes
from petune.kernels.lora_group import lora_group
from tests.conftest import TOLERANCE, relative_error
from tests.kernels.operands import gradients, in_double
from tests.kernels.test_lora_group import IN_FEATURES, columns, group, operands, plain

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def _triton_or_an_error(monkeypatch):
    monkeypatch.setenv("PETUNE_KERNELS", "triton")


def tolerance(dtype: torch.dtype) -> float:
    # s, and each term of a sum, is rounded on its way; the interpreter truncates to bf16
    return TOLERANCE[dtype] * (4 if dtype == torch.bfloat16 else 2)


def drawn_mask(tokens: int, dropout_p: float, device, seed: int = 3):
    """What the next group's mask is after this seed, over its mean."""
    torch.manual_seed(seed)
    mask = mask_of(dropout_p, torch.randint(2**63 - 1, (1,), device=device))
    assert mask is not None
    return philox_lanes(tokens, IN_FEATURES, mask.seed).ge(mask.threshold).double() / mask.keep_probability


@DTYPES
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32], ids=["same", "fp32"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_outputs_and_gradients_match_float64(dtype, adapter_dtype, dropout_p, device):
    tensors = operands(11, dtype=dtype, adapter_dtype=adapter_dtype)
    mask = drawn_mask(11, dropout_p, device) if dropout_p else None
    torch.manual_seed(3)
    result = gradients(lambda *t: group(*t, dropout_p=dropout_p), tensors)
    exact = gradients(lambda *t: plain(*t, mask=mask), in_double(tensors))
    for out, reference in zip(result, exact, strict=True):
        assert relative_error(out, reference) <= tolerance(dtype)
    assert [g.dtype for g in result[3:]] == [t.dtype for t in tensors if t.requires_grad]


def test_updates_match_float64_beneath_the_frozen_products(device):
    tensors = operands(11)
    ys, exact = group(*tensors), plain(*in_double(tensors))
    x, weights, biases = tensors[0], *columns(tensors[1:])[:2]
    for y, reference, weight, bias in zip(ys, exact, weights, biases, strict=True):
        frozen = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
        assert relative_error(y.double() - frozen, reference - frozen) <= tolerance(torch.float32)


@pytest.mark.parametrize("lead", [(1,), (2, 5), (0,), (2, 0)], ids=str)
def test_any_number_of_tokens(lead, device):
    tensors = operands(*lead)
    for out, reference in zip(gradients(group, tensors), gradients(plain, in_double(tensors)), strict=True):
        assert out.shape == reference.shape
        assert relative_error(out, reference) <= tolerance(torch.float32)


@pytest.mark.parametrize(
    "sizes", [((7, 1), (9, 33)), ((5, 16), (6, 16), (8, 16), (4, 16)), ((3, 7), (40, 9), (1, 40))], ids=str
)
def test_ranks_that_differ_within_the_group(sizes, device):
    tensors = operands(9, sizes=sizes)
    scales = (1.5, 0.5, 2.0, 0.25)[: len(sizes)]

    def ours(x, *flat):
        return lora_group(x, *columns(flat), scales)

    def formula(x, *flat):
        return tuple(x @ w.T + c + s * (x @ a.T) @ b.T for w, c, a, b, s in zip(*columns(flat), scales, strict=True))

    for out, reference in zip(gradients(ours, tensors), gradients(formula, in_double(tensors)), strict=True):
        assert relative_error(out, reference) <= 2 * tolerance(torch.float32)


@pytest.mark.parametrize("layout", ["odd", "columns", "strided"])
def test_an_x_in_any_layout_between_its_guard_bands(layout, device, guarded):
    tensors = operands(9)
    reference = gradients(plain, in_double(tensors))
    tensors[0] = guarded((9, IN_FEATURES), torch.float32, layout, tensors[0].detach()).requires_grad_()
    before = tensors[0].detach().clone()
    for out, exact in zip(gradients(group, tensors), reference, strict=True):
        assert relative_error(out, exact) <= tolerance(torch.float32)
    assert torch.equal(tensors[0], before)  # dx went to a buffer of its own


@pytest.mark.parametrize("trained", [(0,), (7,), (11,), (8, 10), (0, 12), (7, 9, 11)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_each_subset_of_gradients_is_that_of_the_formula(trained, dropout_p, device):
    tensors = [t.detach().requires_grad_(i in trained) for i, t in enumerate(operands(6))]
    mask = drawn_mask(6, dropout_p, device) if dropout_p else None
    torch.manual_seed(3)
    result = [y for y in group(*tensors, dropout_p=dropout_p) if y.requires_grad]
    exact = [y for y in plain(*in_double(tensors), mask=mask) if y.requires_grad]
    assert len(result) >= len(exact)
    wide = in_double(tensors)
    wanted = [i for i, t in enumerate(tensors) if t.requires_grad]
    left = torch.autograd.grad(sum(y.square().sum() for y in result), [tensors[i] for i in wanted])
    exact = sum(y.square().sum() for y in plain(*wide, mask=mask))
    right = torch.autograd.grad(exact, [wide[i] for i in wanted])
    for out, reference in zip(left, right, strict=True):
        assert relative_error(out, reference) <= tolerance(torch.float32)


@pytest.mark.parametrize("used", [(0,), (1, 2)], ids=str)
def test_an_unused_output_contributes_nothing(used, device):
    tensors = operands(7)
    wanted = [t for t in tensors if t.requires_grad]
    wide = in_double(tensors)
    wide_wanted = [t for t in wide if t.requires_grad]
    left = torch.autograd.grad(sum(group(*tensors)[i].sum() for i in used), wanted, allow_unused=True)
    right = torch.autograd.grad(sum(plain(*wide)[i].sum() for i in used), wide_wanted, allow_unused=True)
    for out, reference in zip(left, right, strict=True):
        assert (out is None) == (reference is None)
        assert out is None or relative_error(out, reference) <= tolerance(torch.float32)


def test_the_kept_s_gives_the_same_gradients_as_one_made_again(device):
    from petune.kernels.lora_group import kernel

    x, *flat = (t.detach() for t in operands(9))
    weights, biases, a, b = columns(flat)
    seed, scales = torch.tensor([5], device=device), (1.5, 0.5, 2.0)
    *ys, s = kernel.forward(x, weights, biases, a, b, scales, 0.4, seed, torch.float32)
    parts = s.split([3, 5, 2], dim=1)
    kept, made = (
        kernel.backward(torch.cat(a), x, part, ys, weights, b, scales, 0.4, seed, [True] * 5) for part in (parts, ())
    )
    assert all(torch.equal(*pair) for pair in zip(kept, made, strict=True))


def test_the_sum_of_the_ranks_is_what_must_fit(device):
    tensors = operands(3, sizes=((5, 200), (6, 57)))
    with pytest.raises(RuntimeError, match=r"lora_group cannot run on Triton: rank 257 is above 256"):
        group(*tensors)
