"""The gate's kernels, and `gated_lora` on Triton forward and backward, against float64."""

import pytest
import torch

from petune.kernels.dropout import mask_of, philox_lanes
from petune.kernels.gated_lora import gate as gates
from petune.kernels.gated_lora import gated, gated_lora
from tests.conftest import TOLERANCE, relative_error
from tests.kernels.operands import gradients, in_double
from tests.kernels.test_gated_lora import EDGES, EVERY_ACTIVATION, SCALE, operands, plain, plain_gate

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def _triton_or_an_error(monkeypatch):
    monkeypatch.setenv("PETUNE_KERNELS", "triton")


def tolerance(dtype: torch.dtype, roundings: int = 1) -> float:
    return TOLERANCE[dtype] * roundings * (2 if dtype == torch.bfloat16 else 1)  # the interpreter truncates to bf16


def drawn_mask(tokens: int, features: int, dropout_p: float, device, seed: int = 3):
    """What the next operator's mask is after this seed, over its mean."""
    torch.manual_seed(seed)
    mask = mask_of(dropout_p, torch.randint(2**63 - 1, (1,), device=device))
    assert mask is not None
    return philox_lanes(tokens, features, mask.seed).ge(mask.threshold).double() / mask.keep_probability


# --- the gate ------------------------------------------------------------------------------------------------------


@EVERY_ACTIVATION
@DTYPES
@pytest.mark.parametrize("layout", ["rows", "odd", "strided", "columns"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (3, 1025)], ids=str)
def test_the_gates_kernels_match_float64_in_every_layout(activation, dtype, layout, shape, device, guarded):
    if shape[1] > 1000 and (layout, dtype) != ("odd", torch.float16):
        shape = (2, 1024)  # one tile, to the element
    values = [(3 * torch.randn(shape, device=device)).to(dtype) for _ in range(3)]
    dh, gate, up = (guarded(shape, dtype, layout, value) for value in values)
    h = gates.gate_forward(gate, up, activation, dtype)
    dgate, dup, again = gates.gate_backward(dh, gate, up, activation, with_h=True)
    exact = gradients(
        lambda *t: plain_gate(*t, activation), in_double([t.requires_grad_() for t in values[1:]]), values[0].double()
    )
    for out, reference in zip((h, dgate, dup), exact, strict=True):
        assert out.dtype == dtype
        assert relative_error(out, reference) <= tolerance(dtype)
    assert again is not None
    assert torch.equal(again, h)
    assert torch.equal(torch.stack((dh, gate, up)), torch.stack(values))  # nothing that came in was overwritten


@pytest.mark.parametrize("wide", [0, 1, 2])
def test_tensors_of_different_strides_are_each_read_by_their_own(wide, device, guarded):
    values = [torch.randn(6, 33, device=device) for _ in range(3)]
    dh, gate, up = (guarded((6, 33), torch.float32, "odd" if i == wide else "rows", v) for i, v in enumerate(values))
    assert len({t.stride() for t in (dh, gate, up)}) == 2
    h = gates.gate_forward(gate, up, "gelu", torch.float32)
    dgate, dup, again = gates.gate_backward(dh, gate, up, "gelu", with_h=True)
    exact = gradients(
        lambda *t: plain_gate(*t, "gelu"), in_double([t.requires_grad_() for t in values[1:]]), values[0].double()
    )
    for out, reference in zip((h, dgate, dup, again), (*exact, exact[0]), strict=True):
        assert relative_error(out, reference) <= tolerance(torch.float32)


@pytest.mark.parametrize(("layout", "tokens"), [("rows", 9), ("odd", 1), ("odd", 40)])
def test_every_element_is_written_and_none_beside_them(layout, tokens, device, guarded):
    shape, dtype = (tokens, 33), torch.float32
    dh, gate, up = (guarded(shape, dtype, layout, torch.randn(shape, device=device)) for _ in range(3))
    h, dgate, dup, again = (guarded(shape, dtype, layout) for _ in range(4))
    strides = {"stride_gt": gate.stride(0), "stride_ut": up.stride(0)}
    grid, constants = gates._tiles(h, ACTIVATION="silu")
    gates._gate_forward_kernel[grid](gate, up, h, tokens, 33, **strides, stride_ht=h.stride(0), **constants)
    strides |= {"stride_dt": dh.stride(0), "stride_ot": dgate.stride(0)}
    gates._gate_backward_kernel[grid](dh, gate, up, dgate, dup, again, tokens, 33, **strides, **constants, WITH_H=True)
    expected = gates.gate_backward(dh, gate, up, "silu", with_h=True)
    for out, reference in zip((dgate, dup, again, h), (*expected, expected[2]), strict=True):
        assert torch.equal(out, reference)


@pytest.mark.filterwarnings("ignore:overflow encountered in multiply:RuntimeWarning")  # g² of 1e30, in numpy
@EVERY_ACTIVATION
def test_the_gate_saturates_without_overflow(activation, device):
    gate = torch.tensor([*EDGES, 1e19, -1e19, 1e30, -1e30], device=device)
    up = torch.full_like(gate, 0.7)
    exact = gradients(lambda *t: plain_gate(*t, activation), in_double([gate.requires_grad_(), up.requires_grad_()]))
    result = gradients(lambda *t: gated(*t, activation), [gate, up])
    for out, reference in zip(result, exact, strict=True):
        assert out.isfinite().all()
        # torch's own derivative of gelu_tanh is 0 · ∞ there
        expected = torch.where(reference.isfinite(), reference, out.double())
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)


