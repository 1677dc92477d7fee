"""`grouped_joined_lora`: as `grouped_lora` of the same factors, what is refused, and torch's machinery."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from petune.kernels.grouped_lora import JoinedFactors, RowGroups, grouped_joined_lora
from tests.conftest import TOLERANCE, relative_error
from tests.kernels.grouped import IN, OUT, RANKS, ROWS, SCALES, Batch, batch, detached, in_double, loop

FP32 = torch.float32


def joined(tensors: Batch, ids, scales=SCALES) -> Tensor:
    factors = JoinedFactors.of(tensors.a, tensors.b, scales)
    return grouped_joined_lora(*tensors[:3], factors, RowGroups.of(ids, len(tensors.a)))


@pytest.mark.parametrize("per_row", [1, 13])
@pytest.mark.parametrize("ids", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("ranks", [RANKS, (4,) * 5], ids=["ranks differ", "one rank"])
def test_each_row_takes_its_own_part_of_the_factors(ranks, dtype, ids, per_row):
    tensors = detached(batch(7, per_row, dtype=dtype, ranks=ranks))
    y = joined(tensors, ids)
    assert (y.shape, y.dtype) == ((7, per_row, OUT), dtype)
    exact, peer = loop(in_double(tensors), ids), loop(tensors, ids)
    assert relative_error(y, exact) <= max(2 * TOLERANCE[dtype], 1.1 * relative_error(peer, exact))


def test_the_joined_factors_are_a_copy_that_asks_for_no_gradient():
    tensors = batch(7)
    factors = JoinedFactors.of(tensors.a, tensors.b, SCALES)
    assert (factors.a.shape, factors.b.shape) == ((sum(RANKS), IN), (OUT, sum(RANKS)))
    assert (factors.ranks, factors.scales) == (RANKS, SCALES)
    assert not factors.a.requires_grad
    before = factors.a.clone()
    with torch.no_grad():
        tensors.a[0].zero_()
    assert torch.equal(factors.a, before)


@pytest.mark.parametrize("where", ["a", "b", "x"])
@pytest.mark.parametrize("ranks", [RANKS, (4,) * 5], ids=["ranks differ", "one rank"])
def test_a_non_finite_adapter_or_row_changes_no_bit_of_another(ranks, where):
    tensors, ids = detached(batch(7, 3, ranks=ranks)), ROWS["scattered"]
    clean, own = joined(tensors, ids), torch.tensor([i == 4 for i in ids])
    {"a": tensors.a[4], "b": tensors.b[4], "x": tensors.x}[where][own if where == "x" else 0] = torch.nan
    y = joined(tensors, ids)
    assert torch.equal(y[~own], clean[~own])
    assert y[own].isnan().any()


# --- torch's own machinery -----------------------------------------------------------------------------------------


def test_autocast_casts_as_linear_does():
    tensors = detached(batch(7, 3))
    with torch.autocast("cpu", torch.bfloat16):
        y = joined(tensors, ROWS["sorted"])
    assert y.dtype == torch.bfloat16
    assert relative_error(y, joined(tensors, ROWS["sorted"])) <= 3 * TOLERANCE[torch.bfloat16]


def test_the_op_passes_opcheck_and_compiles_into_one_graph():
    tensors = detached(batch(7, 2))
    factors, groups = JoinedFactors.of(tensors.a, tensors.b, SCALES), RowGroups.of(ROWS["scattered"], 5)
    layout = groups.sorted_on(tensors.x.device)
    torch.library.opcheck(torch.ops.petune.grouped_joined_lora.default, (*tensors[:3], *factors, *layout, FP32))
    compiled = torch.compile(
        lambda x: grouped_joined_lora(x, *tensors[1:3], factors, groups), backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(tensors.x), joined(tensors, ROWS["scattered"]))


def test_flops_count_each_adapter_for_its_own_tokens():
    with FlopCounterMode(display=False) as counter:
        joined(detached(batch(7, 3)), ROWS["scattered"])
    own = 3 * sum(RANKS[i] for i in ROWS["scattered"] if i >= 0)
    assert counter.get_total_flops() == 2 * (21 * IN * OUT + own * (IN + OUT))


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"a": torch.randn(40, IN)}, "do not fit"),
        ({"b": torch.randn(sum(RANKS), OUT)}, "do not fit"),
        ({"a": torch.randn(sum(RANKS), IN, device="meta")}, "do not fit"),
        ({"ranks": (0, 4, 8, 24, 5)}, "ranks of 1 or more"),
        ({"ranks": RANKS[:4]}, "4 ranks, 5 scales for 5 adapters"),
        ({"scales": SCALES[:2]}, "2 scales for 5 adapters"),
    ],
    ids=["rows of a", "b transposed", "device", "rank 0", "ranks", "scales"],
)
def test_factors_that_do_not_fit_are_named(change, said):
    tensors = detached(batch(7))
    factors = JoinedFactors.of(tensors.a, tensors.b, SCALES)._replace(**change)
    with pytest.raises(ValueError, match=said):
        grouped_joined_lora(*tensors[:3], factors, RowGroups.of(ROWS["sorted"], 5))


def test_a_gradient_is_refused():
    tensors = batch(7)
    with pytest.raises(RuntimeError, match="gradient of x and is for inference"):
        joined(tensors, ROWS["sorted"])
    with torch.no_grad():
        joined(tensors, ROWS["sorted"])
