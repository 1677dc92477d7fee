"""What only a GPU can show: graphs, no host synchronisation, the timed trial, real sizes. Run by `make gpu`."""

import json

import pytest
import torch
from torch import Tensor

from petune.kernels.grouped_lora import PackedFactors, RowGroups, grouped_lora, grouped_packed_lora
from petune.kernels.lora_linear import lora_linear
from petune.kernels.packed_lora import packed_lora, unpacked
from petune.kernels.residual_low_rank import residual_low_rank
from tests.conftest import relative_error
from tests.kernels.grouped import batch, gradients, in_double, loop, tokens_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SCALE = 2.0


@pytest.fixture(autouse=True)
def _triton_or_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("PETUNE_KERNELS", "triton")
    monkeypatch.setenv("PETUNE_TUNE", "0")


def operands(tokens=512, in_features=1024, out_features=768, rank=16, dtype=torch.bfloat16):
    def draw(*shape, scale=1.0, trained=False):
        return (torch.randn(*shape, device="cuda") * scale).to(dtype).requires_grad_(trained)

    x = draw(tokens, in_features, trained=True)
    weight, bias = draw(out_features, in_features, scale=in_features**-0.5), draw(out_features)
    a = draw(rank, in_features, scale=in_features**-0.5, trained=True)
    b = draw(out_features, rank, scale=0.1 * rank**-0.5, trained=True)
    return x, weight, bias, a, b


def step(tensors, dropout_p: float = 0.0) -> list[Tensor]:
    x, _, _, a, b = tensors
    y = lora_linear(*tensors, SCALE, dropout_p)
    return [y, *torch.autograd.grad(y, (x, a, b), torch.ones_like(y))]


def double_step(tensors) -> list[Tensor]:
    x, weight, bias, a, b = (t.detach().double().requires_grad_(t.requires_grad) for t in tensors)
    y = torch.nn.functional.linear(x, weight, bias) + SCALE * (x @ a.T) @ b.T
    return [y, *torch.autograd.grad(y, (x, a, b), torch.ones_like(y))]


