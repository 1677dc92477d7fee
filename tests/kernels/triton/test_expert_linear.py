"""`expert_in` and `expert_out` on their Triton kernels, and each of the two, against float64."""

from math import prod

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from petune.kernels.chooser import Config
from petune.kernels.expert_linear import Assignment, assign, expert_in, expert_out, kernel
from petune.kernels.launch import INTERPRETED
from tests.conftest import TOLERANCE, relative_error

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = Config(16, 16, num_warps=4, num_stages=1, block_inner=16)  # tiles so small that every axis has several of them


@pytest.fixture(autouse=True)
def _triton_or_an_error(monkeypatch):
    monkeypatch.setenv("PETUNE_KERNELS", "triton")


@pytest.fixture
def packed(guarded):
    """The same values, contiguous, between NaN."""
    return lambda t: guarded((t.numel(),), t.dtype, "rows", t.flatten()).view(t.shape)


def bound(dtype: torch.dtype) -> float:
    # a product and a sum are each rounded once to 16 bits, to bf16 the interpreter truncates
    return TOLERANCE[dtype] * (4 if dtype == torch.bfloat16 and INTERPRETED else 2)


def assigned(tokens: int, experts: int, k: int, device) -> Assignment:
    chosen = torch.rand(tokens, experts, device=device).topk(k, dim=1).indices.sort(dim=1).values
    return assign(chosen, experts)


def unevenly(counts: list[int], device) -> Assignment:
    """As many tokens for each expert, one expert a token."""
    experts = torch.arange(len(counts), device=device).repeat_interleave(torch.tensor(counts, device=device))
    return assign(experts[torch.randperm(len(experts), device=device)].unsqueeze(1), len(counts))


def expert_of(assignment: Assignment) -> Tensor:
    """Of every pair."""
    counts = assignment.offsets.diff()
    return torch.arange(len(counts), device=counts.device).repeat_interleave(counts)


def exact_in(x: Tensor, weight: Tensor, bias: Tensor | None, assignment: Assignment) -> Tensor:
    expert, rows = expert_of(assignment), x.double()[assignment.tokens]
    h = torch.einsum("pd,psd->ps", rows, weight.double()[expert])
    return h if bias is None else h + bias.double()[expert]


def exact_out(h: Tensor, weight: Tensor, bias: Tensor | None, assignment: Assignment) -> Tensor:
    products = torch.einsum("ps,psd->pd", h.double(), weight.double()[expert_of(assignment)])
    y = products.new_zeros(len(assignment.places), weight.shape[2]).index_add_(0, assignment.tokens, products)
    return y if bias is None else y + bias.double()


def drawn(*shape: int, device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype)


# --- the operators -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_match_float64(dtype, with_bias, device):
    assignment = assigned(70, 6, 2, device)
    x, weight = drawn(70, 37, device=device, dtype=dtype), drawn(6, 29, 37, device=device, dtype=dtype)
    in_bias = drawn(6, 29, device=device, dtype=dtype) if with_bias else None
    out_bias = drawn(37, device=device, dtype=dtype) if with_bias else None
    h = expert_in(x, weight, in_bias, assignment)
    y = expert_out(h, weight, out_bias, assignment)
    assert h.dtype == y.dtype == dtype
    assert relative_error(h, exact_in(x, weight, in_bias, assignment)) <= bound(dtype)
    assert relative_error(y, exact_out(h, weight, out_bias, assignment)) <= bound(dtype)


@pytest.mark.parametrize(
    ("tokens", "experts", "k"),
    [(0, 5, 2), (1, 5, 2), (1, 1, 1), (9, 5, 1), (9, 5, 5), (70, 3, 2), (3, 65, 6)],
    ids=str,
)
def test_any_number_of_tokens_and_experts(tokens, experts, k, device):
    assignment = assigned(tokens, experts, k, device)
    x, weight = drawn(tokens, 17, device=device), drawn(experts, 3, 17, device=device)
    h = expert_in(x, weight, None, assignment)
    y = expert_out(h, weight, None, assignment)
    assert (h.shape, y.shape) == ((tokens * k, 3), (tokens, 17))
    assert relative_error(h, exact_in(x, weight, None, assignment)) <= bound(torch.float32)
    assert relative_error(y, exact_out(h, weight, None, assignment)) <= bound(torch.float32)


