"""The tests of the kernels notice when a kernel is wrong: each mutation of a copy must make the named test fail.

`make mutations` runs all of them, `make test` one a kernel: what they try are the tests, which change less often.
"""

import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import fresh

ROOT = Path(__file__).parents[2]
LAUNCH, *LINEAR = "launch.py", *(f"lora_linear/{name}.py" for name in ("kernel", "skinny", "sums", "gemm"))
KERNEL, SKINNY, SUMS, GEMM = LINEAR
PACKED = "packed_lora/kernel.py"
EXPERTS = "expert_linear/kernel.py"
RESIDUAL = "residual_low_rank/kernel.py"
LAYOUT, GROUPED, GROUPED_KERNEL, GROUPED_PACKED = (
    f"grouped_lora/{name}.py" for name in ("layout", "skinny", "kernel", "packed_skinny")
)

pytestmark = pytest.mark.skipif(
    os.environ.get("PETUNE_TEST_DEVICE") == "cuda", reason="what the tests notice is the same on a CPU"
)


class Mutation(NamedTuple):
    what: str
    file: str
    """Below petune/kernels."""
    text: str
    """What is replaced; stands there once."""
    replacement: str
    noticed_by: str
    """File of tests/kernels/triton and the -k that picks its test."""


# tests of triton/, by the name of the file and the -k that picks them
SHAPES = "skinny test_shapes_need_not_fit_the_blocks and small"
INPUTS = "skinny test_any_strides_are_read_in_place and odd"
OUTPUTS = "skinny test_outputs_are_written_whole and many_chunks-odd"
BIAS = "skinny test_expand_adds_the_bias and float32"
GRADIENTS = "lora_linear test_the_update_and_every_gradient and float32-same"
RANK_MASK = "lora_linear test_a_mask_between_a_and_b and float32"
SUBSETS = "lora_linear test_each_subset_of_gradients"
DX = "gemm test_dx_is_masked_where_x_was_dropped and float32"
PRODUCT = "gemm test_output_and_update_match_float64 and float32 and as"
STRIDES = "gemm test_any_strides_by_pointers and odd"
UPDATE = "packed_lora test_the_update_matches_float64 and float32"
RANKS = "packed_lora test_any_number_of_tokens_and_any_rank"
BLOCKS = "packed_lora test_shapes_need_not_fit_the_blocks and small-many"
LAYOUTS = "packed_lora test_any_strides_are_read_in_place"
PAIRS = "expert_linear test_both_match_float64 and float32"
UNEVEN = "expert_linear test_experts_may_have_any_number_of_pairs"
WITHIN = "expert_linear test_any_strides_are_read_in_place and strided"
WHOLE = "expert_linear test_outputs_are_written_whole and float32"
PLACES = "expert_linear test_every_place_of_a_token"
TILES = "residual_low_rank test_shapes_need_not_fit_the_blocks and small"
BOTH = "residual_low_rank test_both_kernels_match_float64 and float32"
EDGES = "residual_low_rank test_any_strides_are_read_in_place and strided"
OWN = "residual_low_rank test_tensors_of_different_strides"
FILLED = "residual_low_rank test_outputs_are_written_whole"
BACK = "residual_low_rank test_output_and_every_gradient and float32-same"
GATE = "gated_lora test_output_and_gradients_match_float64 and float32 and silu"
ADAPTERS = "grouped_lora test_the_update_and_every_gradient and float32-same-dropout"
SEGMENTS = "grouped_lora test_tiles_need_not_fit and edges-small-many"
TIGHT = "grouped_lora test_tiles_need_not_fit and tight-small-one"
PAST = "grouped_lora test_rows_past_the_last_adapter"
INDEX = "grouped_lora test_a_token_index_overrides"
HELD = "grouped_lora test_any_strides_are_read_in_place and odd"
CODES = "grouped_lora test_the_packed_update and float32 and 8"
PACKED_TILES = "grouped_lora test_packed_tiles and edges-many_chunks-small"
GROUP = "lora_group test_outputs_and_gradients_match_float64 and float32 and same"

