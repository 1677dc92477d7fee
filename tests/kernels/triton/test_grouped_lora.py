"""`grouped_lora` and `grouped_packed_lora` on their Triton kernels, and each of the kernels, against float64."""

import pytest
import torch
from torch import Tensor

from petune.kernels import launch
from petune.kernels.chooser import Config
from petune.kernels.dropout import mask_of, philox_lanes
from petune.kernels.grouped_lora import (
    JoinedFactors,
    PackedFactors,
    RowGroups,
    grouped_joined_lora,
    grouped_lora,
    grouped_lora_projections,
    grouped_packed_lora,
)
from petune.kernels.grouped_lora import packed_skinny as packed
from petune.kernels.grouped_lora.layout import Dropped, Layout, table
from petune.kernels.grouped_lora.skinny import configs, dual, expand, outer, shrink
from petune.kernels.launch import INTERPRETED
from petune.kernels.packed_lora import unpacked
from tests.conftest import TOLERANCE, relative_error
from tests.kernels import test_grouped_projections as projections
from tests.kernels.grouped import RANKS, ROWS, SCALES, batch, detached, gradients, in_double, loop, tokens_of

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FP32 = torch.float32
SMALL = Config(16, 16, 4, 1)  # tiles so small that every sum has several of them
DROPOUT = (0.4, 0.0, 0.5, 0.3, 0.2)
SIZES = {"in_features": 40, "out_features": 36}
EDGES = (0,) * 16 + (-1,) + (2,) * 17 + (3,) + (4,) * 32 + (0,)  # with tiles of 16: full ones, one token more, none
TIGHT = (0,) + (1,) * 17 + (2,) * 33 + (3, 4)  # as many tiles as there can be


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


def bound(dtype: torch.dtype) -> float:
    # s and the low-rank term are each rounded once to the storage dtype; the interpreter truncates to bf16
    return TOLERANCE[dtype] * (4 if dtype == torch.bfloat16 and INTERPRETED else 2)


# --- the operator --------------------------------------------------------------------------------------------------


def keep(ids, tokens: int, features: int, device, dropout_p=DROPOUT) -> dict[int, Tensor]:
    """The masks of seeds 0, 1, … with their 1/q, each of its adapter's tokens."""
    found = {}
    for i, p in enumerate(dropout_p):
        mask = mask_of(p, torch.tensor([i], device=device))
        own = len(tokens_of(i, ids, tokens))
        found[i] = philox_lanes(own + 1, features, mask.seed)[:own].ge(mask.threshold) / mask.keep_probability
    return found


def updates(found: list[Tensor], tensors, dy: Tensor) -> list[Tensor]:
    """Rounding of y and dx would hide a broken update: what the base contributes is taken away."""
    y, dx, *factors = found
    base = torch.nn.functional.linear(*(t.double() for t in tensors[:3]))
    return [y.double() - base, dx.double() - dy.double() @ tensors.weight.double(), *factors]


def run(tensors, ids, dy: Tensor, **dropout) -> list[Tensor]:
    groups = RowGroups.of(torch.tensor(ids, dtype=torch.int64, device=dy.device), len(tensors.a))
    return updates(gradients(grouped_lora(*tensors, SCALES, groups, **dropout), tensors, dy), tensors, dy)


def exact(tensors, ids, dy: Tensor, masks=None) -> list[Tensor]:
    wide = in_double(tensors)
    return updates(gradients(loop(wide, ids, masks), wide, dy.double()), tensors, dy)


