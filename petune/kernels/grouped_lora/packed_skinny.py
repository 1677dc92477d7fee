# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# Triton types a kernel's pointers and constants as what they are inside of it, not as what a launch takes
"""Shrink and expand with packed factors of many adapters, unpacked tile by tile, in registers.

The codes of all adapters come as one blob, their levels as another, with a table of what each has. A launch serves one
width of codes; the tiles of adapters with another end at once.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from petune.kernels.chooser import Config
from petune.kernels.grouped_lora.layout import Layout, places_of, table, tile_of, tokens_at
from petune.kernels.launch import FUSED, blocks_of, padded_rank, precision, split, upcasts
from petune.kernels.lora_linear.sums import add_up
from petune.kernels.packed_lora.kernel import _unpacked as unpacked_tile

# Triton would compile a kernel more for each of these that is 1 or a multiple of 16, and no load is wider for it
_PLAIN = ["adapters", "per_row", "blocks_per_chunk", "largest"]
_BYTES = ["bits_ptr", "levels_ptr"]  # of an adapter they begin anywhere, and are read one at a time


@triton.jit
def _factor_of(facts_ptr, adapter, adapters):
    """(rank, width of a code, first byte, first level, levels from one row to the next) of an adapter."""
    rank = tl.load(facts_ptr + adapter).to(tl.int32)
    width = tl.load(facts_ptr + adapters + adapter)
    first_byte = tl.load(facts_ptr + 2 * adapters + adapter)
    first_level = tl.load(facts_ptr + 3 * adapters + adapter)
    stride_lr = tl.load(facts_ptr + 4 * adapters + adapter)
    return rank, width, first_byte, first_level, stride_lr


@triton.jit(do_not_specialize=_PLAIN, do_not_specialize_on_alignment=_BYTES)
def _grouped_packed_shrink_kernel(
    x_ptr, bits_ptr, levels_ptr, facts_ptr, s_ptr, order_ptr, offsets_ptr, adapters, per_row, features, largest,
    blocks_per_chunk, stride_xt, stride_xf, stride_sc, stride_st,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr,
    BITS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """s[c] = x[:, chunk c] Â[:, chunk c]ᵀ; a program owns a tile of one adapter, neighbours the same tokens."""
    compute: tl.constexpr = tl.float32 if UPCAST else x_ptr.dtype.element_ty
    rank_blocks = tl.cdiv(largest, BLOCK_R)
    first_rank = tl.program_id(0) % rank_blocks * BLOCK_R
    chunk = tl.program_id(1)
    adapter, tile = tile_of(tl.program_id(0) // rank_blocks, offsets_ptr, adapters, per_row, BLOCK_T, BLOCK_L)
    if adapter >= adapters:
        return
    rank, width, first_byte, first_level, stride_lr = _factor_of(facts_ptr, adapter, adapters)
    if (width != BITS) | (first_rank >= rank):
        return
    begin, stop = places_of(offsets_ptr, adapter, per_row)
    p = begin + tile * BLOCK_T + tl.arange(0, BLOCK_T)
    t = tokens_at(order_ptr, p, stop, per_row)
    first = chunk * blocks_per_chunk * BLOCK_F
    last = tl.minimum(first + blocks_per_chunk * BLOCK_F, features)
    bits_ptr, levels_ptr = bits_ptr + first_byte, levels_ptr + first_level
    s = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    for start in range(first, last, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)[None, :].to(tl.int64)
        x_mask = (p < stop)[:, None] & (f < features)
        x = tl.load(x_ptr + t[:, None] * stride_xt + f * stride_xf, mask=x_mask, other=0.0).to(compute)
        a = unpacked_tile(bits_ptr, levels_ptr, first_rank, start, rank, features, stride_lr, BLOCK_R, BLOCK_F, BITS)
        s = tl.dot(x, tl.trans(a.to(compute)), s, input_precision=PRECISION)  # [BLOCK_T, BLOCK_F] [BLOCK_F, BLOCK_R]
    r = first_rank + tl.arange(0, BLOCK_R)[None, :]  # [1, BLOCK_R]
    s_ptrs = s_ptr + chunk.to(tl.int64) * stride_sc + p[:, None].to(tl.int64) * stride_st + r
    tl.store(s_ptrs, s.to(s_ptr.dtype.element_ty), mask=(p < stop)[:, None] & (r < rank))


@triton.jit(do_not_specialize=_PLAIN, do_not_specialize_on_alignment=_BYTES)
def _grouped_packed_expand_kernel(
    s_ptr, bits_ptr, levels_ptr, facts_ptr, scales_ptr, y_ptr, order_ptr, offsets_ptr, adapters, per_row, features,
    stride_st, stride_yt,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr,
    BITS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """y += scale · s B̂ᵀ; a program owns one tile of y, of one adapter, neighbours one row of tiles."""
    compute: tl.constexpr = tl.float32 if UPCAST else s_ptr.dtype.element_ty
    blocks = tl.cdiv(features, BLOCK_F)
    first_feature = tl.program_id(0) % blocks * BLOCK_F
    adapter, tile = tile_of(tl.program_id(0) // blocks, offsets_ptr, adapters, per_row, BLOCK_T, BLOCK_L)
    if adapter >= adapters:
        return
    rank, width, first_byte, first_level, stride_lr = _factor_of(facts_ptr, adapter, adapters)
    if width != BITS:
        return
    begin, stop = places_of(offsets_ptr, adapter, per_row)
    p = begin + tile * BLOCK_T + tl.arange(0, BLOCK_T)
    t = tokens_at(order_ptr, p, stop, per_row)
    f = first_feature + tl.arange(0, BLOCK_F)[None, :].to(tl.int64)  # [1, BLOCK_F]
    bits_ptr, levels_ptr = bits_ptr + first_byte, levels_ptr + first_level
    y = tl.zeros((BLOCK_T, BLOCK_F), dtype=tl.float32)
    for start in range(0, rank, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)[None, :]  # [1, BLOCK_R]
        s_mask = (p < stop)[:, None] & (r < rank)
        s = tl.load(s_ptr + p[:, None].to(tl.int64) * stride_st + r, mask=s_mask, other=0.0).to(compute)
        b = unpacked_tile(
            bits_ptr, levels_ptr, first_feature, start, features, rank, stride_lr, BLOCK_F, BLOCK_R, BITS
        )
        y = tl.dot(s, tl.trans(b.to(compute)), y, input_precision=PRECISION)
    y *= tl.load(scales_ptr + adapter)
    y_ptrs = y_ptr + t[:, None] * stride_yt + f
    y_mask = (p < stop)[:, None] & (f < features)
    y += tl.load(y_ptrs, mask=y_mask, other=0.0).to(tl.float32)
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=y_mask)


class Factors(NamedTuple):
    """One packed factor of every adapter."""

    bits: Tensor
    """Codes, uint8, one adapter after the other."""
    levels: Tensor
    """What they stand for, float32, flat, one adapter after the other."""
    facts: Tensor
    """int64, [5, adapters]: rank, width of a code, first byte, first level, levels from one row to the next or 0."""

    @classmethod
    def of(
        cls, bits: Sequence[Tensor], levels: Sequence[Tensor], ranks: Sequence[int], widths: Sequence[int]
    ) -> "Factors":
        """The factors as `petune.kernels.packed_lora.packed_lora` takes each, copied together."""
        facts = (
            *(*ranks, *widths),
            *list(accumulate((len(codes) for codes in bits), initial=0))[:-1],
            *list(accumulate((rows.numel() for rows in levels), initial=0))[:-1],
            *(rows.shape[1] if len(rows) > 1 else 0 for rows in levels),
        )
        flat = torch.cat([rows.flatten() for rows in levels])
        return cls(torch.cat(tuple(bits)), flat, table(facts, torch.int64, flat.device))


def shrink(x: Tensor, a: Factors, layout: Layout, width: int, *, config: Config | None = None) -> Tensor:
    """s = x Â_lᵀ in one read of x, for the adapters whose codes have `width` bits.

    Args:
        x: [tokens, features]; fp32, fp16 or bf16, any strides.
        a: Â_l, each [rank, features].
        layout: of the tokens.
        width: 1, 2, 4 or 8.
        config: one of `configs`; by default the one for this number of tokens.

    Returns:
        s, [tokens, largest rank], in the order of the adapters; dtype of x. Nothing else of it is written.
    """
    tokens, features = x.shape
    s = x.new_empty(tokens, layout.largest)
    if not x.numel():
        return s.zero_()
    config = config or _config("shrink", x, layout)
    tiles = layout.tiles(tokens, config.block_tokens) * blocks_of(layout.largest, _rank_block(layout))
    chunks, blocks_per_chunk = split(tiles, blocks_of(features, config.block_features), x.device)
    sums = s if chunks == 1 else x.new_empty(chunks, tokens, layout.largest, dtype=torch.float32)
    _grouped_packed_shrink_kernel[tiles, chunks](
        x_ptr=x, bits_ptr=a.bits, levels_ptr=a.levels, facts_ptr=a.facts, s_ptr=sums, order_ptr=layout.order,
        offsets_ptr=layout.offsets, adapters=layout.adapters, per_row=layout.per_row(tokens), features=features,
        largest=layout.largest, blocks_per_chunk=blocks_per_chunk, stride_xt=x.stride(0), stride_xf=x.stride(1),
        stride_sc=sums.stride(0), stride_st=sums.stride(-2), **_constants(config, layout, width, x.dtype),
    )  # fmt: skip
    if chunks > 1:
        add_up((sums, s))
    return s


def expand(
    s: Tensor, b: Factors, layout: Layout, width: int, *, out: Tensor, scales: Tensor, config: Config | None = None
) -> Tensor:
    """out += scale_l · s B̂_lᵀ for the adapters whose codes have `width` bits.

    Args:
        s: [tokens, largest rank] in the order of the adapters; fp32, fp16 or bf16, unit inner stride.
        b: B̂_l, each [features, rank].
        layout: of the tokens.
        width: 1, 2, 4 or 8.
        out: [tokens, features], unit inner stride; any floating dtype.
        scales: float32, [adapters].
        config: one of `configs`; by default the one for this number of tokens.
    """
    tokens, features = out.shape
    if not out.numel():
        return out
    config = config or _config("expand", s, layout)
    programs = layout.tiles(tokens, config.block_tokens) * blocks_of(features, config.block_features)
    _grouped_packed_expand_kernel[programs,](
        s_ptr=s, bits_ptr=b.bits, levels_ptr=b.levels, facts_ptr=b.facts, scales_ptr=scales, y_ptr=out,
        order_ptr=layout.order, offsets_ptr=layout.offsets, adapters=layout.adapters, per_row=layout.per_row(tokens),
        features=features, stride_st=s.stride(0), stride_yt=out.stride(0),
        **_constants(config, layout, width, s.dtype),
    )  # fmt: skip
    return out


def _constants(config: Config, layout: Layout, width: int, dtype: torch.dtype) -> dict[str, object]:
    return {
        "BLOCK_T": config.block_tokens,
        "BLOCK_F": config.block_features,
        "BLOCK_R": _rank_block(layout),
        "BLOCK_L": layout.block,
        "BITS": width,
        "PRECISION": precision(dtype),
        "UPCAST": upcasts(dtype),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **FUSED,
    }


def _rank_block(layout: Layout) -> int:
    """Ranks that are unpacked at once: 64 of 8 bits each would spill registers."""
    return min(padded_rank(layout.largest), 32)


def _config(kernel: str, x: Tensor, layout: Layout) -> Config:
    few, many = configs(kernel, x.dtype)
    return few if few.block_tokens * layout.most >= len(x) else many


# (kernel, bytes of an element): the config for few tokens of an adapter and the one for many; none spills at 8 bits,
# as (16, 64, 8, 1) does on sm_90. fp32 has at most 32 rows a product: see `petune.kernels.packed_lora.kernel`
_TABLES: dict[tuple[str, int], tuple[Config, Config]] = {
    ("shrink", 2): (Config(16, 128, 8, 3), Config(64, 64, 8, 3)),
    ("shrink", 4): (Config(16, 32, 4, 3), Config(32, 32, 8, 3)),
    ("expand", 2): (Config(16, 32, 8, 1), Config(64, 64, 4, 1)),
    ("expand", 4): (Config(16, 64, 8, 1), Config(16, 64, 8, 1)),
}


def configs(kernel: str, dtype: torch.dtype) -> tuple[Config, Config]:
    """The compiled forms of "shrink" or "expand" for a dtype: for few tokens of an adapter, and for many."""
    return _TABLES[kernel, dtype.itemsize]