MUTATIONS = [
    # the mask
    Mutation(
        "no mask in s", SKINNY, "keep_tile(seed, threshold, first_token, ", "keep_tile(seed, 0, first_token, ", SHAPES
    ),
    Mutation(
        "no mask in dA", SKINNY, "keep_tile(seed, threshold, start, first", "keep_tile(seed, 0, start, first", SHAPES
    ),
    Mutation(
        "no mask in dx, expand",
        SKINNY,
        "keep_tile(tl.load(seed_ptr), threshold, ",
        "keep_tile(tl.load(seed_ptr), 0, ",
        SHAPES,
    ),
    Mutation("no mask in dx, gemm", GEMM, "term = tl.where(keep, term, 0.0)", "term = term", DX),
    Mutation("halves of the mask exchanged", GEMM, "tl.join(left, right)", "tl.join(right, left)", DX),
    Mutation("one mask for every seed", LAUNCH, "tl.philox(seed, ", "tl.philox(seed * 0, ", SHAPES),
    Mutation(
        "halves of a word exchanged", LAUNCH, "words & 0xFFFF, words >> 16", "words >> 16, words & 0xFFFF", SHAPES
    ),
    Mutation(
        "one mask for every token block",
        SKINNY,
        "threshold, start, first_feature, ",
        "threshold, 0, first_feature, ",
        SHAPES,
    ),
    Mutation("1/q twice", KERNEL, "scale = scale / mask", "scale = scale / mask.keep_probability / mask", GRADIENTS),
    # the scale and the bias
    Mutation("no scale in shrink", SKINNY, "(s * scale)", "s", SHAPES),
    Mutation(
        "no scale in dS of dual",
        SKINNY,
        "tl.dot(tl.trans(x), b, input_precision=PRECISION) * scale",
        "tl.dot(tl.trans(x), b, input_precision=PRECISION)",
        SHAPES,
    ),
    Mutation("no scale in dB", SKINNY, "(columns * scale)", "columns", SHAPES),
    Mutation(
        "no scale in expand",
        SKINNY,
        "tl.dot(s, b, input_precision=PRECISION) * scale",
        "tl.dot(s, b, input_precision=PRECISION)",
        SHAPES,
    ),
    Mutation("no scale in gemm", GEMM, "term *= scale", "term *= 1.0", PRODUCT),
    Mutation("no bias in expand", SKINNY, "if HAS_BIAS:", "if HAS_BIAS and ACCUMULATE:", BIAS),
    Mutation("a bias without its stride", SKINNY, "bias_ptr + f * stride_bias", "bias_ptr + f", BIAS),
    Mutation(
        "no bias in gemm",
        GEMM,
        "tl.load(bias_ptr + f * stride_bias, mask=f < features,",
        "tl.load(bias_ptr + f * stride_bias, mask=f < 0,",
        PRODUCT,
    ),
    # addresses, edges and splits
    Mutation(
        "strides of a exchanged",
        SKINNY,
        "r * stride_ar + f[:, None] * stride_af",
        "r * stride_af + f[:, None] * stride_ar",
        SHAPES,
    ),
    Mutation(
        "strides of weight exchanged",
        GEMM,
        "f * stride_wf + k[:, None].to(tl.int64) * stride_wk",
        "f * stride_wk + k[:, None].to(tl.int64) * stride_wf",
        STRIDES,
    ),
    Mutation(
        "x read past its edge",
        SKINNY,
        "x_mask = (t < tokens) & (f[None, :] < features)",
        "x_mask = t < tokens",
        INPUTS,
    ),
    Mutation("weight read past its edge", GEMM, "weight_mask & (k[:, None] < left)", "weight_mask", STRIDES),
    Mutation(
        "y written past its edge",
        SKINNY,
        "tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=y_mask)",
        "tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=t < tokens)",
        OUTPUTS,
    ),
    Mutation(
        "a chunk of features one block short",
        SKINNY,
        "first + blocks_per_chunk * BLOCK_F",
        "first + (blocks_per_chunk - 1) * BLOCK_F",
        INPUTS,
    ),
    Mutation(
        "a chunk of tokens one block long",
        SKINNY,
        "first + blocks_per_chunk * BLOCK_T",
        "first + (blocks_per_chunk + 1) * BLOCK_T",
        INPUTS,
    ),
    Mutation("the last partial sum left out", SUMS, "(first + c < chunks)", "(first + c < chunks - 1)", OUTPUTS),
    # how the operators put them together
    Mutation("no mask where dx is made", KERNEL, ", ds, a, mask).view", ", ds, a, None).view", GRADIENTS),
    Mutation("no rank mask in ds", KERNEL, "ds = _times(ds, rank_mask)", "ds = _times(ds, None)", RANK_MASK),
    Mutation("no rank mask in y", KERNEL, "rank_mask)\n    bias", "None)\n    bias", RANK_MASK),
    Mutation("no rank mask in dB", KERNEL, "rank_mask)\n        ds, db", "None)\n        ds, db", RANK_MASK),
    Mutation("no scale without dB", KERNEL, "shrink(dy_rows, b.T, scale=scale)", "shrink(dy_rows, b.T)", SUBSETS),
    Mutation(
        "no mask in a group's dx", "lora_group/kernel.py", "expand(ds, a.T, mask=mask)", "expand(ds, a.T)", GROUP
    ),
    Mutation(
        "no mask in the dA of a gated layer",
        "gated_lora/kernel.py",
        "outer(h, ds, dtype=a.dtype, mask=mask)",
        "outer(h, ds, dtype=a.dtype)",
        GATE,
    ),
    # tokens of many adapters
    Mutation("no mask in s, grouped", GROUPED, "x = tl.where(keep, x, 0.0)", "x = tl.where(keep, x, x)", ADAPTERS),
    Mutation("no mask in dA, grouped", GROUPED, "tl.where(tl.trans(keep), x, 0.0)", "x", ADAPTERS),
    Mutation("no mask in dx, grouped", GROUPED, "y = tl.where(keep, y, 0.0)", "y = tl.where(keep, y, y)", ADAPTERS),
    Mutation("one seed for all adapters", GROUPED, "tl.load(seeds_ptr + adapter)", "tl.load(seeds_ptr)", ADAPTERS),
    Mutation(
        "one threshold for all adapters",
        GROUPED,
        "tl.load(thresholds_ptr + adapter)",
        "tl.load(thresholds_ptr)",
        ADAPTERS,
    ),
    Mutation("masks counted from the first adapter", GROUPED, "own = p - begin", "own = p", ADAPTERS),
    Mutation("a token index not read", GROUPED, "if index_ptr is not None:", "if index_ptr is None:", INDEX),
    Mutation("no scale in grouped ds", GROUPED, "    s *= tl.load(scales_ptr + adapter)", "    s *= 1.0", SEGMENTS),
    Mutation("no scale in grouped y", GROUPED, "    y *= tl.load(scales_ptr + adapter)", "    y *= 1.0", SEGMENTS),
    Mutation(
        "no scale in grouped dB", GROUPED, "    scale = tl.load(scales_ptr + adapter)", "    scale = 1.0", SEGMENTS
    ),
    Mutation("1/q forgotten", GROUPED_KERNEL, "tuple(scale / q for scale, q", "tuple(scale for scale, q", ADAPTERS),
    Mutation(
        "the first adapter's ranks for all",
        GROUPED,
        "(start + r) * stride_ar + f[:, None]",
        "r * stride_ar + f[:, None]",
        SEGMENTS,
    ),
    Mutation("the next adapter at a segment's edge", LAYOUT, "axis=0) <= tile)", "axis=0) < tile)", SEGMENTS),
    Mutation(
        "tiles counted from the first adapter",
        LAYOUT,
        "tl.where(n < adapter, tiles, 0)",
        "tl.where(n < 0, tiles, 0)",
        SEGMENTS,
    ),
    Mutation(
        "half-full tiles left out, grouped",
        LAYOUT,
        "* per_row + BLOCK_T - 1) // BLOCK_T",
        "* per_row) // BLOCK_T",
        SEGMENTS,
    ),
    Mutation(
        "one tile too few, grouped", LAYOUT, "tokens // block + self.most", "tokens // block + self.most - 1", TIGHT
    ),
    Mutation(
        "tokens in their own order",
        LAYOUT,
        "tl.load(order_ptr + p // per_row, mask=p < stop, other=0) * per_row",
        "p // per_row * per_row",
        ADAPTERS,
    ),
    Mutation(
        "programs without an adapter go on, shrink",
        GROUPED,
        """        return
    begin, stop = places_of(offsets_ptr, adapter, per_row)
    start = tl.load(starts_ptr + adapter)
    rank = (tl.load(starts_ptr + adapter + 1) - start).to(tl.int32)
    p = begin + tile * BLOCK_T + tl.arange(0, BLOCK_T)
    t = tokens_at(order_ptr, p, stop, per_row)
    r = """,
        """        start = 0
    begin, stop = places_of(offsets_ptr, adapter, per_row)
    start = tl.load(starts_ptr + adapter)
    rank = (tl.load(starts_ptr + adapter + 1) - start).to(tl.int32)
    p = begin + tile * BLOCK_T + tl.arange(0, BLOCK_T)
    t = tokens_at(order_ptr, p, stop, per_row)
    r = """,
        PAST,
    ),
    Mutation(
        "programs without an adapter go on, expand",
        GROUPED,
        "        return\n    first_feature =",
        "        start = 0\n    first_feature =",
        PAST,
    ),
    Mutation(
        "the first block of a chunk left out",
        GROUPED,
        "+ chunk * per_chunk",
        "+ chunk * per_chunk + BLOCK_T",
        SEGMENTS,
    ),
    Mutation(
        "the adapter before at a segment's edge",
        LAYOUT,
        "return start.to(tl.int32) * per_row",
        "return (start.to(tl.int32) - 1) * per_row",
        SEGMENTS,
    ),
    Mutation(
        "x read past its edge, grouped",
        GROUPED,
        "(p < stop)[:, None] & (f[None, :] < features)",
        "(p < stop)[:, None] & (f[None, :] >= 0)",
        HELD,
    ),
    Mutation(
        "codes of the first adapter for all",
        GROUPED_PACKED,
        "first_byte = tl.load(facts_ptr + 2 * adapters + adapter)",
        "first_byte = tl.load(facts_ptr + 2 * adapters)",
        CODES,
    ),
    Mutation(
        "levels of the first adapter for all",
        GROUPED_PACKED,
        "first_level = tl.load(facts_ptr + 3 * adapters + adapter)",
        "first_level = tl.load(facts_ptr + 3 * adapters)",
        CODES,
    ),
    Mutation("codes of another width read", GROUPED_PACKED, "if width != BITS:", "if width < 0:", CODES),
    Mutation(
        "no scale, grouped and packed", GROUPED_PACKED, "y *= tl.load(scales_ptr + adapter)", "y *= 1.0", PACKED_TILES
    ),
    # codes of a few bits
    Mutation("rows taken to begin at a byte", PACKED, "begun = (first_bit % 8)", "begun = (first_bit * 0)", UPDATE),
    Mutation(
        "codes from the highest bits down", PACKED, "tl.join(codes, codes >> 1)", "tl.join(codes >> 1, codes)", UPDATE
    ),
    Mutation("nibbles exchanged", PACKED, "tl.join(codes, codes >> 4)", "tl.join(codes >> 4, codes)", UPDATE),
    Mutation("the next byte not read", PACKED, "more = started & (begun > 0)", "more = started & (begun > 8)", UPDATE),
    Mutation("one table for all rows", PACKED, "levels_ptr + i * stride_lr", "levels_ptr + i * 0", UPDATE),
    Mutation("levels exchanged", PACKED, "tl.where(codes == 1, high, low)", "tl.where(codes == 1, low, high)", UPDATE),
    Mutation("the first ranks alone", PACKED, "in range(0, rank, BLOCK_R)", "in range(0, BLOCK_R, BLOCK_R)", RANKS),
    Mutation("one partial sum alone", PACKED, "for _ in range(chunks)", "for _ in range(1)", BLOCKS),
    Mutation("no scale", PACKED, "y *= scale", "y *= 1.0", UPDATE),
    Mutation("a packed bias without its stride", PACKED, "bias_ptr + f * stride_bias", "bias_ptr + f", LAYOUTS),
    Mutation(
        "x read past its edge, packed",
        PACKED,
        "(t < tokens) & (f < features)\n        x =",
        "t < tokens\n        x =",
        LAYOUTS,
    ),
    # pairs of a token and an expert
    Mutation("the first expert's weight for all", EXPERTS, "expert.to(tl.int64) * stride_we", "0 * stride_we", PAIRS),
    Mutation("the first expert's bias for all", EXPERTS, "expert.to(tl.int64) * stride_be", "0 * stride_be", PAIRS),
    Mutation(
        "rows of x in their own order",
        EXPERTS,
        "t = p if tokens_ptr is None else tl.load(tokens_ptr + p, mask=p < stop, other=0)",
        "t = p",
        UNEVEN,
    ),
    Mutation("experts that have no pairs not passed over", EXPERTS, "axis=0) <= tile)", "axis=0) < tile)", UNEVEN),
    Mutation("tiles counted from the first expert", EXPERTS, "(e < expert, tiles, 0)", "(e < 0, tiles, 0)", UNEVEN),
    Mutation(
        "one tile too few", EXPERTS, "tiles = min(experts, pairs) +", "tiles = min(experts, pairs) - 1 +", UNEVEN
    ),
    Mutation("half-full tiles left out", EXPERTS, "+ BLOCK_P - 1) // BLOCK_P", ") // BLOCK_P", UNEVEN),
    Mutation(
        "out written into the next expert's pairs",
        EXPERTS,
        "element_ty), mask=(p < stop) & (f < features))",
        "element_ty), mask=f < features)",
        WHOLE,
    ),
    Mutation(
        "out written past its edge",
        EXPERTS,
        "element_ty), mask=(p < stop) & (f < features))",
        "element_ty), mask=p < stop)",
        WHOLE,
    ),
    Mutation(
        "weight of an expert read past its edge",
        EXPERTS,
        "mask=(f < features) & (k[:, None] < left)",
        "mask=f < features",
        WITHIN,
    ),
    Mutation("x of a pair read past its edge", EXPERTS, "(p < stop) & (k[None, :] < left)", "p < stop", WITHIN),
    Mutation(
        "an output's bias without its stride", EXPERTS, "bias_ptr + f * stride_bf, mask", "bias_ptr + f, mask", WITHIN
    ),
    Mutation("an expert's bias without its stride", EXPERTS, "* stride_be + f * stride_bf", "* stride_be + f", WITHIN),
    Mutation("the first places alone", EXPERTS, "range(0, k, BLOCK_J)", "range(0, BLOCK_J, BLOCK_J)", PLACES),
    Mutation("places read past a token's last", EXPERTS, "(first + j < k) & (t", "(first + j < k + 1) & (t", PLACES),
    Mutation(
        "y written past its edge, sum", EXPERTS, "element_ty), mask=inside)", "element_ty), mask=t < tokens)", WHOLE
    ),
    # a residual map and its gate
    Mutation("no gate on z", RESIDUAL, "z = gate * (u + ", "z = (u + ", BOTH),
    Mutation("no gate on du", RESIDUAL, "+ gate * dz.to(tl.float32)", "+ dz.to(tl.float32)", BOTH),
    Mutation("no gate in ds", RESIDUAL, "(wide_gate[:, None] * wide_up).T", "wide_up.T", BACK),
    Mutation("no gate on dup", RESIDUAL, "(wide_gate[:, None] * p).to", "p.to", BACK),
    Mutation("dgate of u alone", RESIDUAL, "((wide_up * p).sum(1) + dots)", "dots", BACK),
    Mutation("no residual", RESIDUAL, "gate * (u + tl.dot", "gate * (tl.dot", BOTH),
    Mutation(
        "strides of down exchanged", RESIDUAL, "f * stride_df + r * stride_dr", "f * stride_dr + r * stride_df", BOTH
    ),
    Mutation("tokens of u as of dz", RESIDUAL, "t[None, :] * stride_ut", "t[None, :] * stride_zt", OWN),
    Mutation("dots of the last tile alone", RESIDUAL, "dots += dz", "dots = dz", TILES),
    Mutation("every chunk from the first", RESIDUAL, "row = chunk.to(tl.int64) * features + f", "row = f", TILES),
    Mutation(
        "a chunk of a sum one block long",
        RESIDUAL,
        "first + blocks_per_chunk * BLOCK_T",
        "first + (blocks_per_chunk + 1) * BLOCK_T",
        TILES,
    ),
    Mutation(
        "tokens read past the last",
        RESIDUAL,
        "dz_ptr + f * stride_zf + t[None, :] * stride_zt, mask=inside",
        "dz_ptr + f * stride_zf + t[None, :] * stride_zt, mask=f_mask",
        EDGES,
    ),
    Mutation(
        "z written past its edge",
        RESIDUAL,
        "z.to(z_ptr.dtype.element_ty), mask=inside)",
        "z.to(z_ptr.dtype.element_ty), mask=t < tokens)",
        FILLED,
    ),
    Mutation(
        "du written past its edge",
        RESIDUAL,
        "du.to(du_ptr.dtype.element_ty), mask=inside)",
        "du.to(du_ptr.dtype.element_ty), mask=f_mask)",
        FILLED,
    ),
    Mutation("the slope of the gate left out", "gated_lora/gate.py", "(dh * (u * slope))", "(dh * u)", GATE),
]


