"""The kernels of `residual_low_rank`, and the operator on Triton forward and backward, against float64."""

import pytest
import torch
from torch import Tensor

from petune.kernels import launch
from petune.kernels.chooser import Config
from petune.kernels.launch import INTERPRETED
from petune.kernels.residual_low_rank import kernel, residual_low_rank
from petune.kernels.residual_low_rank.kernel import APART, expand
from tests.conftest import TOLERANCE, relative_error
from tests.kernels.operands import gradients, in_double
from tests.kernels.test_residual_low_rank import operands, plain

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
# tiles so small that every sum has several of them along each axis
SMALL = Config(16, 16, 4, 1)
ALL = (True, True, True, True)


@pytest.fixture(autouse=True)
def _triton_or_an_error(monkeypatch):
    monkeypatch.setenv("PETUNE_KERNELS", "triton")


@pytest.fixture(params=["one chunk", "many chunks"])
def chunks(request, monkeypatch):
    """Sums over tokens that are not split, and that are split as far as it goes."""
    count = 1 if request.param == "one chunk" else 10_000
    monkeypatch.setattr(launch, "multiprocessors", lambda device: count)


def tolerance(dtype: torch.dtype, roundings: int = 1) -> float:
    return TOLERANCE[dtype] * roundings * (2 if dtype == torch.bfloat16 and INTERPRETED else 1)  # it truncates to bf16


def draw(device, tokens: int, features: int, rank: int, dtype=torch.float32) -> dict[str, Tensor]:
    """What the two kernels read, by name; the gate has zeros."""
    shapes = {
        "u": (tokens, features), "dz": (tokens, features), "s": (tokens, rank), "ds": (tokens, rank),
        "down": (rank, features), "up": (features, rank), "gate": (features,),
    }  # fmt: skip
    drawn = {name: torch.randn(*shape, device=device).to(dtype) for name, shape in shapes.items()}
    drawn["gate"][::3] = 0
    return drawn