@pytest.mark.parametrize("rank", [8, 16, 64, 256])
@pytest.mark.parametrize(
    "sizes", [(4096, 4096, 4096), (4096, 4096, 1024), (3001, 1000, 777), (1, 4096, 4096)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_real_sizes_match_float64(dtype, sizes, rank):
    tensors = operands(*sizes, rank=rank, dtype=dtype)
    limit = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 1e-5}[dtype]
    for out, reference in zip(step(tensors), double_step(tensors), strict=True):
        assert relative_error(out, reference) <= limit


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("rank", [1, 32, 256])
@pytest.mark.parametrize("sizes", [(4096, 4096, 4096), (3001, 1000, 777), (1, 4096, 4096), (64, 4096, 1024)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_packed_factors_of_real_sizes_match_float64(dtype, sizes, rank, bits):
    x, weight, bias, _, _ = (t.detach() for t in operands(*sizes, dtype=dtype))
    factors, dense = [], []
    for rows, columns in ((rank, sizes[1]), (sizes[2], rank)):
        codes = torch.randint(0, 256, (-(-rows * columns * bits // 8),), dtype=torch.uint8, device="cuda")
        levels = torch.randn(rows, 2**bits, device="cuda") * columns**-0.5
        factors += [codes, levels]
        dense.append(unpacked(codes, levels, (rows, columns), bits).double())
    y = packed_lora(x, weight, bias, *factors, rank, bits, SCALE)
    reference = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    reference += SCALE * (x.double() @ dense[0].T) @ dense[1].T
    # the levels, s, the low-rank term and y are each rounded once
    assert relative_error(y, reference) <= {torch.bfloat16: 6e-3, torch.float16: 8e-4, torch.float32: 1e-5}[dtype]


@pytest.mark.parametrize("rank", [1, 32, 64, 205, 256])
@pytest.mark.parametrize("sizes", [(8192, 4096), (3001, 777), (1, 4096), (64, 1024)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_gated_residual_of_real_sizes_matches_float64_and_itself(dtype, sizes, rank):
    (tokens, features), cuda = sizes, {"device": "cuda"}
    u, dz = (torch.randn(tokens, features, **cuda).to(dtype) for _ in range(2))
    down, up = torch.randn(rank, features, **cuda) * features**-0.5, torch.randn(features, rank, **cuda) * rank**-0.5
    gate = torch.rand(features, **cuda) * (torch.rand(features, **cuda) > 0.25)
    tensors = [t.requires_grad_() for t in (u, down, up, gate)]

    def run() -> list[Tensor]:
        z = residual_low_rank(*tensors)
        return [z, *torch.autograd.grad(z, tensors, dz)]

    exact = [t.detach().double().requires_grad_() for t in tensors]
    z = exact[3] * (exact[0] + (exact[0] @ exact[1].T) @ exact[2].T)
    references = [z, *torch.autograd.grad(z, exact, dz.double())]
    # s, ds and every result are each rounded once
    limit = {torch.bfloat16: 6e-3, torch.float16: 8e-4, torch.float32: 1e-5}[dtype]
    for out, again, reference in zip(run(), run(), references, strict=True):
        assert torch.equal(out, again)
        assert relative_error(out, reference) <= limit


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_two_runs_are_bitwise_equal(dropout_p):
    tensors = operands()
    torch.manual_seed(3)
    first = step(tensors, dropout_p)
    torch.manual_seed(3)
    assert all(torch.equal(left, right) for left, right in zip(first, step(tensors, dropout_p), strict=True))


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_a_step_never_waits_for_the_device(dropout_p):
    tensors = operands()
    step(tensors, dropout_p)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(tensors, dropout_p)  # raises where it waits
        with pytest.raises(RuntimeError, match="synchronizing"):
            tensors[0].sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_a_captured_step_replays_with_new_data_and_a_new_mask(dropout_p):
    tensors = operands()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(tensors, dropout_p)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(tensors, dropout_p)
    graph.replay()
    before = captured[0].clone()
    graph.replay()
    assert torch.equal(before, captured[0]) == (dropout_p == 0.0)
    with torch.no_grad():
        tensors[0].copy_(torch.randn_like(tensors[0]))
    graph.replay()
    if not dropout_p:
        for out, reference in zip(captured, double_step(tensors), strict=True):
            assert relative_error(out, reference) <= 4e-3


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_it_compiles_into_one_graph(mode):
    tensors = operands()
    compiled = torch.compile(lambda *t: lora_linear(*t, SCALE), fullgraph=True, mode=mode)
    for _ in range(3):
        y = compiled(*tensors)
        gradients = torch.autograd.grad(y, (tensors[0], *tensors[3:]), torch.ones_like(y))
        for out, reference in zip((y, *gradients), double_step(tensors), strict=True):
            assert relative_error(out, reference) <= 4e-3


def test_the_first_call_times_the_variants_once_and_writes_the_table(monkeypatch, tmp_path):
    monkeypatch.setenv("PETUNE_TUNE", "1")
    monkeypatch.setenv("PETUNE_CACHE_DIR", str(tmp_path))
    tensors = operands(tokens=640)
    step(tensors)
    (table,) = tmp_path.rglob("*.json")
    written = table.read_text()
    assert "project" in written
    assert json.loads(written)
    stamp = table.stat().st_mtime_ns
    for out, reference in zip(step(tensors), double_step(tensors), strict=True):
        assert relative_error(out, reference) <= 4e-3
    assert table.stat().st_mtime_ns == stamp


def test_nothing_of_the_size_of_x_is_kept_or_left_behind():
    tensors = operands(tokens=4096, in_features=4096, out_features=4096)
    step(tensors, 0.1)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = lora_linear(*tensors, SCALE, 0.1)
    assert torch.cuda.memory_allocated() - before <= y.nbytes + 4096 * 16 * 2 + 4096
    del y
    assert torch.cuda.memory_allocated() == before


def test_autocast_gives_fp32_adapters_fp32_gradients_without_a_copy_of_x():
    x, weight, bias, a, b = operands()
    a, b = a.detach().float().requires_grad_(), b.detach().float().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        outputs = step((x, weight, bias, a, b))
    assert [t.dtype for t in outputs] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    for out, reference in zip(outputs, double_step((x, weight, bias, a, b)), strict=True):
        assert relative_error(out, reference) <= 4e-3


# --- rows of many adapters -----------------------------------------------------------------------------------------

RANKS = (4, 8, 16, 16, 32, 64, 5, 1)
SCALES = (0.5, 2.0, 1.5, -1.0, 0.75, 1.0, 2.0, 1.0)


def rows_of(*, rows: int, seed: int = 0) -> Tensor:
    """Ids of rows, the base alone among them, and one adapter that has none."""
    torch.manual_seed(seed)
    ids = torch.randint(-1, 7, (rows,), device="cuda")
    ids[0], ids[-1] = -1, 7
    return torch.where(ids == 3, 2, ids)


def grouped_operands(rows: int = 32, tokens: int = 65, dtype=torch.bfloat16):
    sizes = {"in_features": 1024, "out_features": 768, "ranks": RANKS}
    return batch(rows, tokens, dtype=dtype, device=torch.device("cuda"), **sizes)


def grouped_step(tensors, groups: RowGroups, **dropout) -> list[Tensor]:
    return gradients(grouped_lora(*tensors, SCALES, groups, **dropout), tensors)


def grouped_double_step(tensors, ids: Tensor) -> list[Tensor]:
    wide = in_double(tensors)
    return gradients(loop(wide, ids.tolist(), scales=SCALES), wide)


@pytest.mark.parametrize(("rows", "tokens"), [(32, 65), (512, 1), (3, 4097), (4, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rows_of_many_adapters_match_float64(dtype, rows, tokens):
    tensors, ids = grouped_operands(rows, tokens, dtype), rows_of(rows=rows)
    limit = {torch.bfloat16: 6e-3, torch.float16: 8e-4, torch.float32: 1e-5}[dtype]  # s, ds, y and dx are rounded
    found = grouped_step(tensors, RowGroups.of(ids, 8))
    for out, again, reference in zip(
        found, grouped_step(tensors, RowGroups.of(ids, 8)), grouped_double_step(tensors, ids), strict=True
    ):
        assert torch.equal(out, again)
        assert relative_error(out, reference) <= limit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_of_many_packed_adapters_match_float64(dtype):
    x, weight, bias, *_ = (t.detach() if isinstance(t, Tensor) else t for t in grouped_operands(dtype=dtype))
    ids, factors = rows_of(rows=32), []
    reference = torch.nn.functional.linear(x.double(), weight.double(), bias.double()).view(-1, 768)
    for i, (rank, scale) in enumerate(zip(RANKS, SCALES, strict=True)):
        bits, own, dense, columns = (1, 2, 4, 8)[i % 4], tokens_of(i, ids.tolist(), 32 * 65), [], []
        for shape in ((rank, 1024), (768, rank)):
            codes = torch.randint(0, 256, (-(-shape[0] * shape[1] * bits // 8),), dtype=torch.uint8, device="cuda")
            levels = torch.randn(shape[0], 2**bits, device="cuda") * shape[1] ** -0.5
            columns += [codes, levels]
            dense.append(unpacked(codes, levels, shape, bits).double())
        factors.append(PackedFactors(*columns, rank, bits, scale))
        reference[own] += scale * (x.view(-1, 1024)[own].double() @ dense[0].T) @ dense[1].T
    y = grouped_packed_lora(x, weight, bias, factors, RowGroups.of(ids, 8)).view(-1, 768)
    assert relative_error(y, reference) <= {torch.bfloat16: 6e-3, torch.float32: 1e-5}[dtype]


def test_rows_keep_their_order_within_an_adapter():
    order, offsets = RowGroups.of(rows_of(rows=5000), 8).sorted_on(torch.device("cuda", torch.cuda.current_device()))
    for first, stop in zip(offsets.tolist(), offsets.tolist()[1:], strict=False):
        assert torch.equal(order[first:stop], order[first:stop].sort().values)


def test_rows_of_many_adapters_are_grouped_without_waiting_for_the_device():
    tensors, ids = grouped_operands(), rows_of(rows=32)
    step = {"dropout_p": 0.1}
    grouped_step(tensors, RowGroups.of(ids, 8), **step)  # compiles, and copies what stays the same
    dy = torch.ones(32, 65, 768, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = grouped_lora(*tensors, SCALES, RowGroups.of(ids, 8), **step)
        torch.autograd.grad(y, tensors.trained, dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("outside", [False, True], ids=["made in the graph", "made before"])
def test_a_captured_step_follows_ids_that_were_rewritten(outside):
    tensors, ids = grouped_operands(), rows_of(rows=32)
    dy = torch.linspace(-1, 1, 32 * 65 * 768, device="cuda").bfloat16().view(32, 65, 768)
    before = RowGroups.of(ids, 8)

    def step() -> list[Tensor]:
        return gradients(grouped_lora(*tensors, SCALES, before if outside else RowGroups.of(ids, 8)), tensors, dy)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        ids.copy_(rows_of(rows=32, seed=seed))
        graph.replay()
        for out, reference in zip(captured, grouped_double_step(tensors, ids), strict=True):
            assert relative_error(out, reference) <= 6e-3