ONE_A_KERNEL = list({mutation.file: mutation for mutation in reversed(MUTATIONS)}.values())
RUN = MUTATIONS if os.environ.get("PETUNE_MUTATIONS") == "all" else ONE_A_KERNEL


@pytest.fixture
def copy(tmp_path) -> Path:
    """What the interpreted tests need of the repository; `pythonpath` of its pyproject.toml puts it first."""
    shutil.copytree(ROOT / "petune", tmp_path / "petune", symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests" / "kernels", tmp_path / "tests" / "kernels")
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "tests")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def run(copy: Path, *noticed_by: str) -> tuple[int | None, str]:
    picked = [one.split(" ", 1) for one in noticed_by]
    files = sorted({f"tests/kernels/triton/test_{name}.py" for name, _ in picked})
    wanted = " or ".join(f"(test_{name}.py and {tests})" for name, tests in picked)
    done = fresh.run_pytest("-x", *files, "-k", wanted, cwd=copy, timeout=240, PETUNE_INTERPRETED="all")
    return done.code, done.output + done.errors


@pytest.mark.slow
def test_an_unchanged_copy_passes(copy):
    noticing = sorted({mutation.noticed_by for mutation in RUN})
    code, output = run(copy, *noticing)
    assert code == 0, output
    ran = int(re.findall(r"\b(\d+) passed\b", output)[-1])
    assert ran >= len(noticing), output


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_what_a_mutation_replaces_stands_there_once(mutation):
    source = (ROOT / "petune" / "kernels" / mutation.file).read_text()
    assert source.count(mutation.text) == 1, "follow the kernel's change here"


@pytest.mark.slow
@pytest.mark.parametrize("mutation", RUN, ids=lambda mutation: mutation.what)
def test_a_mutation_is_noticed(copy, mutation):
    file = copy / "petune" / "kernels" / mutation.file
    source = file.read_text()
    file.write_text(source.replace(mutation.text, mutation.replacement))
    code, output = run(copy, mutation.noticed_by)
    assert code == 1, output  # 1 is a failed test; 2 and more is a run that could not start
    assert re.search(r"^E +(assert|AssertionError)\b", output, re.MULTILINE), f"it crashes instead:\n{output}"
