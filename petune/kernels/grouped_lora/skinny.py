# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# Triton types a kernel's pointers and constants as what they are inside of it, not as what a launch takes
"""Products with the rank as one axis, for tokens of many adapters: shrink, expand, dual and outer.

A tile holds tokens of one adapter (`petune.kernels.grouped_lora.layout`). Tokens are read and written where they lie;
s and ds lie in the order of the adapters. Where several programs share a sum, each writes its part in fp32, and the
parts are added up in a fixed order.

The factors of all adapters come as one tensor, [Σ rank, features], and a table of where each begins. To copy them
together moves 2 · Σ rank · features elements a call, 2 MB for 8 adapters of rank 16 and 4096 features in 16 bits; a
table of pointers would have to be copied to the device whenever a parameter moves, which no CUDA graph replays, and
would leave Triton without what it knows of a tensor's alignment.
"""

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from petune.kernels.chooser import Config
from petune.kernels.grouped_lora.layout import Dropped, Layout, places_of, tile_of, tokens_at
from petune.kernels.launch import FUSED, blocks_of, keep_tokens, padded_rank, precision, split, upcasts
from petune.kernels.lora_linear.sums import add_up

# Triton would compile a kernel more for each of these that is 1 or a multiple of 16, and no load is wider for it
_PLAIN = ["adapters", "per_row", "blocks_per_chunk", "chunks"]


