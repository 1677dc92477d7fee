"""shrink, dual, outer and expand against float64, in every form that they are compiled in."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from petune.kernels import launch
from petune.kernels.chooser import Config
from petune.kernels.dropout import Mask, philox_lanes
from petune.kernels.launch import INTERPRETED
from petune.kernels.lora_linear import skinny
from petune.kernels.lora_linear.skinny import dual, expand, outer, shrink
from tests.conftest import TOLERANCE, relative_error

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
RANKS = [1, 5, 16, 24, 100, 256]
SCALE = 1.5
THRESHOLD = 20000  # drops 31 %
# tiles so small that every sum has several of them along each axis
SMALL = Config(16, 16, 4, 1)
KERNELS = ["shrink", "dual", "outer", "expand"]


def bound(dtype: torch.dtype) -> float:
    # the operands are exact in the reference, so what is left is the result's own rounding: to bf16 the interpreter
    # truncates, which is twice the error
    return TOLERANCE[dtype] * (2 if dtype == torch.bfloat16 and INTERPRETED else 1)


@pytest.fixture
def draw(device):
    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    return draw


@pytest.fixture
def mask(device) -> Mask:
    return Mask(torch.tensor([11 + (7 << 40)], device=device), THRESHOLD)


@pytest.fixture
def many_chunks(monkeypatch):
    """Every sum is split as far as it goes: as on a GPU that has more multiprocessors than there is work."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 10_000)


@pytest.fixture
def one_chunk(monkeypatch):
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 1)


def keep(mask: Mask, tokens: int, features: int) -> Tensor:
    return (philox_lanes(tokens, features, mask.seed) >= mask.threshold).double()


def check(out: Tensor, reference: Tensor, dtype: torch.dtype | None = None) -> None:
    dtype = dtype or out.dtype
    assert out.dtype == dtype
    assert out.shape == reference.shape
    assert relative_error(out, reference) <= bound(dtype)