@pytest.mark.parametrize("dropped", [False, True], ids=["plain", "dropout"])
@pytest.mark.parametrize("adapter_dtype", [None, FP32], ids=["same", "fp32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_update_and_every_gradient_match_float64(dtype, adapter_dtype, dropped, device):
    tensors, ids = batch(7, 3, dtype=dtype, adapter_dtype=adapter_dtype, device=device, **SIZES), ROWS["scattered"]
    dy = torch.randn(7, 3, 36, device=device).to(dtype)
    dropout = {"dropout_p": DROPOUT, "seeds": range(5)} if dropped else {}
    masks = keep(ids, 21, 40, device) if dropped else None
    found = run(tensors, ids, dy, **dropout)
    assert [t.dtype for t in found[2:]] == [adapter_dtype or dtype] * 10
    for out, reference in zip(found, exact(tensors, ids, dy, masks), strict=True):
        # an update is about as large as the frozen output here, so that the output's own rounding counts once more
        assert relative_error(out, reference) <= 2 * bound(dtype)


@pytest.mark.parametrize("per_row", [0, 1, 13])
@pytest.mark.parametrize("ids", [*ROWS.values(), ()], ids=[*ROWS, "no rows"])
def test_any_rows_and_any_tokens_of_a_row(ids, per_row, device):
    tensors = batch(len(ids), per_row, device=device, **SIZES)
    groups = RowGroups.of(torch.tensor(ids, dtype=torch.int64, device=device), 5)
    wide = in_double(tensors)
    found = gradients(grouped_lora(*tensors, SCALES, groups), tensors)
    for out, reference in zip(found, gradients(loop(wide, ids), wide), strict=True):
        assert relative_error(out, reference) <= 2 * bound(FP32)


@pytest.mark.parametrize("ranks", [(7,), (16, 16, 16), (33, 1, 100), (256, 5, 64)], ids=str)
def test_any_ranks(ranks, device):
    tensors = batch(5, 4, ranks=ranks, device=device, **SIZES)
    dy, scales = torch.randn(5, 4, 36, device=device), SCALES[: len(ranks)]
    ids = tuple(i % (len(ranks) + 1) - 1 for i in range(5))
    groups = RowGroups.of(ids, len(ranks))
    found = updates(gradients(grouped_lora(*tensors, scales, groups), tensors, dy), tensors, dy)
    wide = in_double(tensors)
    reference = updates(gradients(loop(wide, ids, scales=scales), wide, dy.double()), tensors, dy)
    for out, expected in zip(found, reference, strict=True):
        assert relative_error(out, expected) <= 4 * bound(FP32)


def test_joined_factors_give_what_they_give_one_by_one(device):
    tensors = detached(batch(7, 3, device=device, **SIZES))
    groups = RowGroups.of(ROWS["scattered"], 5)
    y = grouped_joined_lora(*tensors[:3], JoinedFactors.of(tensors.a, tensors.b, SCALES), groups)
    assert torch.equal(y, grouped_lora(*tensors, SCALES, groups))


@pytest.mark.parametrize("given", [{}, {"dropout_p": DROPOUT, "seeds": range(5)}, None], ids=["plain", "x", "rank"])
def test_projections_of_one_x_give_what_each_gives_by_itself(given, device):
    layers, groups = projections.layers(7, 3, device=device), RowGroups.of(ROWS["scattered"], 5)
    x, *columns = layers
    mask = torch.rand(21, 8, device=device).round().mul(2)
    masks = [{"rank_mask": mask[:, : max(ranks)]} if given is None else given for ranks in projections.RANKS]
    given = {"rank_mask": mask} if given is None else given
    each = zip(zip(*columns, projections.SCALES, strict=True), masks, strict=True)
    apart = [grouped_lora(x, *own, groups, **dropped) for own, dropped in each]
    ours = projections.gradients(grouped_lora_projections(*layers, projections.SCALES, groups, **given), layers)
    for out, exact in zip(ours, projections.gradients(apart, layers), strict=True):
        assert relative_error(out, exact) <= 2 * TOLERANCE[FP32]


@pytest.mark.parametrize("trained", ["x", "a", "b"])
def test_each_gradient_alone_is_the_same_as_with_all_others(trained, device):
    tensors, dy = batch(7, 3, device=device, **SIZES), torch.randn(7, 3, 36, device=device)
    dropout = {"dropout_p": DROPOUT, "seeds": range(5)}
    whole = dict(zip(map(id, tensors.trained), run(tensors, ROWS["sorted"], dy, **dropout)[1:], strict=True))
    for name, group in zip("xab", ([tensors.x], tensors.a, tensors.b), strict=True):
        for t in group:
            t.requires_grad_(name == trained)
    groups = RowGroups.of(ROWS["sorted"], 5)
    found = gradients(grouped_lora(*tensors, SCALES, groups, **dropout), tensors, dy)[1:]
    found = [found[0].double() - dy.double() @ tensors.weight.double()] if trained == "x" else found
    for out, tensor in zip(found, tensors.trained, strict=True):
        assert relative_error(out, whole[id(tensor)]) <= TOLERANCE[FP32]


@pytest.mark.parametrize("where", ["a", "b", "x", "dy"])
def test_a_non_finite_adapter_or_row_changes_no_bit_of_another(where, device, many_chunks):
    tensors, dy, ids = batch(7, 3, device=device, **SIZES), torch.randn(7, 3, 36, device=device), ROWS["scattered"]
    dropout = {"dropout_p": DROPOUT, "seeds": range(5)}
    groups = RowGroups.of(ids, 5)
    clean = gradients(grouped_lora(*tensors, SCALES, groups, **dropout), tensors, dy)
    own = torch.tensor([i == 4 for i in ids], device=device)
    poisoned = {"a": tensors.a[4], "b": tensors.b[4], "x": tensors.x, "dy": dy}[where].detach()
    poisoned[own if where in ("x", "dy") else 0] = torch.nan
    y, dx, *factors = gradients(grouped_lora(*tensors, SCALES, groups, **dropout), tensors, dy)
    assert torch.equal(y[~own], clean[0][~own])
    assert torch.equal(dx[~own], clean[1][~own])
    assert not (dx if where == "dy" else y)[own].isfinite().all()
    for i, (out, before) in enumerate(zip(factors, clean[2:], strict=True)):
        assert torch.equal(out, before) or i % 5 == 4


def test_a_token_index_overrides_the_count(device):
    tensors, dy, ids = batch(7, 3, device=device, **SIZES), torch.randn(7, 3, 36, device=device), ROWS["scattered"]
    dropout = {"dropout_p": DROPOUT, "seeds": range(5)}
    index = torch.zeros(21, dtype=torch.int64, device=device)
    for i in range(5):
        own = tokens_of(i, ids, 21)
        index[own] = torch.arange(len(own), device=device).flip(0)
    masks = {i: mask.flip(0) for i, mask in keep(ids, 21, 40, device).items()}
    for out, reference in zip(
        run(tensors, ids, dy, token_index=index, **dropout), exact(tensors, ids, dy, masks), strict=True
    ):
        assert relative_error(out, reference) <= 2 * bound(FP32)


@pytest.mark.parametrize("ids", [ROWS["scattered"], ROWS["beside each other"]], ids=["scattered", "beside"])
def test_a_rank_mask_lies_between_the_factors(ids, device, monkeypatch):
    tensors, dy = batch(7, 3, device=device, **SIZES), torch.randn(7, 3, 36, device=device)
    mask = torch.rand(21, max(RANKS), device=device).round().mul(2)
    ours = run(tensors, ids, dy, rank_mask=mask)
    monkeypatch.setenv("PETUNE_KERNELS", "reference")
    for out, reference in zip(ours, run(tensors, ids, dy, rank_mask=mask), strict=True):
        assert relative_error(out, reference) <= 4 * bound(FP32)


def test_two_runs_give_the_same_bits_and_so_does_one_without_gradients(device, many_chunks):
    tensors, dy = batch(68, device=device, **SIZES), torch.randn(68, 36, device=device)
    groups, dropout = RowGroups.of(EDGES, 5), {"dropout_p": DROPOUT, "seeds": range(5)}
    first, second = (gradients(grouped_lora(*tensors, SCALES, groups, **dropout), tensors, dy) for _ in range(2))
    for out, again in zip(first, second, strict=True):
        assert torch.equal(out, again)
    with torch.no_grad():
        assert torch.equal(grouped_lora(*tensors, SCALES, groups, **dropout), first[0])


def test_ranks_beyond_the_kernels_are_an_error_that_says_why(device):
    tensors = batch(3, ranks=(1, 257), device=device)
    with pytest.raises(RuntimeError, match=r"grouped_lora cannot run on Triton: rank 257 is above 256"):
        grouped_lora(*tensors, (1.0, 1.0), RowGroups.of((0, 1, -1), 2))


# --- the kernels ---------------------------------------------------------------------------------------------------


class Case:
    """Values for all kernels, and what they give in float64, for tokens in the order of the adapters."""

    def __init__(self, ids, per_row: int, features: int, device, *, dtype=FP32, ranks=RANKS) -> None:
        self.ids, self.ranks = ids, ranks
        self.tokens, self.features = len(ids) * per_row, features
        self.layout = Layout.of(*RowGroups.of(ids, len(ranks)).sorted_on(device), ranks)
        self.own = [self.index(i) for i in range(len(ranks))]
        self.x = torch.randn(self.tokens, features, device=device).to(dtype)
        self.a = torch.randn(sum(ranks), features, device=device).to(dtype)
        self.s = torch.randn(self.tokens, max(ranks), device=device).to(dtype)
        self.y = torch.randn(self.tokens, features, device=device).to(dtype)
        self.scales = table(SCALES[: len(ranks)], FP32, device)
        self.masks = Dropped.of(list(DROPOUT), torch.arange(5, device=device), None)
        self.m = {i: (mask > 0).double() for i, mask in keep(ids, self.tokens, features, device).items()}

    def index(self, i: int) -> Tensor:
        """The tokens that take an adapter."""
        return torch.tensor(tokens_of(i, self.ids, self.tokens), dtype=torch.int64, device=self.layout.order.device)

    def places(self, i: int) -> slice:
        base = sum(own == -1 for own in self.ids) * self.tokens // len(self.ids)
        first = base + sum(len(own) for own in self.own[:i])
        return slice(first, first + len(self.own[i]))

    def factors(self) -> list[Tensor]:
        return list(self.a.double().split(self.ranks))

    def check(self, kernel: str, config=None, dtype: torch.dtype | None = None, masked: bool = True, **held) -> None:
        x, a, s = (held.get(name, getattr(self, name)) for name in ("x", "a", "s"))
        limit, masks = bound(dtype or x.dtype), self.masks if masked else None
        if kernel == "shrink":
            out = shrink(x, a, self.layout, scales=self.scales, masks=masks, config=config)
            found, of = [out[self.places(i), :rank] for i, rank in enumerate(self.ranks)], self.rows
        elif kernel == "outer":
            out = outer(x, s, self.layout, dtype=FP32, masks=masks, config=config)
            found, of, limit = list(out.split(self.ranks)), self.columns, bound(FP32)
        elif kernel == "expand":
            out = expand(
                s, a, self.layout, out=held.get("out", self.y.clone()), scales=self.scales, masks=masks, config=config
            )
            assert torch.equal(out[self.index(-1)], self.y[self.index(-1)])
            found, of = [out[own].double() - self.y[own].double() for own in self.own], self.tiles
            limit = 2 * limit  # rounded together with what was there
        else:
            ds, db = dual(x, s, a.T, self.layout, scales=self.scales, dtype=FP32, config=config)
            found, of, masked = [ds[self.places(i), :rank] for i, rank in enumerate(self.ranks)], self.rows, False
            pieces = db.split([self.features * rank for rank in self.ranks])
            for i, (piece, scale) in enumerate(zip(pieces, SCALES, strict=False)):
                out = piece.view(self.features, self.ranks[i])
                assert relative_error(out, scale * self.columns(i, False).T) <= bound(FP32)
        for i, out in enumerate(found):
            assert relative_error(out, of(i, masked)) <= limit, (kernel, i)

    def part(self, i: int, masked: bool) -> Tensor:
        return self.x[self.own[i]].double() * (self.m[i] if masked else 1.0)

    def rows(self, i: int, masked: bool) -> Tensor:
        return SCALES[i] * self.part(i, masked) @ self.factors()[i].T

    def columns(self, i: int, masked: bool) -> Tensor:
        return self.s[self.places(i), : self.ranks[i]].double().T @ self.part(i, masked)

    def tiles(self, i: int, masked: bool) -> Tensor:
        update = SCALES[i] * self.s[self.places(i), : self.ranks[i]].double() @ self.factors()[i]
        return update * self.m[i] if masked else update


KERNELS = ["shrink", "outer", "expand", "dual"]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("chunks", ["one_chunk", "many_chunks"])
@pytest.mark.parametrize("config", [None, SMALL], ids=["default", "small"])
@pytest.mark.parametrize(
    ("ids", "per_row", "features"),
    [(EDGES, 1, 35), (TIGHT, 1, 20), (ROWS["scattered"], 13, 129)],
    ids=["edges", "tight", "rows"],
)
def test_tiles_need_not_fit_the_adapters(ids, per_row, features, config, chunks, kernel, device, request):
    request.getfixturevalue(chunks)
    Case(ids, per_row, features, device).check(kernel, config)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [FP32, torch.float16], ids=str)
def test_every_config_gives_the_same_result(kernel, dtype, device):
    case = Case(ROWS["scattered"], 11, 150, device, dtype=dtype)
    found = {config for rank in (16, 64, 128, 256) for config in configs(kernel, dtype, rank)}
    assert found
    for config in found:
        case.check(kernel, config)


@pytest.mark.parametrize("kernel", KERNELS)
def test_fp32_factors_of_a_16_bit_base_give_unrounded_sums(kernel, device):
    case = Case(ROWS["scattered"], 5, 40, device, dtype=torch.float16)
    case.check(kernel, SMALL, a=case.a.float())


@pytest.mark.parametrize("layout", ["rows", "odd", "columns", "strided"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_any_strides_are_read_in_place_and_nothing_beside_them(kernel, layout, device, guarded, many_chunks):
    case = Case(ROWS["scattered"], 5, 67, device)
    held = {name: guarded(tuple(t.shape), t.dtype, layout, t) for name, t in (("x", case.x), ("a", case.a))}
    held["s"] = guarded(tuple(case.s.shape), case.s.dtype, "odd", case.s)
    held["out"] = guarded(tuple(case.y.shape), case.y.dtype, layout, case.y)
    case.check(kernel, SMALL, **held)


@pytest.mark.parametrize("kernel", ["shrink", "expand"])
def test_rows_past_the_last_adapter_take_none(kernel, device):
    whole = Case((0, 4, 4, 1, 2, 3, 4, 4), 5, 67, device)
    order, offsets, ranks, starts = whole.layout
    layout = Layout(order, offsets[:5], ranks[:4], starts[:5])  # as on a GPU, where no id is checked
    if kernel == "expand":
        out = expand(whole.s, whole.a, layout, out=whole.y.clone(), scales=whole.scales)
        assert torch.equal(out[whole.own[4]], whole.y[whole.own[4]])
    else:
        s = shrink(whole.x, whole.a, layout)
        assert s[whole.places(4)].isnan().all()  # as it was allocated
        assert s[whole.places(3), : ranks[3]].isfinite().all()


@pytest.mark.parametrize("chunks", ["one_chunk", "many_chunks"])
def test_an_adapter_in_no_row_gets_zeros(chunks, device, request):
    request.getfixturevalue(chunks)
    case = Case((0, 0, -1), 20, 35, device)
    da = outer(case.x, case.s, case.layout, dtype=FP32, config=SMALL)
    _, db = dual(case.x, case.s, case.a.T, case.layout, scales=case.scales, dtype=FP32, config=SMALL)
    assert da.isfinite().all()
    assert not da[RANKS[0] :].any()
    assert not db[RANKS[0] * 35 :].any()
    assert db[: RANKS[0] * 35].all()


def test_addresses_beyond_32_bits(device):
    if device.type == "cpu":
        import numpy as np

        flat = torch.from_numpy(np.zeros((3 << 30) + 16, np.float16))  # pages that nothing touches cost nothing
    else:
        flat = torch.zeros((3 << 30) + 16, dtype=torch.float16, device=device)
    case = Case((1, 0, 1, 0), 1, 9, device, dtype=torch.float16)
    for strides in ((1 << 30, 1), (1, 1 << 28)):
        x = flat.as_strided((4, 9), strides)
        case.check("shrink", x=x.copy_(case.x))
        case.check("outer", x=x)
        case.check("expand", out=x.copy_(case.y))


# --- packed factors ------------------------------------------------------------------------------------------------


@pytest.fixture
def factors(device, guarded):
    """Codes with NaN's own bytes around them, levels in a NaN-filled buffer; and the two dense matrices of each."""

    def one(rows: int, columns: int, bits: int, by_row: bool) -> tuple[Tensor, Tensor, Tensor]:
        size = -(-rows * columns * bits // 8)
        codes = guarded((size,), torch.uint8, values=torch.randint(0, 256, (size,), dtype=torch.uint8, device=device))
        shape = (rows if by_row else 1, 2**bits)
        levels = guarded(shape, FP32, "odd", torch.randn(shape, device=device))
        return codes, levels, unpacked(codes, levels, (rows, columns), bits).double()

    def draw(bits, ranks, in_features: int, out_features: int):
        made, dense = [], []
        for i, (width, rank) in enumerate(zip(bits, ranks, strict=True)):
            a_bits, a_levels, a = one(rank, in_features, width, i % 2 == 0)
            b_bits, b_levels, b = one(out_features, rank, width, i % 3 == 0)
            made.append(PackedFactors(a_bits, a_levels, b_bits, b_levels, rank, width, SCALES[i]))
            dense.append((a, b))
        return made, dense

    return draw


def packed_update(x: Tensor, dense, ids) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).double()
    y = torch.zeros(len(rows), len(dense[0][1]), dtype=torch.float64, device=x.device)
    for i, (a, b) in enumerate(dense):
        own = tokens_of(i, ids, len(rows))
        y[own] = SCALES[i] * (rows[own] @ a.T) @ b.T
    return y


@pytest.mark.parametrize("bits", [(1,) * 5, (4,) * 5, (1, 2, 1, 4, 8)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_packed_update_matches_float64(dtype, bits, device, factors):
    x, weight, bias = (torch.randn(*shape, device=device).to(dtype) for shape in ((7, 3, 37), (29, 37), (29,)))
    ids = ROWS["scattered"]
    made, dense = factors(bits, (1, 3, 8, 70, 5), 37, 29)
    y = grouped_packed_lora(x, weight, bias, made, RowGroups.of(torch.tensor(ids, device=device), 5))
    base = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    assert (y.shape, y.dtype) == (base.shape, dtype)
    assert relative_error((y.double() - base).view(21, 29), packed_update(x, dense, ids)) <= 2 * bound(dtype)


@pytest.mark.parametrize("config", [None, SMALL, "last"], ids=["default", "small", "last"])
@pytest.mark.parametrize("chunks", ["one_chunk", "many_chunks"])
@pytest.mark.parametrize(
    ("ids", "per_row", "bits"), [(EDGES, 1, 1), (ROWS["scattered"], 13, 2)], ids=["edges", "rows"]
)
def test_packed_tiles_need_not_fit_the_adapters(ids, per_row, bits, chunks, config, device, factors, guarded, request):
    request.getfixturevalue(chunks)
    made, dense = factors((bits,) * 5, RANKS, 67, 35)
    tokens = per_row * len(ids)
    values = torch.randn(tokens, 67, device=device)
    x, out = (
        guarded((tokens, 67), FP32, "strided", values),
        guarded((tokens, 35), FP32, "odd", torch.zeros(tokens, 35)),
    )
    layout = Layout.of(*RowGroups.of(ids, 5).sorted_on(device), RANKS)
    a_bits, a_levels, b_bits, b_levels, ranks, widths, _ = zip(*made, strict=True)
    a, b = packed.Factors.of(a_bits, a_levels, ranks, widths), packed.Factors.of(b_bits, b_levels, ranks, widths)
    picked = (packed.configs(kind, FP32)[-1] if config == "last" else config for kind in ("shrink", "expand"))
    s = packed.shrink(x, a, layout, bits, config=next(picked))
    packed.expand(s, b, layout, bits, out=out, scales=table(SCALES, FP32, device), config=next(picked))
    assert relative_error(out, packed_update(values, dense, ids)) <= 2 * bound(FP32)


@pytest.mark.parametrize("tokens", [0, 1])
def test_packed_factors_take_any_number_of_tokens(tokens, device, factors):
    made, dense = factors((1, 1), (5, 2), 37, 29)
    x, weight = torch.randn(tokens, 37, device=device), torch.zeros(29, 37, device=device)
    y = grouped_packed_lora(x, weight, None, made, RowGroups.of([1] * tokens, 2))
    assert relative_error(y, packed_update(x, dense, [1] * tokens)) <= 2 * bound(FP32)