@pytest.mark.parametrize("counts", [[0, 0, 40], [40, 0, 0], [0, 17, 0, 16, 1, 0], [16, 32, 48], [1, 1, 1, 1]], ids=str)
def test_experts_may_have_any_number_of_pairs_and_none(counts, device):
    assignment = unevenly(counts, device)
    x, weight = drawn(sum(counts), 20, device=device), drawn(len(counts), 19, 20, device=device)
    bias = drawn(len(counts), 19, device=device)
    h = kernel.product(x, weight, assignment.offsets, pairs=len(x), tokens=assignment.tokens, bias=bias, config=SMALL)
    assert relative_error(h, exact_in(x, weight, bias, assignment)) <= bound(torch.float32)


def test_ids_and_bounds_may_be_strided(device):
    assignment = assigned(23, 4, 2, device)
    x, weight = drawn(23, 17, device=device), drawn(4, 5, 17, device=device)
    strided = Assignment(*(torch.stack((t, -t), dim=-1)[..., 0] for t in assignment))
    h = expert_in(x, weight, None, assignment)
    assert torch.equal(h, expert_in(x, weight, None, strided))
    assert torch.equal(expert_out(h, weight, None, assignment), expert_out(h, weight, None, strided))


def test_two_runs_give_the_same_bits(device):
    assignment = assigned(70, 6, 4, device)
    x, weight = drawn(70, 37, device=device), drawn(6, 29, 37, device=device)
    first, second = (expert_out(expert_in(x, weight, None, assignment), weight, None, assignment) for _ in range(2))
    assert torch.equal(first, second)


def test_a_token_s_pairs_are_added_the_same_way_in_every_batch(device):
    q, bias = drawn(70 * 6, 33, device=device, dtype=torch.float16), drawn(33, device=device)
    places = assigned(70, 9, 6, device).places
    together = kernel.add_up(q, places, bias)
    for token in (0, 31, 69):
        assert torch.equal(kernel.add_up(q, places[token : token + 1], bias)[0], together[token])


def test_what_is_not_finite_reaches_its_token_and_no_other(device):
    assignment = assigned(70, 6, 3, device)
    x, weight = drawn(70, 37, device=device), drawn(6, 29, 37, device=device)
    x[17, 33] = torch.nan
    y = expert_out(expert_in(x, weight, None, assignment), weight, None, assignment)
    assert y[17].isnan().all()
    assert y[torch.arange(70, device=device) != 17].isfinite().all()


def test_more_experts_than_a_program_reads_are_an_error_that_says_why(device):
    assignment = assigned(2, 1025, 1, device)
    x, weight = drawn(2, 3, device=device), drawn(1025, 1, 3, device=device)
    with pytest.raises(RuntimeError, match=r"expert_linear cannot run on Triton: 1025 experts are above 1024"):
        expert_in(x, weight, None, assignment)