@triton.jit
def _keep(
    seeds_ptr, thresholds_ptr, index_ptr, adapter, p, t, begin, stop, first_feature,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """The adapter's mask of its tokens t, which lie at places p; both [BLOCK_T]."""
    own = p - begin
    if index_ptr is not None:
        own = tl.load(index_ptr + t, mask=p < stop, other=0).to(tl.int32)
    seed, threshold = tl.load(seeds_ptr + adapter), tl.load(thresholds_ptr + adapter)
    return keep_tokens(seed, threshold, own, first_feature, BLOCK_T, BLOCK_F)


@triton.jit(do_not_specialize=_PLAIN)
def _grouped_shrink_kernel(
    x_ptr, factor_ptr, s_ptr, order_ptr, offsets_ptr, starts_ptr, scales_ptr, seeds_ptr, thresholds_ptr, index_ptr,
    adapters, per_row, features, blocks_per_chunk, stride_xt, stride_xf, stride_ar, stride_af, stride_sc, stride_st,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """s[c] = scale · (x ⊙ m)[:, chunk c] a[:, chunk c]ᵀ; a program owns a tile of one adapter and one chunk."""
    compute: tl.constexpr = tl.float32 if UPCAST else x_ptr.dtype.element_ty
    chunk = tl.program_id(1)
    adapter, tile = tile_of(tl.program_id(0), offsets_ptr, adapters, per_row, BLOCK_T, BLOCK_L)
    if adapter >= adapters:
        return
    begin, stop = places_of(offsets_ptr, adapter, per_row)
    start = tl.load(starts_ptr + adapter)
    rank = (tl.load(starts_ptr + adapter + 1) - start).to(tl.int32)
    p = begin + tile * BLOCK_T + tl.arange(0, BLOCK_T)
    t = tokens_at(order_ptr, p, stop, per_row)
    r = tl.arange(0, BLOCK_R)[None, :]  # [1, BLOCK_R]
    first = chunk * blocks_per_chunk * BLOCK_F
    last = tl.minimum(first + blocks_per_chunk * BLOCK_F, features)
    s = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    for first_feature in range(first, last, BLOCK_F):
        f = first_feature + tl.arange(0, BLOCK_F).to(tl.int64)
        x_mask = (p < stop)[:, None] & (f[None, :] < features)
        x = tl.load(x_ptr + t[:, None] * stride_xt + f[None, :] * stride_xf, mask=x_mask, other=0.0).to(compute)
        a_mask = (r < rank) & (f[:, None] < features)
        a = tl.load(factor_ptr + (start + r) * stride_ar + f[:, None] * stride_af, mask=a_mask, other=0.0).to(compute)
        if seeds_ptr is not None:
            keep = _keep(
                seeds_ptr, thresholds_ptr, index_ptr, adapter, p, t, begin, stop, first_feature, BLOCK_T, BLOCK_F
            )
            x = tl.where(keep, x, 0.0)
        s = tl.dot(x, a, s, input_precision=PRECISION)  # [BLOCK_T, BLOCK_F] [BLOCK_F, BLOCK_R]
    if scales_ptr is not None:
        s *= tl.load(scales_ptr + adapter)
    s_ptrs = s_ptr + chunk.to(tl.int64) * stride_sc + p[:, None].to(tl.int64) * stride_st + r
    tl.store(s_ptrs, s.to(s_ptr.dtype.element_ty), mask=(p < stop)[:, None] & (r < rank))


@triton.jit(do_not_specialize=_PLAIN)
def _grouped_expand_kernel(
    s_ptr, factor_ptr, y_ptr, order_ptr, offsets_ptr, starts_ptr, scales_ptr, seeds_ptr, thresholds_ptr, index_ptr,
    adapters, per_row, features, stride_st, stride_ar, stride_af, stride_yt, stride_yf,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """y += m ⊙ (scale · s b); a program owns one tile of y, of one adapter, neighbours one row of tiles."""
    compute: tl.constexpr = tl.float32 if UPCAST else s_ptr.dtype.element_ty
    blocks = tl.cdiv(features, BLOCK_F)
    adapter, tile = tile_of(tl.program_id(0) // blocks, offsets_ptr, adapters, per_row, BLOCK_T, BLOCK_L)
    if adapter >= adapters:
        return
    first_feature = tl.program_id(0) % blocks * BLOCK_F
    begin, stop = places_of(offsets_ptr, adapter, per_row)
    start = tl.load(starts_ptr + adapter)
    rank = (tl.load(starts_ptr + adapter + 1) - start).to(tl.int32)
    p = begin + tile * BLOCK_T + tl.arange(0, BLOCK_T)
    t = tokens_at(order_ptr, p, stop, per_row)
    f = first_feature + tl.arange(0, BLOCK_F)[None, :].to(tl.int64)  # [1, BLOCK_F]
    r = tl.arange(0, BLOCK_R)
    s_mask = (p < stop)[:, None] & (r[None, :] < rank)
    s = tl.load(s_ptr + p[:, None].to(tl.int64) * stride_st + r[None, :], mask=s_mask, other=0.0).to(compute)
    b_mask = (f < features) & (r[:, None] < rank)
    b = tl.load(factor_ptr + (start + r[:, None]) * stride_ar + f * stride_af, mask=b_mask, other=0.0).to(compute)
    y = tl.dot(s, b, input_precision=PRECISION)
    if scales_ptr is not None:
        y *= tl.load(scales_ptr + adapter)
    if seeds_ptr is not None:
        keep = _keep(seeds_ptr, thresholds_ptr, index_ptr, adapter, p, t, begin, stop, first_feature, BLOCK_T, BLOCK_F)
        y = tl.where(keep, y, 0.0)
    y_ptrs = y_ptr + t[:, None] * stride_yt + f * stride_yf
    y_mask = (p < stop)[:, None] & (f < features)
    y += tl.load(y_ptrs, mask=y_mask, other=0.0).to(tl.float32)
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=y_mask)


@triton.jit(do_not_specialize=_PLAIN)
def _grouped_outer_kernel(
    x_ptr, v_ptr, factor_ptr, columns_ptr, rows_ptr, order_ptr, offsets_ptr, starts_ptr, scales_ptr, seeds_ptr,
    thresholds_ptr, index_ptr, per_row, features, chunks, stride_xt, stride_xf, stride_vt, stride_ar, stride_af,
    stride_cc, stride_rc, stride_rt,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr, BY_FEATURE: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """columns[c] = scale · (x ⊙ m)[chunk c]ᵀ v[chunk c], and with rows the other product of the same tile of x,
    rows[p] = scale · (x ⊙ m)[:, block p] a[:, block p]ᵀ; a program owns BLOCK_F features and a chunk of one adapter.

    Columns lie as a does, [rank, features], or by feature, [features, rank]; each adapter's after those before it.
    """
    compute: tl.constexpr = tl.float32 if UPCAST else x_ptr.dtype.element_ty
    block, adapter, chunk = tl.program_id(0), tl.program_id(1) // chunks, tl.program_id(1) % chunks
    begin, stop = places_of(offsets_ptr, adapter, per_row)
    start = tl.load(starts_ptr + adapter)
    rank = (tl.load(starts_ptr + adapter + 1) - start).to(tl.int32)
    first_feature = block * BLOCK_F
    f = first_feature + tl.arange(0, BLOCK_F)[:, None].to(tl.int64)  # [BLOCK_F, 1]
    r = tl.arange(0, BLOCK_R)[None, :]  # [1, BLOCK_R]
    own = (f < features) & (r < rank)
    scale = 1.0
    if scales_ptr is not None:
        scale = tl.load(scales_ptr + adapter)
    if rows_ptr is not None:
        a = tl.load(factor_ptr + (start + r) * stride_ar + f * stride_af, mask=own, other=0.0).to(compute)
    per_chunk = tl.cdiv(tl.cdiv(stop - begin, BLOCK_T), chunks) * BLOCK_T
    first = begin + chunk * per_chunk
    columns = tl.zeros((BLOCK_F, BLOCK_R), dtype=tl.float32)
    for place in range(first, tl.minimum(first + per_chunk, stop), BLOCK_T):
        p = place + tl.arange(0, BLOCK_T)
        t = tokens_at(order_ptr, p, stop, per_row)
        wide_p = p[:, None].to(tl.int64)
        v_mask = (p < stop)[:, None] & (r < rank)
        v = tl.load(v_ptr + wide_p * stride_vt + r, mask=v_mask, other=0.0).to(compute)
        # loaded with features first: [BLOCK_T, BLOCK_F] and a transpose would not be copied asynchronously on sm_80
        x_mask = (f < features) & (p < stop)[None, :]
        x = tl.load(x_ptr + f * stride_xf + t[None, :] * stride_xt, mask=x_mask, other=0.0).to(compute)
        if seeds_ptr is not None:
            keep = _keep(
                seeds_ptr, thresholds_ptr, index_ptr, adapter, p, t, begin, stop, first_feature, BLOCK_T, BLOCK_F
            )
            x = tl.where(tl.trans(keep), x, 0.0)
        columns = tl.dot(x, v, columns, input_precision=PRECISION)  # [BLOCK_F, BLOCK_T] [BLOCK_T, BLOCK_R]
        if rows_ptr is not None:
            rows = tl.dot(tl.trans(x), a, input_precision=PRECISION) * scale  # [BLOCK_T, BLOCK_R]
            rows_ptrs = rows_ptr + block.to(tl.int64) * stride_rc + wide_p * stride_rt + r
            tl.store(rows_ptrs, rows.to(rows_ptr.dtype.element_ty), mask=v_mask)
    columns_ptr += chunk.to(tl.int64) * stride_cc + start * features
    columns_ptrs = columns_ptr + (f * rank + r if BY_FEATURE else r.to(tl.int64) * features + f)
    tl.store(columns_ptrs, (columns * scale).to(columns_ptr.dtype.element_ty), mask=own)


# ---------------------------------------------------------------------------------------------- the host functions


def shrink(
    x: Tensor, a: Tensor, layout: Layout, *,
    scales: Tensor | None = None, masks: Dropped | None = None, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """s = scale_l · (x ⊙ m_l) a_lᵀ in one read of x.

    Args:
        x: [tokens, features]; fp32, fp16 or bf16, any strides.
        a: the factors, [Σ rank, features], any strides and floating dtype; each rank 1..256.
        layout: of the tokens and the factors.
        scales: float32, [adapters]; None for 1.
        masks: m_l, the elements of x that count; None for all.
        config: one of `configs`; by default the one for this number of tokens.

    Returns:
        s, [tokens, largest rank], in the order of the adapters; dtype of x. It is not written where an adapter has a
        smaller rank, nor for rows of the base alone.
    """
    (tokens, features), rank_block = x.shape, padded_rank(layout.largest)
    s = x.new_empty(tokens, layout.largest)
    if not x.numel():
        return s.zero_()
    config = config or _config("shrink", x, layout)
    tiles = layout.tiles(tokens, config.block_tokens)
    chunks, blocks_per_chunk = split(tiles, blocks_of(features, config.block_features), x.device)
    sums = s if chunks == 1 else x.new_empty(chunks, tokens, layout.largest, dtype=torch.float32)
    _grouped_shrink_kernel[tiles, chunks](
        x_ptr=x, factor_ptr=a, s_ptr=sums, **_pointers(layout, scales, masks), adapters=layout.adapters,
        per_row=layout.per_row(tokens), features=features, blocks_per_chunk=blocks_per_chunk, stride_xt=x.stride(0),
        stride_xf=x.stride(1), stride_ar=a.stride(0), stride_af=a.stride(1), stride_sc=sums.stride(0),
        stride_st=sums.stride(-2), BLOCK_L=layout.block,
        **_constants(config, rank_block, x.dtype),
    )  # fmt: skip
    if chunks > 1:
        add_up((sums, s))
    return s


def expand(
    s: Tensor, b: Tensor, layout: Layout, *,
    out: Tensor, scales: Tensor | None = None, masks: Dropped | None = None, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """out += m_l ⊙ (scale_l · s b_l), in one read and one write of the tokens that take an adapter.

    Args:
        s: [tokens, largest rank] in the order of the adapters; fp32, fp16 or bf16, unit inner stride.
        b: the factors, [Σ rank, features], any strides and floating dtype.
        layout: of the tokens and the factors.
        out: [tokens, features], any strides and floating dtype.
        scales: float32, [adapters]; None for 1.
        masks: m_l, the elements of out that get the product; None for all.
        config: one of `configs`; by default the one for this number of tokens.
    """
    tokens, features = out.shape
    if not out.numel():
        return out
    config = config or _config("expand", s, layout)
    programs = layout.tiles(tokens, config.block_tokens) * blocks_of(features, config.block_features)
    _grouped_expand_kernel[programs,](
        s_ptr=s, factor_ptr=b, y_ptr=out, **_pointers(layout, scales, masks), adapters=layout.adapters,
        per_row=layout.per_row(tokens), features=features, stride_st=s.stride(0), stride_ar=b.stride(0),
        stride_af=b.stride(1), stride_yt=out.stride(0), stride_yf=out.stride(1),
        BLOCK_L=layout.block, **_constants(config, padded_rank(layout.largest), s.dtype),
    )  # fmt: skip
    return out


def dual(
    dy: Tensor, s: Tensor, b: Tensor, layout: Layout, *,
    scales: Tensor, dtype: torch.dtype, config: Config | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """ds = scale_l · dy b_l and dB_l = scale_l · dyᵀ s in one read of dy, or in two where that moves fewer bytes.

    Args:
        dy: [tokens, features]; fp32, fp16 or bf16, any strides.
        s: [tokens, largest rank] in the order of the adapters, unit inner stride; dtype of dy.
        b: the factors, [features, Σ rank], any strides and floating dtype.
        layout: of the tokens and the factors.
        scales: float32, [adapters].
        dtype: of dB, which is rounded once, from its fp32 sum.
        config: one of `configs`; by default the one for this rank.

    Returns:
        ds as `shrink` gives it, and dB, flat: one [features, rank_l] after the other, zero for an adapter in no row.
    """
    config = config or _config("dual", dy, layout)
    if config.form == "two_reads" or not dy.numel():
        ds = shrink(dy, b.T, layout, scales=scales)
        return ds, _outer(dy, s, None, None, layout, scales, None, dtype, True, None).flatten()
    ds = dy.new_empty(len(dy), layout.largest)
    return ds, _outer(dy, s, b.T, ds, layout, scales, None, dtype, True, config).flatten()


def outer(
    x: Tensor, ds: Tensor, layout: Layout, *,
    dtype: torch.dtype, masks: Dropped | None = None, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """dA_l = dsᵀ (x ⊙ m_l) in one read of x: [Σ rank, features], zero for an adapter in no row.

    Args:
        x: [tokens, features]; fp32, fp16 or bf16, any strides.
        ds: [tokens, largest rank] in the order of the adapters, unit inner stride; dtype of x.
        layout: of the tokens and the factors.
        dtype: of the result, which is rounded once, from its fp32 sum.
        masks: m_l, those of the forward pass.
        config: one of `configs`; by default the one for this rank.
    """
    return _outer(x, ds, None, None, layout, None, masks, dtype, False, config)


def _outer(
    x: Tensor, v: Tensor, a: Tensor | None, rows: Tensor | None, layout: Layout, scales: Tensor | None,
    masks: Dropped | None, dtype: torch.dtype, by_feature: bool, config: Config | None,
) -> Tensor:  # fmt: skip
    """columns = scale_l · (x ⊙ m_l)ᵀ v, and with a also rows = scale_l · (x ⊙ m_l) a_lᵀ."""
    (tokens, features), largest = x.shape, v.shape[1]
    columns = x.new_empty(sum(layout.ranks), features, dtype=dtype)
    if not x.numel():
        return columns.zero_()
    config = config or _config("outer", x, layout)
    blocks = blocks_of(features, config.block_features)
    chunks, _ = split(blocks * layout.most, blocks_of(tokens, config.block_tokens * layout.most), x.device)
    sums = columns if chunks == 1 else x.new_empty(chunks, *columns.shape, dtype=torch.float32)
    row_sums = rows if rows is None or blocks == 1 else x.new_empty(blocks, tokens, largest, dtype=torch.float32)
    stride_ar, stride_af = (0, 0) if a is None else a.stride()
    _grouped_outer_kernel[blocks, layout.adapters * chunks](
        x_ptr=x, v_ptr=v, factor_ptr=a, columns_ptr=sums, rows_ptr=row_sums, **_pointers(layout, scales, masks),
        per_row=layout.per_row(tokens), features=features, chunks=chunks, stride_xt=x.stride(0),
        stride_xf=x.stride(1), stride_vt=v.stride(0), stride_ar=stride_ar, stride_af=stride_af,
        stride_cc=columns.numel(), stride_rc=tokens * largest, stride_rt=largest, BY_FEATURE=by_feature,
        **_constants(config, padded_rank(layout.largest), x.dtype),
    )  # fmt: skip
    if chunks > 1:
        width = gcd(columns.numel(), 256)  # any: the sums are one long row
        add_up((sums.view(chunks, -1, width), columns.view(-1, width)))
    if rows is not None and row_sums is not rows:
        add_up((row_sums, rows))
    return columns


def _pointers(layout: Layout, scales: Tensor | None, masks: Dropped | None) -> dict[str, Tensor | None]:
    seeds, thresholds, token_index = masks or (None, None, None)
    return {
        "order_ptr": layout.order,
        "offsets_ptr": layout.offsets,
        "starts_ptr": layout.starts,
        "scales_ptr": scales,
        "seeds_ptr": seeds,
        "thresholds_ptr": thresholds,
        "index_ptr": token_index,
    }


def _constants(config: Config, rank_block: int, dtype: torch.dtype) -> dict[str, object]:
    return {
        "BLOCK_T": config.block_tokens,
        "BLOCK_F": config.block_features,
        "BLOCK_R": rank_block,
        "PRECISION": precision(dtype),
        "UPCAST": upcasts(dtype),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **FUSED,
    }


def _config(kernel: str, x: Tensor, layout: Layout) -> Config:
    """The smallest tile that holds the tokens of a mean adapter, else the largest."""
    of_rank = configs(kernel, x.dtype, padded_rank(layout.largest))
    return next((config for config in of_rank if config.block_tokens * layout.most >= len(x)), of_rank[-1])


TWO_READS = Config(0, 0, 0, 0, form="two_reads")
"""The row of `dual` that is `shrink` and `outer`, one after the other: see `petune.kernels.lora_linear.skinny`."""

# None of these spills or takes more than the 99 KiB that a multiprocessor of sm_86 gives one program
_TABLES: dict[tuple[str, int], dict[int, tuple[Config, ...]]] = {
    # (kernel, bytes of an element): the largest padded rank that these rows serve, and the rows, from few tokens of an
    # adapter to many. fp32 has at most 32 rows a product: with 64, Triton 3.6 multiplies in TF32 on sm_100
    ("shrink", 2): {
        64: (Config(16, 128, 4, 2), Config(64, 64, 8, 4)),
        256: (Config(16, 32, 8, 3), Config(64, 32, 8, 3)),
    },
    ("shrink", 4): {64: (Config(16, 32, 4, 3), Config(32, 32, 4, 3)), 256: (Config(16, 32, 8, 3),)},
    ("dual", 2): {32: (Config(64, 256, 8, 2),), 256: (TWO_READS,)},
    ("dual", 4): {256: (TWO_READS,)},
    ("outer", 2): {128: (Config(64, 128, 8, 3),), 256: (Config(64, 64, 8, 3),)},
    ("outer", 4): {64: (Config(32, 32, 4, 3),), 256: (Config(32, 16, 8, 3),)},  # sm_80 spills (32, 32, 8, 3)
    ("expand", 2): {
        64: (Config(16, 128, 4, 1), Config(64, 128, 8, 1)),
        256: (Config(16, 64, 8, 1), Config(64, 64, 8, 1)),
    },
    ("expand", 4): {
        64: (Config(16, 64, 8, 1), Config(32, 64, 8, 1)),
        256: (Config(16, 32, 8, 1), Config(32, 32, 8, 1)),
    },
}


def configs(kernel: str, dtype: torch.dtype, rank_block: int) -> tuple[Config, ...]:
    """The compiled forms of "shrink", "dual", "outer" or "expand" for a dtype and a padded rank."""
    rows = _TABLES[kernel, dtype.itemsize]
    return next(found for largest, found in rows.items() if rank_block <= largest)