def exact(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """z, du, ddown, p and dots in float64."""
    u, dz, s, ds, down, up, gate = (t.double() for t in given.values())
    return gate * (u + s @ up.T), gate * dz + ds @ down, ds.T @ u, dz.T @ s, (dz * u).sum(0)


def both(given: dict[str, Tensor], config: Config | None = None, **outs: Tensor) -> tuple[Tensor, ...]:
    """What `exact` gives, from the kernels."""
    u, dz, s, ds, down, up, gate = given.values()
    z = expand(u, s, up, gate, out=outs.get("z"), config=config)
    return z, *kernel.gradients(dz, u, s, ds, down, gate, needs=ALL, out=outs.get("du"), config=config)


def check(results: tuple[Tensor, ...], given: dict[str, Tensor]) -> None:
    dtype = given["u"].dtype
    dtypes = (dtype, dtype, dtype, torch.float32, torch.float32)
    for out, reference, expected in zip(results, exact(given), dtypes, strict=True):
        assert (out.dtype, out.shape) == (expected, reference.shape)
        assert relative_error(out, reference) <= tolerance(expected)


# --- the kernels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 5, 16, 24, 100, 256])
@DTYPES
def test_both_kernels_match_float64_at_every_rank(dtype, rank, device):
    given = draw(device, 37, 75, rank, dtype)
    check(both(given), given)


@pytest.mark.parametrize("shape", [(1, 1), (1, 150), (2, 8), (129, 7), (65, 64), (17, 129)], ids=str)
@pytest.mark.parametrize("config", [None, SMALL, SMALL._replace(form=APART)], ids=["default", "small", "apart"])
def test_shapes_need_not_fit_the_blocks(config, shape, device, chunks):
    given = draw(device, *shape, 5)
    check(both(given, config), given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_config_gives_the_same_result(dtype, device, chunks):
    given = draw(device, 70, 270, 9, dtype)
    chips = [(8, 0), (9, 0), (12, 0)]
    found = {kernel.configs("backward", dtype, rank, chip) for rank in (16, 32, 64, 128, 256) for chip in chips}
    found |= {kernel.configs("expand", dtype, rank, (9, 0)) for rank in (16, 256)}
    assert len(found) > 4
    for config in found:
        check(both(given, config), given)


@pytest.mark.parametrize("layout", ["rows", "odd", "columns", "strided"])
@pytest.mark.parametrize("config", [SMALL, SMALL._replace(form=APART)], ids=["together", "apart"])
def test_any_strides_are_read_in_place_and_nothing_beside_them(config, layout, device, chunks, guarded):
    given = draw(device, 41, 67, 5)
    inside = {name: guarded(tuple(t.shape), t.dtype, layout, t) for name, t in given.items()}
    check(both(inside, config), given)


@pytest.mark.parametrize("wide", ["u", "dz", "down", "up"])
def test_tensors_of_different_strides_are_each_read_by_their_own(wide, device, guarded):
    given = draw(device, 41, 67, 5)
    inside = given | {wide: guarded(tuple(given[wide].shape), torch.float32, "strided", given[wide])}
    check(both(inside, SMALL), given)


@pytest.mark.parametrize("layout", ["rows", "odd"])
def test_outputs_are_written_whole_and_nothing_beside_them(layout, device, chunks, guarded):
    given = draw(device, 41, 67, 5)
    z, du = (guarded((41, 67), torch.float32, layout) for _ in range(2))
    results = both(given, SMALL, z=z, du=du)
    assert results[0] is z
    assert results[1] is du
    check(results, given)


def test_an_expanded_gradient_with_strides_of_zero_is_read(device):
    given = draw(device, 41, 67, 5)
    for dz in (given["dz"][:1].expand(41, 67), given["dz"][:, :1].expand(41, 67), given["dz"][:1, :1].expand(41, 67)):
        changed = given | {"dz": dz}
        check(both(changed, SMALL), changed)


@pytest.mark.parametrize("config", [SMALL, SMALL._replace(form=APART)], ids=["together", "apart"])
@pytest.mark.parametrize("needed", range(1, 16), ids="{:04b}".format)
def test_each_subset_of_the_sums_is_that_of_all(needed, config, device, chunks):
    given = draw(device, 41, 67, 5)
    u, dz, s, ds, down, _, gate = given.values()
    needs = [bool(needed & bit) for bit in (1, 2, 4, 8)]
    u, s = (u if needs[1] or needs[3] else None), (s if needs[2] else None)
    results = kernel.gradients(dz, u, s, ds, down, gate, needs=needs, config=config)
    for out, reference, wanted in zip(results, exact(given)[1:], needs, strict=True):
        assert out.numel() == (reference.numel() if wanted else 0)
        assert not wanted or relative_error(out, reference) <= tolerance(torch.float32)


def test_partial_sums_are_not_rounded_to_16_bits(device, chunks):
    given = draw(device, 64, 40, 5, torch.float16)
    for name in ("u", "dz"):  # all but one token cancels, from chunk to chunk
        given[name][32:] = given[name][:32]
    for name in ("s", "ds"):
        given[name][32:] = -given[name][:32]
        given[name][32] = 0
    check(both(given, SMALL), given)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # 0 · ∞, in numpy
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_non_finite_values_reach_their_row_and_column_and_no_others(value, device, chunks):
    given = draw(device, 41, 67, 5)
    given["u"][17, 33] = given["dz"][17, 33] = value
    z, du, ddown, p, dots = both(given, SMALL)
    for tile in (z, du):
        assert (~tile.isfinite()).nonzero().tolist() == [[17, 33]]
    for columns in (ddown.T, p, dots[:, None]):
        assert (~columns.isfinite().all(1)).nonzero().tolist() == [[33]]


def test_two_runs_give_the_same_bits(device, chunks):
    given = draw(device, 90, 130, 5)
    for first, second in zip(both(given, SMALL), both(given, SMALL), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("shape", [(0, 67), (0, 1)], ids=str)
def test_no_tokens_give_empty_rows_and_zero_sums(shape, device):
    z, du, *sums = both(draw(device, *shape, 5))
    assert z.shape == du.shape == shape
    assert all(not t.any() for t in sums)
    assert [t.numel() for t in sums] == [5 * shape[1], 5 * shape[1], shape[1]]


# --- the operator --------------------------------------------------------------------------------------------------


def moved(tensors: tuple[Tensor, ...], device) -> tuple[Tensor, ...]:
    return tuple(t.detach().to(device).requires_grad_(t.requires_grad) for t in tensors)


@pytest.mark.parametrize("factor_dtype", [None, torch.float32], ids=["same", "fp32 factors"])
@DTYPES
def test_output_and_every_gradient_match_float64(dtype, factor_dtype, device, chunks):
    tensors = moved(operands(2, 21, dtype=dtype, factor_dtype=factor_dtype, gate_dtype=factor_dtype), device)
    expected = [dtype, dtype, *[factor_dtype or dtype] * 3]
    for out, reference, want in zip(
        gradients(residual_low_rank, tensors), gradients(plain, in_double(tensors)), expected, strict=True
    ):
        assert out.dtype == want
        assert relative_error(out, reference) <= tolerance(dtype, roundings=2)


@pytest.mark.parametrize("trained", ["u", "d", "p", "g", "ud", "dpg", "udpg"])
def test_each_subset_of_gradients_is_that_of_the_formula(trained, device):
    tensors = moved(operands(9), device)
    for name, tensor in zip("udpg", tensors, strict=True):
        tensor.requires_grad_(name in trained)
    for out, reference in zip(
        gradients(residual_low_rank, tensors), gradients(plain, in_double(tensors)), strict=True
    ):
        assert relative_error(out, reference) <= tolerance(torch.float32)


@pytest.mark.parametrize("lead", [(1,), (2, 5), (0,), ()], ids=str)
def test_any_number_of_tokens(lead, device):
    _, *rest = moved(operands(), device)
    tensors = (torch.randn(*lead, 17, device=device, requires_grad=True), *rest)
    for out, reference in zip(
        gradients(residual_low_rank, tensors), gradients(plain, in_double(tensors)), strict=True
    ):
        assert out.shape == reference.shape
        assert relative_error(out, reference) <= tolerance(torch.float32)


def test_autocast_reads_an_fp32_stream_writes_one_and_multiplies_in_fp16(device):
    tensors = moved(operands(9), device)
    with torch.autocast(device.type, torch.float16):
        result = gradients(residual_low_rank, tensors)
        identity = residual_low_rank(*tensors[:2], tensors[2] * 0, torch.ones_like(tensors[3]))
    assert [out.dtype for out in result] == [torch.float32] * 5
    assert torch.equal(identity, tensors[0])
    for out, reference in zip(result, gradients(plain, in_double(tensors)), strict=True):
        assert relative_error(out, reference) <= 2 * TOLERANCE[torch.float16]


def test_in_place_operators_may_follow(device):
    tensors = moved(operands(2, 5), device)
    z = residual_low_rank(*tensors)
    z += 1
    z.relu_().sum().backward()
    references = torch.autograd.grad((plain(*tensors) + 1).relu().sum(), tensors)
    for tensor, reference in zip(tensors, references, strict=True):
        assert relative_error(tensor.grad, reference) <= tolerance(torch.float32)


def test_a_closed_channel_is_zero_and_passes_nothing_back_but_to_its_gate(device):
    tensors = moved(operands(31), device)
    z, _, _, dup, dgate = gradients(residual_low_rank, tensors)
    closed = tensors[3] == 0
    assert z[:, closed].eq(0).all()
    assert dup[closed].eq(0).all()
    assert dgate[closed].ne(0).all()


def test_backward_overwrites_nothing(device):
    tensors = moved(operands(5), device)
    dz = torch.randn(5, 17, device=device)
    before = [t.clone() for t in (*tensors, dz)]
    gradients(residual_low_rank, tensors, dz)
    assert all(torch.equal(*pair) for pair in zip(before, (*tensors, dz), strict=True))


def test_a_rank_above_the_kernels_is_an_error_with_its_reason(device):
    down, up = torch.randn(257, 17, device=device), torch.randn(17, 257, device=device)
    with pytest.raises(RuntimeError, match=r"residual_low_rank cannot run on Triton: rank 257 is above 256"):
        residual_low_rank(torch.randn(3, 17, device=device), down, up, torch.ones(17, device=device))