@EVERY_ACTIVATION
def test_derivatives_in_fp32_are_exact_to_its_rounding(activation, device):
    gate = torch.linspace(-12, 12, 1001, device=device, requires_grad=True)
    ones = torch.ones_like(gate)
    result = torch.autograd.grad(gated(gate, ones, activation), gate, ones)[0]
    wide = gate.detach().double().requires_grad_()
    exact = torch.autograd.grad(plain_gate(wide, ones, activation), wide, ones.double())[0]
    assert (result.double() - exact).abs().max() <= 8 * 2**-23  # eight roundings of a slope of about 1


def test_in_place_dup_takes_the_buffer_of_dh_and_changes_no_result(device):
    dh, gate, up = (torch.randn(5, 37, device=device) for _ in range(3))
    apart = gates.gate_backward(dh, gate, up, "gelu")
    buffer = dh.clone()
    dgate, dup, h = gates.gate_backward(buffer, gate, up, "gelu", in_place=True)
    assert dup.data_ptr() == buffer.data_ptr()
    assert h is None
    assert torch.equal(dgate, apart[0])
    assert torch.equal(dup, apart[1])


def test_halves_of_one_packed_projection_are_read_in_place(device, monkeypatch):
    gate, up = torch.randn(2, 6, 66, device=device).chunk(2, dim=-1)
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda tensor: pytest.fail("a half was copied"))
    h = gates.gate_forward(gate, up, "silu", torch.float32)
    assert relative_error(h, plain_gate(gate.double(), up.double())) <= tolerance(torch.float32)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (4, 0)], ids=str)
def test_an_empty_gate_gives_an_empty_result(shape, device):
    gate, up = (torch.randn(shape, device=device, requires_grad=True) for _ in range(2))
    h = gated(gate, up, "silu")
    h.sum().backward()
    assert h.shape == gate.grad.shape == up.grad.shape == shape


def test_a_non_finite_element_stays_in_its_place(device):
    gate, up = torch.randn(4, 9, device=device), torch.randn(4, 9, device=device)
    gate[1, 2], up[3, 4] = float("nan"), float("inf")
    for activation in ("silu", "gelu", "gelu_tanh"):
        assert (~gated(gate, up, activation).isfinite()).nonzero().tolist() == [[1, 2], [3, 4]]


# --- with the linear layer -----------------------------------------------------------------------------------------


@EVERY_ACTIVATION
@DTYPES
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_output_and_gradients_match_float64(activation, dtype, dropout_p, device):
    tensors = operands(11, dtype=dtype)
    mask = drawn_mask(11, 17, dropout_p, device) if dropout_p else None
    torch.manual_seed(3)
    result = gradients(lambda g, u, *rest: gated_lora(g, u, activation, *rest, SCALE, dropout_p), tensors)
    exact = gradients(lambda *t: plain(*t, activation, mask=mask), in_double(tensors))
    for out, reference in zip(result, exact, strict=True):
        assert out.dtype == dtype
        assert relative_error(out, reference) <= tolerance(dtype, roundings=2)


@pytest.mark.parametrize("lead", [(1,), (2, 5), (0,)], ids=str)
def test_any_number_of_tokens(lead, device):
    tensors = operands(*lead)
    result = gradients(lambda g, u, *rest: gated_lora(g, u, "silu", *rest, SCALE), tensors)
    for out, reference in zip(result, gradients(plain, in_double(tensors)), strict=True):
        assert out.shape == reference.shape
        assert relative_error(out, reference) <= tolerance(torch.float32, roundings=2)


@pytest.mark.parametrize("trained", ["g", "u", "a", "b", "ab", "ga", "ub"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_each_subset_of_gradients_is_that_of_the_formula(trained, dropout_p, device):
    tensors = operands(6)
    for name, tensor in zip("guwcab", tensors, strict=True):
        tensor.requires_grad_(name in trained)
    mask = drawn_mask(6, 17, dropout_p, device) if dropout_p else None
    torch.manual_seed(3)
    result = gradients(lambda g, u, *rest: gated_lora(g, u, "gelu", *rest, SCALE, dropout_p), tensors)
    for out, reference in zip(result, gradients(lambda *t: plain(*t, "gelu", mask), in_double(tensors)), strict=True):
        assert relative_error(out, reference) <= tolerance(torch.float32, roundings=2)


def test_autocast_reads_fp32_inputs_and_multiplies_in_fp16(device):
    tensors = operands(9)
    with torch.autocast(device.type, torch.float16):
        result = gradients(lambda g, u, *rest: gated_lora(g, u, "silu", *rest, SCALE), tensors)
    assert [out.dtype for out in result] == [torch.float16] + [torch.float32] * 4
    for out, reference in zip(result, gradients(plain, in_double(tensors)), strict=True):
        assert relative_error(out, reference) <= 4 * TOLERANCE[torch.float16]


def test_backward_overwrites_neither_gate_nor_up_nor_dy(device):
    tensors = operands(5)
    dy = torch.randn(5, 23, device=device)
    before = [t.clone() for t in (*tensors[:2], dy)]
    gradients(lambda g, u, *rest: gated_lora(g, u, "silu", *rest, SCALE, 0.3), tensors, dy)
    assert all(torch.equal(*pair) for pair in zip(before, (*tensors[:2], dy), strict=True))


def test_a_rank_above_the_kernels_is_an_error_with_its_reason(device):
    gate, up, weight, bias, _, _ = operands(3)
    a, b = torch.randn(257, 17, device=device), torch.randn(23, 257, device=device)
    with pytest.raises(RuntimeError, match=r"gated_lora cannot run on Triton: rank 257 is above 256"):
        gated_lora(gate, up, "silu", weight, bias, a, b, SCALE)