# --- the kernels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [None, SMALL], ids=["default", "small"])
@pytest.mark.parametrize(("size", "width"), [(1, 1), (1, 50), (33, 7), (16, 64), (17, 65)], ids=str)
def test_shapes_need_not_fit_the_blocks(size, width, config, device):
    assignment = assigned(41, 3, 2, device)
    x, weight, bias = (drawn(*shape, device=device) for shape in ((41, width), (3, size, width), (3, size)))
    shared = {"pairs": 82, "config": config}
    h = kernel.product(x, weight, assignment.offsets, tokens=assignment.tokens, bias=bias, **shared)
    assert relative_error(h, exact_in(x, weight, bias, assignment)) <= bound(torch.float32)
    y = kernel.add_up(kernel.product(h, weight.mT, assignment.offsets, **shared), assignment.places, None)
    assert relative_error(y, exact_out(h, weight, None, assignment)) <= bound(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_config_gives_the_same_result(dtype, device):
    assignment = assigned(150, 3, 2, device)
    x, weight = drawn(150, 70, device=device, dtype=dtype), drawn(3, 140, 70, device=device, dtype=dtype)
    for config in kernel.configs(dtype):
        h = kernel.product(x, weight, assignment.offsets, pairs=300, tokens=assignment.tokens, config=config)
        assert relative_error(h, exact_in(x, weight, None, assignment)) <= bound(dtype)


def test_the_tile_grows_with_the_pairs_of_an_expert(device):
    x = drawn(1, 1, device=device, dtype=torch.float16)
    sizes = [kernel._config(x, pairs, 64).block_tokens for pairs in (1, 16, 1024, 1025, 4096, 4097, 65536)]
    assert sizes == [16, 16, 16, 64, 64, 128, 128]


@pytest.mark.parametrize("layout", ["rows", "odd", "columns", "strided"])
def test_any_strides_are_read_in_place_and_nothing_beside_them(layout, device, guarded, packed):
    assignment = unevenly([9, 0, 21, 2], device)
    x, h, weight = (drawn(*shape, device=device) for shape in ((32, 23), (32, 19), (4, 19, 23)))
    in_bias, out_bias = drawn(4, 19, device=device), drawn(23, device=device)
    x, h, in_bias, out_bias = (guarded(t.shape, t.dtype, layout, t) for t in (x, h, in_bias, out_bias))
    flat = guarded((4 * 19, 23), weight.dtype, layout, weight.flatten(0, 1))
    stacked = flat.as_strided((4, 19, 23), (19 * flat.stride(0), *flat.stride()))
    tokens, offsets, places = (packed(t) for t in assignment)
    out = kernel.product(x, stacked, offsets, pairs=32, tokens=tokens, bias=in_bias, config=SMALL)
    assert relative_error(out, exact_in(x, weight, in_bias, assignment)) <= bound(torch.float32)
    q = kernel.product(h, stacked.mT, offsets, pairs=32, config=SMALL)
    y = kernel.add_up(packed(q), places, out_bias)
    assert relative_error(y, exact_out(h, weight, out_bias, assignment)) <= bound(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_outputs_are_written_whole_and_nothing_beside_them(dtype, device, guarded, monkeypatch):
    assignment = unevenly([9, 0, 21, 2], device)
    x, weight = drawn(32, 23, device=device, dtype=dtype), drawn(4, 19, 23, device=device, dtype=dtype)

    def matrices_guarded(tensor: Tensor, *shape: int, **options) -> Tensor:
        return guarded((prod(shape),), dtype).view(shape) if len(shape) == 2 else new_empty(tensor, *shape, **options)

    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", matrices_guarded)
    h = kernel.product(x, weight, assignment.offsets, pairs=32, tokens=assignment.tokens, config=SMALL)
    y = kernel.add_up(kernel.product(h, weight.mT, assignment.offsets, pairs=32), assignment.places, None)
    monkeypatch.undo()
    assert relative_error(h, exact_in(x, weight, None, assignment)) <= bound(dtype)
    assert relative_error(y, exact_out(h, weight, None, assignment)) <= bound(dtype)


@pytest.mark.parametrize("k", [1, 3, 4, 5, 16])
def test_every_place_of_a_token_is_added_once(k, device, packed):
    values, places = drawn(37 * k, 21, device=device), assigned(37, 16, k, device).places
    y = kernel.add_up(packed(values), packed(places), None)
    assert relative_error(y, values.double()[places].sum(1)) <= bound(torch.float32)


def test_many_products_of_16_bits_are_added_in_fp32(device):
    q = torch.ones(5 * 65, 3, device=device).half()
    places = assigned(5, 65, 65, device).places
    q[places[:, 0]] = 2048.0
    assert torch.equal(kernel.add_up(q, places, None), torch.full((5, 3), 2112.0, device=device).half())


@settings(
    max_examples=15,  # on a GPU each compiles kernels of its own
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data(), tokens=st.integers(1, 60), experts=st.integers(1, 9), size=st.integers(1, 20))
def test_any_small_problem_matches_float64(data, tokens, experts, size, device):
    assignment = assigned(tokens, experts, data.draw(st.integers(1, experts)), device)
    width = data.draw(st.integers(1, 40))
    x, weight = drawn(tokens, width, device=device), drawn(experts, size, width, device=device)
    h = expert_in(x, weight, None, assignment)
    y = expert_out(h, weight, None, assignment)
    # a product of a few terms may cancel: then its error is measured against the size of the terms
    for out, exact in ((h, exact_in(x, weight, None, assignment)), (y, exact_out(h, weight, None, assignment))):
        assert (out.double() - exact).norm() <= bound(torch.float32) * (exact.norm() + 0.1)