def products(x: Tensor, s: Tensor, a: Tensor, m: Tensor | float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """scale · (x ⊙ m) aᵀ, scale · (x ⊙ m)ᵀ s and m ⊙ (scale · s a), in float64."""
    x, s, a = x.double(), s.double(), a.double()
    return SCALE * (x * m) @ a.T, SCALE * (x * m).T @ s, m * (SCALE * s @ a)


# --- the formulas --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_four_match_float64(dtype, rank, masked, draw, mask):
    tokens, features = 37, 75
    x, s, a = draw(tokens, features, dtype=dtype), draw(tokens, rank, dtype=dtype), draw(rank, features, dtype=dtype)
    mask = mask if masked else None
    rows, columns, tile = products(x, s, a, keep(mask, tokens, features) if mask else 1.0)
    check(shrink(x, a, scale=SCALE, mask=mask), rows)
    check(SCALE * outer(x, s, dtype=torch.float32, mask=mask).T, columns)
    check(expand(s, a.T, scale=SCALE, mask=mask), tile)
    if not masked:
        ds, db = dual(x, s, a.T.contiguous(), scale=SCALE)
        check(ds, rows)
        check(db, columns)


@pytest.mark.parametrize(("tokens", "features"), [(1, 1), (1, 150), (2, 8), (129, 7), (65, 64), (17, 129)], ids=str)
@pytest.mark.parametrize("config", [None, SMALL], ids=["default", "small"])
def test_shapes_need_not_fit_the_blocks(tokens, features, config, draw, mask):
    x, s, a = draw(tokens, features), draw(tokens, 5), draw(5, features)
    rows, columns, tile = products(x, s, a, keep(mask, tokens, features))
    check(shrink(x, a, scale=SCALE, mask=mask, config=config), rows)
    check(SCALE * outer(x, s, dtype=torch.float32, mask=mask, config=config).T, columns)
    check(expand(s, a.T, scale=SCALE, mask=mask, config=config), tile)
    rows, columns, _ = products(x, s, a)
    for out, reference in zip(dual(x, s, a.T, scale=SCALE, config=config), (rows, columns), strict=True):
        check(out, reference)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_config_gives_the_same_result(kernel, dtype, draw, mask):
    x, s, a = draw(70, 270, dtype=dtype), draw(70, 9, dtype=dtype), draw(9, 270, dtype=dtype)
    m = keep(mask, 70, 270)
    rows, columns, tile = products(x, s, a, 1.0 if kernel == "dual" else m)
    chips = [(8, 6), (9, 0)]
    found = {c for rank in (16, 64, 256) for chip in chips for c in skinny.configs(kernel, dtype, rank, chip)}
    assert found
    for config in found:
        if kernel == "shrink":
            check(shrink(x, a, scale=SCALE, mask=mask, config=config), rows, dtype)
        elif kernel == "outer":
            check(SCALE * outer(x, s, dtype=torch.float32, mask=mask, config=config).T, columns)
        elif kernel == "expand":
            check(expand(s, a.T, scale=SCALE, mask=mask, config=config), tile, dtype)
        else:
            ds, db = dual(x, s, a.T.float(), scale=SCALE, config=config)
            check(ds, rows, dtype)
            check(db, columns, torch.float32)


def test_tables_hold_a_default_and_at_most_four_configs_for_every_rank():
    for kernel in KERNELS:
        for dtype in DTYPES:
            for rank_block in (16, 32, 64, 128, 256):
                for chip in [(8, 0), (8, 6), (9, 0), (12, 0)]:
                    assert 1 <= len(skinny.configs(kernel, dtype, rank_block, chip)) <= 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fp32_adapters_on_a_16_bit_base_get_unrounded_sums(dtype, draw):
    x, s = draw(130, 40, dtype=dtype), draw(130, 6, dtype=dtype)
    a = draw(6, 40, dtype=dtype).float()  # exact in both, so that only the sums are compared
    rows, columns, tile = products(x, s, a)
    check(shrink(x, a, scale=SCALE), rows, dtype)
    check(expand(s, a.T, scale=SCALE), tile, dtype)
    check(SCALE * outer(x, s, dtype=torch.float32).T, columns, torch.float32)
    check(outer(x, s, dtype=dtype).T, columns / SCALE, dtype)
    for config in (SMALL, skinny.TWO_READS):
        ds, db = dual(x, s, a.T, scale=SCALE, config=config)
        check(ds, rows, dtype)
        check(db, columns, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("accumulate", [False, True], ids=["written", "added"])
def test_expand_adds_the_bias_and_what_was_there(dtype, accumulate, draw, mask, guarded):
    s, b, bias, before = (draw(*shape, dtype=dtype) for shape in ((21, 5), (35, 5), (70,), (21, 35)))
    bias = bias[::2]
    out = guarded((21, 35), dtype, "odd", before if accumulate else None)
    reference = keep(mask, 21, 35) * (SCALE * s.double() @ b.double().T) + bias.double()
    y = expand(s, b, scale=SCALE, bias=bias, mask=mask, out=out, accumulate=accumulate)
    assert y is out
    check(y, reference + before.double() if accumulate else reference)


def test_expand_into_another_dtype_rounds_once(draw):
    s, b = draw(21, 5, dtype=torch.float16), draw(35, 5, dtype=torch.float16)
    out = torch.empty(21, 35, device=s.device)
    check(expand(s, b, out=out), s.double() @ b.double().T, torch.float32)


# --- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["rows", "odd", "columns", "strided"])
def test_any_strides_are_read_in_place_and_nothing_beside_them(layout, draw, mask, guarded, many_chunks):
    values = draw(41, 67), draw(41, 5), draw(5, 67)
    x, s, a = (guarded(tuple(v.shape), v.dtype, layout, v) for v in values)
    rows, columns, tile = products(*values, keep(mask, 41, 67))
    check(shrink(x, a, scale=SCALE, mask=mask), rows)
    check(SCALE * outer(x, s, dtype=torch.float32, mask=mask).T, columns)
    check(expand(s, a.T, scale=SCALE, mask=mask), tile)
    rows, columns, _ = products(*values)
    for config in (SMALL, skinny.TWO_READS):
        ds, db = dual(x, s, a.T, scale=SCALE, config=config)
        check(ds, rows)
        check(db, columns)


def test_an_expanded_gradient_with_strides_of_zero_is_read(draw):
    s, a = draw(41, 5), draw(5, 67)
    for dy in (draw(1, 67).expand(41, 67), draw(41, 1).expand(41, 67), draw(1, 1).expand(41, 67)):
        rows, columns, _ = products(dy, s, a)
        ds, db = dual(dy, s, a.T, scale=SCALE)
        check(ds, rows)
        check(db, columns)


@pytest.mark.parametrize("layout", ["rows", "odd", "columns", "strided"])
@pytest.mark.parametrize("chunks", ["one_chunk", "many_chunks"])
def test_outputs_are_written_whole_and_nothing_beside_them(layout, chunks, draw, guarded, request):
    request.getfixturevalue(chunks)
    x, s, a = draw(41, 67), draw(41, 5), draw(5, 67)
    rows, columns, tile = products(x, s, a)
    out = guarded((41, 5), x.dtype, layout)
    assert shrink(x, a, scale=SCALE, out=out, config=SMALL) is out
    check(out, rows)
    for config in (SMALL, skinny.TWO_READS):
        out = guarded((41, 5), x.dtype, layout)
        ds, db = dual(x, s, a.T, scale=SCALE, out_ds=out, config=config)
        assert ds is out
        check(out, rows)
        check(db, columns)
    out = guarded((41, 67), x.dtype, layout)
    assert expand(s, a.T, scale=SCALE, out=out) is out
    check(out, tile)


@pytest.mark.parametrize("transposed", [False, True], ids=["tokens", "features"])
def test_addresses_beyond_32_bits(transposed, draw, device):
    stride = 1 << 30  # below 2^31 itself: only its product with an index is too large
    size = 3 * stride + 16
    # pages of 6 GB that nothing touches cost nothing on a CPU
    flat = torch.from_numpy(np.zeros(size, np.float16)) if device.type == "cpu" else torch.zeros(size, device=device)
    long = flat.as_strided((4, 9), (stride, 1))
    long.copy_(draw(4, 9))
    x = long.T if transposed else long
    s, a = draw(x.shape[0], 5, dtype=x.dtype), draw(5, x.shape[1], dtype=x.dtype)
    rows, columns, tile = products(x, s, a)
    check(shrink(x, a, scale=SCALE), rows)
    check(SCALE * outer(x, s, dtype=torch.float32).T, columns)
    check(expand(s, a.T, scale=SCALE, out=x), tile)


def test_no_tokens_give_empty_rows_and_zero_sums(draw, mask):
    x, s, a = draw(0, 67), draw(0, 5), draw(5, 67)
    assert shrink(x, a, mask=mask).shape == (0, 5)
    assert expand(s, a.T, mask=mask).shape == (0, 67)
    assert torch.equal(outer(x, s, dtype=torch.float16), torch.zeros(5, 67, dtype=torch.float16, device=x.device))
    for config in (None, SMALL, skinny.TWO_READS):
        ds, db = dual(x, s, a.T, scale=SCALE, config=config)
        assert ds.shape == (0, 5)
        assert torch.equal(db, torch.zeros_like(a.T))


# --- the mask ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", ["one_chunk", "many_chunks"])
@pytest.mark.parametrize("config", [None, SMALL, Config(32, 8, 4, 1)], ids=["default", "small", "narrow"])
def test_one_mask_in_shrink_outer_and_expand_in_every_split(config, chunks, device, mask, request):
    request.getfixturevalue(chunks)
    tokens, features = 37, 75
    m = keep(mask, tokens, features).float()
    assert 0.2 < 1 - m.mean() < 0.4
    ones, eye = torch.ones(tokens, features, device=device), torch.eye(features, device=device)
    if config is None or config.block_features >= 16:  # as the rank, features take a block of 16 at least
        assert torch.equal(shrink(ones, eye, mask=mask, config=config), m)
    one = torch.ones(tokens, 1, device=device)
    assert torch.equal(outer(ones, torch.eye(tokens, device=device), dtype=torch.float32, mask=mask, config=config), m)
    assert torch.equal(expand(one, torch.ones(features, 1, device=device), mask=mask, config=config), m)


def test_dropped_values_are_zero_whatever_they_were(draw, mask):
    tokens, features = 37, 75
    m = keep(mask, tokens, features).bool()
    x, s, a = draw(tokens, features), draw(tokens, 5), draw(5, features)
    poisoned = torch.where(m, x, torch.nan)
    assert torch.equal(shrink(poisoned, a, mask=mask), shrink(x, a, mask=mask))
    assert torch.equal(outer(poisoned, s, dtype=x.dtype, mask=mask), outer(x, s, dtype=x.dtype, mask=mask))
    y = expand(torch.full_like(s, torch.inf), a.abs().T, mask=mask)
    assert torch.equal(y, torch.where(m, torch.inf, 0.0))


def test_a_threshold_of_zero_keeps_all_and_the_largest_almost_none(draw, mask):
    x, a = draw(37, 75), draw(5, 75)
    assert torch.equal(shrink(x, a, mask=mask._replace(threshold=0)), shrink(x, a))
    assert shrink(x, a, mask=mask._replace(threshold=65535)).count_nonzero() <= 5


# --- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_non_finite_values_reach_their_row_and_column_and_no_others(value, draw, many_chunks):
    x, s, a = draw(41, 67), draw(41, 5), draw(5, 67)
    x[17, 33] = value
    ds, db = dual(x, s, a.T, scale=SCALE, config=SMALL)
    rows = torch.arange(41, device=x.device) == 17
    columns = torch.arange(67, device=x.device) == 33
    for out, hit in ((shrink(x, a), rows), (ds, rows), (db, columns), (outer(x, s, dtype=x.dtype).T, columns)):
        assert torch.equal(~out.isfinite().all(dim=1), hit)
        assert torch.equal(~out.isfinite().any(dim=1), hit)
    assert torch.equal(~expand(x[:, 30:35], a.T).isfinite().all(dim=1), rows)


def test_two_runs_give_the_same_bits(draw, mask, many_chunks):
    x, s, a = draw(90, 130), draw(90, 5), draw(5, 130)

    def run() -> list[Tensor]:
        return [
            shrink(x, a, mask=mask),
            outer(x, s, dtype=x.dtype, mask=mask),
            expand(s, a.T, mask=mask),
            *dual(x, s, a.T, scale=SCALE, config=SMALL),
        ]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_partial_sums_are_not_rounded_to_16_bits(draw, many_chunks):
    u, c = draw(33, 128, dtype=torch.float16), draw(5, 128, dtype=torch.float16)
    rest = c.clone()
    rest[:, 0] = 0
    x, a = torch.cat((u, -u), dim=1), torch.cat((c, rest), dim=1)  # all but one column cancels, from chunk to chunk
    check(shrink(x, a, config=SMALL), x.double() @ a.double().T)
    check(dual(x, a.T[:33, :], a.T, scale=1.0, config=SMALL)[0], x.double() @ a.double().T)


@pytest.mark.parametrize("multiprocessors", [1, 7, 132, 10_000])
def test_the_split_covers_a_sum_once_and_starts_no_program_in_vain(multiprocessors, monkeypatch, device):
    monkeypatch.setattr(launch, "multiprocessors", lambda device: multiprocessors)
    for blocks in (1, 3, 16, 98, 99, 500):
        for summed in (1, 2, 3, 31, 32, 33, 1000):
            chunks, per_chunk = launch.split(blocks, summed, device)
            assert (chunks - 1) * per_chunk < summed <= chunks * per_chunk
            assert chunks == 1 or chunks * blocks <= 2 * multiprocessors


@st.composite
def cases(draw_from):
    size = st.integers(1, 40)
    return {
        "tokens": draw_from(size),
        "features": draw_from(size),
        "rank": draw_from(st.integers(1, 20)),
        "transposed": draw_from(st.booleans()),
        "step": draw_from(st.integers(1, 3)),
        "masked": draw_from(st.booleans()),
        "dtype": draw_from(st.sampled_from(DTYPES[:2])),
        "multiprocessors": draw_from(st.sampled_from([1, 10_000])),
    }


@settings(
    max_examples=15,  # on a GPU each compiles kernels of its own
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(case=cases())
def test_any_small_problem_matches_float64(case, draw, mask, monkeypatch):
    monkeypatch.setattr(launch, "multiprocessors", lambda device: case["multiprocessors"])
    tokens, features, rank, dtype = (case[name] for name in ("tokens", "features", "rank", "dtype"))
    shape = (features, tokens) if case["transposed"] else (tokens, features)
    x = draw(shape[0], shape[1] * case["step"], dtype=dtype)[:, :: case["step"]]
    x = x.T if case["transposed"] else x
    s, a = draw(tokens, rank, dtype=dtype), draw(rank, features, dtype=dtype)
    mask = mask if case["masked"] else None
    m = keep(mask, tokens, features) if mask else 1.0
    rows, columns, tile = products(x, s, a, m)
    # one product of a few terms may cancel: then its error is measured against the size of the terms
    for out, reference in (
        (shrink(x, a, scale=SCALE, mask=mask, config=SMALL), rows),
        (SCALE * outer(x, s, dtype=torch.float32, mask=mask, config=SMALL).T, columns),
        (expand(s, a.T, scale=SCALE, mask=mask, config=SMALL), tile),
    ):
        assert (out.double() - reference).norm() <= bound(out.dtype) * (reference.norm() + 0.1)
    for out, reference in zip(dual(x, s, a.T, scale=SCALE, config=SMALL), products(x, s, a)[:2], strict=True):
        assert (out.double() - reference).norm() <= bound(out.dtype) * (reference.norm() + 0.1)
