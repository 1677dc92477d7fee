"""`packed_lora` and `unpacked`: against codes placed one by one, what is refused, and torch's own machinery."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from petune.kernels.packed_lora import packed_lora, unpacked
from tests.conftest import TOLERANCE, relative_error

SCALE = 1.5
BITS = [1, 2, 4, 8]
IN, OUT, RANK = 17, 23, 3  # odd: rows begin within a byte


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes one by one into bytes, by the definition."""
    packed = bytearray(-(-codes.numel() * bits // 8))
    for position, code in enumerate(codes.flatten().tolist()):
        packed[position * bits // 8] |= code << position * bits % 8
    return torch.tensor(list(packed), dtype=torch.uint8)


def factor(rows: int, columns: int, bits: int, *, by_row: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes, levels, and the matrix that they stand for."""
    codes = torch.randint(2**bits, (rows, columns), device="cpu")
    levels = torch.randn(rows if by_row else 1, 2**bits, device="cpu")
    return pack(codes, bits), levels, levels.expand(rows, -1).gather(1, codes)


def operands(*lead: int, bits: int = 1, by_row: bool = False, dtype=torch.float32):
    """What `packed_lora` takes, by name, and the two dense factors."""
    (a_bits, a_levels, a), (b_bits, b_levels, b) = (
        factor(*shape, bits, by_row=by_row) for shape in ((RANK, IN), (OUT, RANK))
    )
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((*lead, IN), (OUT, IN), (OUT,)))
    named = {
        "x": x, "weight": weight, "bias": bias, "a_bits": a_bits, "a_levels": a_levels, "b_bits": b_bits,
        "b_levels": b_levels, "rank": RANK, "bits": bits, "scale": SCALE,
    }  # fmt: skip
    device = x.device
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in named.items()}, a.to(device), b.to(device)


def plain(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, weight, bias) + SCALE * (x @ a.T) @ b.T


# --- the formula ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_row", [False, True], ids=["one table", "a table a row"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (3, 8), (8, 3), (1, 0), (0, 4)], ids=str)
def test_unpacking_gives_every_code_its_level_to_the_bit(shape, bits, by_row):
    packed, levels, matrix = factor(*shape, bits, by_row=by_row and shape[0] > 0)
    out = unpacked(packed, levels, shape, bits)
    assert (out.shape, out.dtype, out.is_contiguous()) == (shape, torch.float32, True)
    assert torch.equal(out, matrix)


@pytest.mark.parametrize("by_row", [False, True], ids=["one table", "a table a row"])
@pytest.mark.parametrize("lead", [(), (1,), (13,), (2, 5), (0,)], ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_it_is_the_lora_layer_with_unpacked_factors(dtype, bits, lead, by_row):
    named, a, b = operands(*lead, bits=bits, by_row=by_row, dtype=dtype)
    y = packed_lora(**named)
    exact = plain(*(t.double() for t in (named["x"], named["weight"], named["bias"], a, b)))
    assert (y.shape, y.dtype) == (exact.shape, dtype)
    # the factors, s and the output are each rounded to the dtype
    assert relative_error(y, exact) <= 3 * TOLERANCE[dtype]


def test_no_bias_is_a_bias_of_zeros():
    named, _, _ = operands(4)
    without = packed_lora(**named | {"bias": None})
    assert torch.equal(without, packed_lora(**named | {"bias": named["bias"] * 0}))


def test_a_blob_s_slices_and_a_transposed_weight_are_read_in_place():
    named, _, _ = operands(4, bits=2)
    blob = torch.cat((named["a_bits"].new_zeros(1), named["a_bits"], named["b_bits"]))
    a_bits, b_bits = blob[1:].split((len(named["a_bits"]), len(named["b_bits"])))
    weight = named["weight"].T.contiguous().T
    sliced = packed_lora(**named | {"a_bits": a_bits, "b_bits": b_bits, "weight": weight})
    assert relative_error(sliced, packed_lora(**named)) <= 1e-6


# --- torch's own machinery -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_linear_does(dtype):
    named, a, b = operands(9, bits=4)
    with torch.autocast(named["x"].device.type, dtype):
        y = packed_lora(**named)
    assert y.dtype == dtype
    assert relative_error(y, plain(named["x"], named["weight"], named["bias"], a, b)) <= 3 * TOLERANCE[dtype]


@pytest.mark.parametrize("bits", BITS)
def test_the_op_passes_opcheck(bits):
    named, _, _ = operands(2, 5, bits=bits)
    torch.library.opcheck(torch.ops.petune.packed_lora.default, (*named.values(), torch.float32))


def test_it_compiles_into_one_graph():
    named, _, _ = operands(2, 5)
    compiled = torch.compile(partial(packed_lora, **named), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(), packed_lora(**named))


def test_it_maps_over_a_batch_of_inputs():
    named, _, _ = operands(4, 5)
    x = named.pop("x")
    mapped = torch.func.vmap(lambda x: packed_lora(x, **named))(x)
    assert relative_error(mapped, packed_lora(x, **named)) <= 1e-6


def test_meta_tensors_give_shapes():
    named, _, _ = operands(2, 5)
    moved = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in named.items()}
    y = packed_lora(**moved)
    assert (y.shape, y.device.type) == ((2, 5, OUT), "meta")


def test_flops_count_the_base_and_the_low_rank_products():
    named, _, _ = operands(13)
    with FlopCounterMode(display=False) as counter:
        packed_lora(**named)
    assert counter.get_total_flops() == 2 * 13 * (IN * OUT + RANK * (IN + OUT))


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["x", "weight", "bias", "a_levels", "b_levels"])
def test_a_call_that_needs_a_gradient_is_refused_and_one_that_does_not_is_not(field):
    named, _, _ = operands(4)
    named[field].requires_grad_()
    with pytest.raises(RuntimeError, match=rf"asked for the gradient of {field} and is for inference.*torch\.no_grad"):
        packed_lora(**named)
    with torch.no_grad():
        assert not packed_lora(**named).requires_grad


@pytest.mark.parametrize("bits", [0, 3, 16, 32])
def test_other_numbers_of_bits_are_refused(bits):
    named, _, _ = operands(4)
    with pytest.raises(ValueError, match=rf"packed_lora: a: bits={bits} is not one of 1, 2, 4, 8; pack codes"):
        packed_lora(**named | {"bits": bits})


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_is_refused(rank):
    named, _, _ = operands(4)
    with pytest.raises(ValueError, match=rf"rank={rank} is not positive; leave out"):
        packed_lora(**named | {"rank": rank})


@pytest.mark.parametrize("which", ["a", "b"])
@pytest.mark.parametrize(
    "change",
    [lambda t: t[:-1], lambda t: torch.cat((t, t[:1])), lambda t: t[None], lambda t: t.char()],
    ids=["cut short", "too long", "not flat", "signed"],
)
def test_codes_that_do_not_fit_are_named_with_what_would(which, change):
    named, _, _ = operands(4)
    size = {"a": 7, "b": 9}[which]  # 3 · 17 and 23 · 3 bits
    with pytest.raises(ValueError, match=rf"packed_lora: {which}: codes \(.*; pass uint8 \[{size}\], flat"):
        packed_lora(**named | {f"{which}_bits": change(named[f"{which}_bits"])})


@pytest.mark.parametrize("which", ["a", "b"])
@pytest.mark.parametrize(
    "levels",
    [torch.ones(1, 4), torch.ones(2, 2), torch.ones(2), torch.ones(1, 2).double()],
    ids=lambda levels: f"{tuple(levels.shape)} {levels.dtype}",
)
def test_levels_that_do_not_fit_are_named_with_what_would(which, levels):
    named, _, _ = operands(4)
    rows = {"a": RANK, "b": OUT}[which]
    with pytest.raises(ValueError, match=rf"{which}: levels \(.*; pass float32 \[1, 2\], or \[{rows}, 2\] with one"):
        packed_lora(**named | {f"{which}_levels": levels})


@pytest.mark.parametrize(("field", "shape"), [("x", (4, 16)), ("x", ()), ("weight", (23,)), ("bias", (22,))], ids=str)
def test_shapes_of_the_base_that_disagree_are_named(field, shape):
    named, _, _ = operands(4)
    with pytest.raises(ValueError, match=rf"packed_lora: .*{field}\W+\(.*do not fit") as error:
        packed_lora(**named | {field: torch.randn(shape)})
    assert str(tuple(shape)) in str(error.value)


@pytest.mark.parametrize("field", ["x", "weight", "bias", "a_bits", "a_levels", "b_bits", "b_levels"])
def test_devices_that_disagree_are_named(field):
    named, _, _ = operands(4)
    with pytest.raises(ValueError, match=r"meta.*; move (the model|them)"):
        packed_lora(**named | {field: named[field].to("meta")})


def test_dtypes_of_the_base_that_disagree_are_refused_outside_of_autocast():
    named, _, _ = operands(4)
    with pytest.raises(ValueError, match=r"weight \(23, 17\) torch.bfloat16.*differ in the dtype of the base"):
        packed_lora(**named | {"weight": named["weight"].bfloat16()})


@pytest.mark.parametrize(
    ("change", "fault"),
    [({"bits": 5}, "bits=5 is not"), ({"shape": (RANK, IN + 9)}, "codes"), ({"levels": torch.ones(1, 3)}, "levels")],
    ids=["bits", "codes", "levels"],
)
def test_unpacking_refuses_what_does_not_fit(change, fault):
    packed, levels, _ = factor(RANK, IN, 1)
    arguments = {"packed": packed, "levels": levels, "shape": (RANK, IN), "bits": 1} | change
    with pytest.raises(ValueError, match=rf"unpacked: {fault}"):
        unpacked(**arguments)
