"""`grouped_packed_lora`: against packed_lora for each adapter's rows alone, what is refused, and torch's machinery."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from petune.kernels.grouped_lora import PackedFactors, RowGroups, grouped_packed_lora, reference
from petune.kernels.packed_lora import packed_lora, unpacked
from tests.conftest import TOLERANCE, relative_error
from tests.kernels.grouped import IN, OUT, RANKS, ROWS, SCALES, tokens_of

BITS = (1, 2, 1, 4, 8)


def packed(rows: int, columns: int, bits: int, *, by_row: bool) -> tuple[Tensor, Tensor]:
    """Random codes and levels."""
    codes = torch.randint(0, 256, (-(-rows * columns * bits // 8),), dtype=torch.uint8)
    return codes, torch.randn(rows if by_row else 1, 2**bits)


def factors_of(bits=BITS, ranks=RANKS) -> list[PackedFactors]:
    return [
        PackedFactors(
            *packed(rank, IN, width, by_row=i % 2 == 0),
            *packed(OUT, rank, width, by_row=i % 3 == 0),
            rank,
            width,
            scale,
        )
        for i, (rank, width, scale) in enumerate(zip(ranks, bits, SCALES, strict=True))
    ]


def base(*lead: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((*lead, IN), (OUT, IN), (OUT,)))
    return x, weight, bias


def grouped(tensors, factors, ids) -> Tensor:
    return grouped_packed_lora(*tensors, factors, RowGroups.of(ids, len(factors)))


@pytest.mark.parametrize("per_row", [1, 13])
@pytest.mark.parametrize("ids", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_each_row_gets_what_packed_lora_gives_it_alone(dtype, ids, per_row):
    tensors, factors = base(7, per_row, dtype=dtype), factors_of()
    y = grouped(tensors, factors, ids)
    assert (y.shape, y.dtype) == ((7, per_row, OUT), dtype)
    x, weight, bias = tensors
    exact = torch.nn.functional.linear(x, weight, bias).view(-1, OUT)
    for i, factor in enumerate(factors):
        own = tokens_of(i, ids, 7 * per_row)
        exact[own] = packed_lora(x.view(-1, IN)[own], weight, bias, *factor)
    assert relative_error(y.view(-1, OUT), exact) <= 3 * TOLERANCE[dtype]


def test_factors_of_an_adapter_in_no_row_stay_packed(monkeypatch):
    seen = []
    monkeypatch.setattr(reference, "unpacked", lambda codes, *rest: seen.append(len(codes)) or unpacked(codes, *rest))
    tensors, factors = base(7), factors_of()
    grouped(tensors, factors, ROWS["one adapter"])
    assert seen == [len(factors[2].a_bits), len(factors[2].b_bits)]


@pytest.mark.parametrize("where", ["a_levels", "b_levels", "x"])
def test_a_non_finite_adapter_or_row_changes_no_bit_of_another(where):
    tensors, factors, ids = base(7, 3), factors_of(), ROWS["scattered"]
    clean, own = grouped(tensors, factors, ids), torch.tensor([i == 4 for i in ids])
    poisoned = tensors[0][own] if where == "x" else getattr(factors[4], where)
    poisoned.fill_(torch.nan)
    if where == "x":
        tensors[0][own] = poisoned
    y = grouped(tensors, factors, ids)
    assert torch.equal(y[~own], clean[~own])
    assert y[own].isnan().all()


# --- torch's own machinery -----------------------------------------------------------------------------------------


def test_autocast_casts_as_linear_does():
    tensors, factors = base(7, 3), factors_of()
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped(tensors, factors, ROWS["sorted"])
    assert y.dtype == torch.bfloat16
    assert relative_error(y, grouped(tensors, factors, ROWS["sorted"])) <= 3 * TOLERANCE[torch.bfloat16]


def test_the_op_passes_opcheck():
    tensors, columns = base(7, 2), [list(column) for column in zip(*factors_of(), strict=True)]
    layout = RowGroups.of(ROWS["scattered"], 5).sorted_on(tensors[0].device)
    torch.library.opcheck(torch.ops.petune.grouped_packed_lora.default, (*tensors, *columns, *layout, torch.float32))


def test_it_compiles_into_one_graph():
    tensors, factors = base(7, 2), factors_of()
    groups = RowGroups.of(ROWS["scattered"], 5)
    compiled = torch.compile(
        lambda x: grouped_packed_lora(x, *tensors[1:], factors, groups), backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(tensors[0]), grouped(tensors, factors, ROWS["scattered"]))


def test_meta_tensors_give_shapes():
    tensors = [t.to("meta") for t in base(7, 3)]
    factors = [PackedFactors(*(v.to("meta") if isinstance(v, Tensor) else v for v in f)) for f in factors_of()]
    y = grouped(tensors, factors, ROWS["sorted"])
    assert (y.shape, y.device.type) == ((7, 3, OUT), "meta")


def test_flops_count_each_adapter_for_its_own_tokens():
    with FlopCounterMode(display=False) as counter:
        grouped(base(7, 3), factors_of(), ROWS["scattered"])
    own = 3 * sum(RANKS[i] for i in ROWS["scattered"] if i >= 0)
    assert counter.get_total_flops() == 2 * (21 * IN * OUT + own * (IN + OUT))


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["x", "weight", "bias", "a_levels", "b_levels"])
def test_a_call_that_needs_a_gradient_is_refused_and_one_that_does_not_is_not(field):
    tensors, factors = base(7), factors_of()
    named = dict(zip(("x", "weight", "bias"), tensors, strict=True))
    named.get(field, getattr(factors[3], field, None)).requires_grad_()
    name = field if field in named else rf"factors\[3\]\.{field}"
    with pytest.raises(RuntimeError, match=rf"asked for the gradient of {name} and is for inference.*torch\.no_grad"):
        grouped(tensors, factors, ROWS["sorted"])
    with torch.no_grad():
        assert not grouped(tensors, factors, ROWS["sorted"]).requires_grad


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"bits": 3}, r"\.a: bits=3 is not one of 1, 2, 4, 8"),
        ({"rank": 0}, ": rank=0 is not positive; leave out an adapter"),
        ({"a_bits": torch.zeros(3, dtype=torch.uint8)}, r"\.a: codes \(3,\) torch.uint8 do not fit"),
        ({"b_levels": torch.zeros(2, 4)}, r"\.b: levels \(2, 4\) torch.float32 do not fit"),
    ],
    ids=["bits", "rank", "codes", "levels"],
)
def test_factors_that_do_not_fit_are_named(change, fault):
    factors = factors_of()
    factors[2] = factors[2]._replace(**change)
    with pytest.raises(ValueError, match=rf"grouped_packed_lora: factors\[2\]{fault}"):
        grouped(base(7), factors, ROWS["sorted"])


def test_another_number_of_factors_is_refused():
    groups = RowGroups.of(ROWS["sorted"], 5)
    with pytest.raises(ValueError, match="4 factors for 5 adapters; pass one of each for every adapter"):
        grouped_packed_lora(*base(7), factors_of()[:4], groups)


def test_tokens_that_do_not_divide_into_rows_are_refused():
    with pytest.raises(ValueError, match=r"grouped_packed_lora: .* has 8 tokens, which do not divide into 7 rows"):
        grouped(base(8), factors_of(), ROWS["sorted"])


@pytest.mark.parametrize("fields", [("x",), ("a_bits", "a_levels"), ("b_levels",)], ids=str)
def test_devices_that_disagree_are_named(fields):
    tensors, factors = list(base(7)), factors_of()
    if fields == ("x",):
        tensors[0] = tensors[0].to("meta")
    else:
        factors[1] = factors[1]._replace(**{name: getattr(factors[1], name).to("meta") for name in fields})
    with pytest.raises(ValueError, match=r"meta.*; move (the model|them)"):
        grouped(tensors, factors, ROWS["sorted"])
