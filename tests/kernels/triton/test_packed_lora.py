"""`packed_lora` on its Triton kernels, and each of the two, against float64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from petune.kernels import launch
from petune.kernels.chooser import Config
from petune.kernels.launch import INTERPRETED
from petune.kernels.packed_lora import kernel, packed_lora, unpacked
from tests.conftest import TOLERANCE, relative_error

SCALE = 1.5
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BITS = [1, 2, 4, 8]
IN, OUT = 37, 29  # at 1, 2 and 4 bits no second row of either factor begins at a byte of its own
SMALL = Config(16, 16, 4, 1)  # tiles so small that every sum has several of them


@pytest.fixture(autouse=True)
def _triton_or_an_error(monkeypatch):
    monkeypatch.setenv("PETUNE_KERNELS", "triton")


@pytest.fixture
def many_chunks(monkeypatch):
    """Every sum is split as far as it goes: as on a GPU that has more multiprocessors than there is work."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 10_000)


@pytest.fixture
def one_chunk(monkeypatch):
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 1)


@pytest.fixture
def factor(device, guarded):
    """Codes with NaN's own bytes around them, levels in a NaN-filled buffer, and what they stand for."""

    def draw(rows: int, columns: int, bits: int, *, by_row: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        size = -(-rows * columns * bits // 8)
        codes = guarded((size,), torch.uint8, values=torch.randint(0, 256, (size,), dtype=torch.uint8, device=device))
        shape = (rows if by_row else 1, 2**bits)
        levels = guarded(shape, torch.float32, "odd", torch.randn(shape, device=device))
        return codes, levels, unpacked(codes, levels, (rows, columns), bits).double()

    return draw


def bound(dtype: torch.dtype) -> float:
    # s, the levels and the low-rank term are each rounded once to 16 bits, to bf16 the interpreter truncates
    return TOLERANCE[dtype] * (4 if dtype == torch.bfloat16 and INTERPRETED else 2)


def operands(tokens: int, device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(*shape, device=device).to(dtype) for shape in ((tokens, IN), (OUT, IN), (OUT,)))


# --- the operator --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_row", [False, True], ids=["one table", "a table a row"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_update_matches_float64(dtype, bits, by_row, device, factor):
    x, weight, bias = operands(23, device, dtype)
    a_bits, a_levels, a = factor(5, IN, bits, by_row=by_row)
    b_bits, b_levels, b = factor(OUT, 5, bits, by_row=by_row)
    y = packed_lora(x, weight, bias, a_bits, a_levels, b_bits, b_levels, 5, bits, SCALE)
    base = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    assert y.dtype == dtype
    assert relative_error(y.double() - base, SCALE * (x.double() @ a.T) @ b.T) <= 2 * bound(dtype)


@pytest.mark.parametrize("tokens", [0, 1, 5, 70])
@pytest.mark.parametrize("rank", [1, 3, 16, 33, 100])
@pytest.mark.parametrize("bits", [1, 4])
def test_any_number_of_tokens_and_any_rank(bits, rank, tokens, device, factor):
    x, weight, _ = operands(tokens, device)
    (a_bits, a_levels, a), (b_bits, b_levels, b) = factor(rank, IN, bits), factor(OUT, rank, bits, by_row=True)
    y = packed_lora(x, weight, None, a_bits, a_levels, b_bits, b_levels, rank, bits, SCALE)
    reference = x.double() @ weight.double().T + SCALE * (x.double() @ a.T) @ b.T
    assert y.shape == (tokens, OUT)
    assert relative_error(y, reference) <= bound(torch.float32)


def test_leading_axes_strides_and_transposed_weights_give_the_same_result(device, factor):
    x, weight, bias = operands(12, device)
    a_bits, a_levels, _ = factor(5, IN, 1)
    b_bits, b_levels, _ = factor(OUT, 5, 1)
    packed = a_bits, a_levels, b_bits, b_levels, 5, 1, SCALE
    reference = packed_lora(x, weight, bias, *packed)
    strided = x.T.contiguous().T.view(12, IN)
    every_second = torch.stack((bias, bias), dim=1).flatten()[::2]
    same = packed_lora(strided, weight.T.contiguous().T, every_second, *packed)
    assert relative_error(same, reference) <= TOLERANCE[torch.float32]
    assert torch.equal(packed_lora(x.view(3, 4, IN), weight, bias, *packed).view(12, OUT), reference)


def test_codes_and_levels_may_be_strided_slices_of_a_blob(device, factor):
    x, weight, bias = operands(6, device)
    (a_bits, a_levels, _), (b_bits, b_levels, _) = factor(5, IN, 2, by_row=True), factor(OUT, 5, 2)
    reference = packed_lora(x, weight, bias, a_bits, a_levels, b_bits, b_levels, 5, 2, SCALE)
    blob = torch.cat((a_bits.new_zeros(3), a_bits, b_bits))
    sliced = blob[3 : 3 + len(a_bits)], torch.stack((a_levels,) * 2, dim=2)[..., 0], blob[3 + len(a_bits) :], b_levels
    assert torch.equal(packed_lora(x, weight, bias, *sliced, 5, 2, SCALE), reference)


# --- the kernels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", ["one_chunk", "many_chunks"])
@pytest.mark.parametrize("config", [None, SMALL], ids=["default", "small"])
@pytest.mark.parametrize(("tokens", "features"), [(1, 1), (1, 150), (2, 8), (129, 7), (65, 64), (17, 129)], ids=str)
def test_shapes_need_not_fit_the_blocks(tokens, features, config, chunks, device, factor, request):
    request.getfixturevalue(chunks)
    for bits in BITS:
        (a_bits, a_levels, a), (b_bits, b_levels, b) = factor(5, features, bits), factor(features, 5, bits)
        x, bias = torch.randn(tokens, features, device=device), torch.randn(features, device=device)
        s = kernel.shrink(x, a_bits, a_levels, 5, bits, config=config)
        assert relative_error(s.double().sum(0), x.double() @ a.T) <= bound(torch.float32)
        s = torch.randn(3, tokens, 5, device=device)  # partial sums
        y = kernel.expand(
            s, b_bits, b_levels, features, bits, scale=SCALE, bias=bias, dtype=torch.float32, config=config
        )
        assert relative_error(y, SCALE * s.double().sum(0) @ b.T + bias.double()) <= bound(torch.float32)


@pytest.mark.parametrize("kind", ["shrink", "expand"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_config_gives_the_same_result(kind, dtype, device, factor):
    (a_bits, a_levels, a), (b_bits, b_levels, b) = factor(70, 270, 1), factor(270, 70, 1)
    x, s = torch.randn(70, 270, device=device).to(dtype), torch.randn(1, 70, 70, device=device).to(dtype)
    for config in kernel.configs(kind, dtype):
        if kind == "shrink":
            out, reference = kernel.shrink(x, a_bits, a_levels, 70, 1, config=config).double().sum(0), x.double() @ a.T
        else:
            out = kernel.expand(s, b_bits, b_levels, 270, 1, scale=1.0, bias=None, dtype=dtype, config=config)
            reference = s[0].double() @ b.T
        assert relative_error(out, reference) <= bound(dtype)


@pytest.mark.parametrize("layout", ["rows", "odd", "columns", "strided"])
@pytest.mark.parametrize("bits", [1, 8])
def test_any_strides_are_read_in_place_and_nothing_beside_them(layout, bits, device, factor, guarded, many_chunks):
    values, bias = torch.randn(41, 67, device=device), torch.randn(67, device=device)
    (a_bits, a_levels, a), (b_bits, b_levels, b) = factor(5, 67, bits), factor(67, 5, bits, by_row=True)
    x, bias = guarded((41, 67), values.dtype, layout, values), guarded((67,), bias.dtype, layout, bias)
    s = kernel.shrink(x, a_bits, a_levels, 5, bits, config=SMALL)
    assert len(s) > 1
    assert relative_error(s.sum(0), values.double() @ a.T) <= bound(torch.float32)
    y = kernel.expand(s, b_bits, b_levels, 67, bits, scale=SCALE, bias=bias, dtype=torch.float32, config=SMALL)
    assert relative_error(y, SCALE * (values.double() @ a.T) @ b.T + bias.double()) <= bound(torch.float32)


@pytest.mark.parametrize("tokens", [5, 70])
def test_partial_sums_are_added_where_they_are_read_or_before_many_tokens_read_them(
    tokens, device, factor, many_chunks
):
    a_bits, a_levels, a = factor(5, 300, 1)
    x = torch.randn(tokens, 300, device=device).half()
    s = kernel.shrink(x, a_bits, a_levels, 5, 1)
    assert (len(s) > 1, s.dtype) == ((True, torch.float32) if tokens == 5 else (False, torch.float16))
    assert relative_error(s.double().sum(0), x.double() @ a.T) <= bound(torch.float16)


def test_two_runs_give_the_same_bits(device, factor, many_chunks):
    (a_bits, a_levels, _), (b_bits, b_levels, _) = factor(5, IN, 1), factor(OUT, 5, 1)
    tensors = operands(70, device)
    first, second = (packed_lora(*tensors, a_bits, a_levels, b_bits, b_levels, 5, 1, SCALE) for _ in range(2))
    assert torch.equal(first, second)


def test_non_finite_activations_reach_their_row_and_no_other(device, factor):
    (a_bits, a_levels, _), (b_bits, b_levels, _) = factor(5, IN, 1), factor(OUT, 5, 1)
    x, weight, bias = operands(70, device)
    x[17, 33] = torch.nan
    y = packed_lora(x, weight, bias, a_bits, a_levels, b_bits, b_levels, 5, 1, SCALE)
    assert y[17].isnan().all()
    assert y[torch.arange(70, device=device) != 17].isfinite().all()


def test_ranks_beyond_the_kernels_are_an_error_that_says_why(device, factor):
    (a_bits, a_levels, _), (b_bits, b_levels, _) = factor(257, IN, 1), factor(OUT, 257, 1)
    with pytest.raises(RuntimeError, match=r"packed_lora cannot run on Triton: rank 257 is above 256"):
        packed_lora(*operands(3, device), a_bits, a_levels, b_bits, b_levels, 257, 1, SCALE)


@settings(
    max_examples=15,  # on a GPU each compiles kernels of its own
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    tokens=st.integers(1, 80),
    features=st.integers(1, 40),
    rank=st.integers(1, 20),
    bits=st.sampled_from(BITS),
    by_row=st.booleans(),
    multiprocessors=st.sampled_from([1, 10_000]),
)
def test_any_small_problem_matches_float64(
    tokens, features, rank, bits, by_row, multiprocessors, device, factor, monkeypatch
):
    monkeypatch.setattr(launch, "multiprocessors", lambda device: multiprocessors)
    a_bits, a_levels, a = factor(rank, features, bits, by_row=by_row)
    b_bits, b_levels, b = factor(features, rank, bits, by_row=by_row)
    x = torch.randn(tokens, features, device=device)
    weight = torch.zeros(features, features, device=device)
    y = packed_lora(x, weight, None, a_bits, a_levels, b_bits, b_levels, rank, bits, SCALE)
    reference = SCALE * (x.double() @ a.T) @ b.T
    # a product of a few terms may cancel: then its error is measured against the size of the terms
    assert (y.double() - reference).norm() <= bound(torch.float32) * (reference.norm() + 0.1)
