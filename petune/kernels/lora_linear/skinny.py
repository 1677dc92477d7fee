# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# Triton types a kernel's pointers and constants as what they are inside of it, not as what a launch takes
"""Products with the rank as one axis: shrink, dual, outer and expand, each in one pass over its large operand.

Every one of them is bound by bytes. Where several programs share a sum, each writes its part in fp32 and
`petune.kernels.lora_linear.sums` adds them up.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from petune.kernels.chooser import Config
from petune.kernels.dropout import Mask
from petune.kernels.launch import (
    FUSED,
    blocks_of,
    capability,
    has_large_blocks,
    keep_tile,
    padded_rank,
    precision,
    split,
    upcasts,
)
from petune.kernels.lora_linear.sums import add_up

# Triton would compile a kernel more for each of these that is 1 or a multiple of 16, and no load is wider for it
_PLAIN = ["threshold", "tokens", "blocks_per_chunk"]


@triton.jit(do_not_specialize=_PLAIN)
def _shrink_kernel(
    x_ptr, a_ptr, s_ptr, seed_ptr, threshold, tokens, features, rank, blocks_per_chunk, scale,
    stride_xt, stride_xf, stride_ar, stride_af, stride_sc, stride_st, stride_sr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """s[c] = scale · (x ⊙ m)[:, chunk c] a[:, chunk c]ᵀ; a program owns BLOCK_T tokens and one chunk of features."""
    compute: tl.constexpr = tl.float32 if UPCAST else x_ptr.dtype.element_ty
    chunk = tl.program_id(1)
    first_token = tl.program_id(0) * BLOCK_T
    t = first_token + tl.arange(0, BLOCK_T)[:, None].to(tl.int64)  # [BLOCK_T, 1]
    r = tl.arange(0, BLOCK_R)[None, :]  # [1, BLOCK_R]
    first = chunk * blocks_per_chunk * BLOCK_F
    last = tl.minimum(first + blocks_per_chunk * BLOCK_F, features)
    if MASKED:
        seed = tl.load(seed_ptr)

    s = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    for start in range(first, last, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F).to(tl.int64)
        x_mask = (t < tokens) & (f[None, :] < features)
        x = tl.load(x_ptr + t * stride_xt + f[None, :] * stride_xf, mask=x_mask, other=0.0).to(compute)
        a_mask = (r < rank) & (f[:, None] < features)
        a = tl.load(a_ptr + r * stride_ar + f[:, None] * stride_af, mask=a_mask, other=0.0).to(compute)
        if MASKED:
            x = tl.where(keep_tile(seed, threshold, first_token, start, BLOCK_T, BLOCK_F), x, 0.0)
        s = tl.dot(x, a, s, input_precision=PRECISION)  # [BLOCK_T, BLOCK_F] [BLOCK_F, BLOCK_R]
    s_ptrs = s_ptr + chunk.to(tl.int64) * stride_sc + t * stride_st + r * stride_sr
    tl.store(s_ptrs, (s * scale).to(s_ptr.dtype.element_ty), mask=(t < tokens) & (r < rank))


@triton.jit(do_not_specialize=_PLAIN)
def _outer_kernel(
    x_ptr, v_ptr, b_ptr, columns_ptr, rows_ptr, seed_ptr, threshold, tokens, features, rank, blocks_per_chunk, scale,
    stride_xt, stride_xf, stride_vt, stride_vr, stride_bf, stride_br,
    stride_cc, stride_cf, stride_cr, stride_rc, stride_rt, stride_rr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr,
    MASKED: tl.constexpr, WITH_ROWS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """columns[c] = scale · (x ⊙ m)[chunk c]ᵀ v[chunk c], and with rows the other product of the same tile of x,
    rows[p] = scale · (x ⊙ m)[:, block p] b[block p]; a program owns BLOCK_F features and one chunk of tokens.

    Features are the long axis of the sum in registers, [BLOCK_F, BLOCK_R], so that a wgmma's 64 rows are full.
    """
    compute: tl.constexpr = tl.float32 if UPCAST else x_ptr.dtype.element_ty
    block, chunk = tl.program_id(0), tl.program_id(1)
    first_feature = block * BLOCK_F
    f = first_feature + tl.arange(0, BLOCK_F)[:, None].to(tl.int64)  # [BLOCK_F, 1]
    r = tl.arange(0, BLOCK_R)[None, :]  # [1, BLOCK_R]
    first = chunk * blocks_per_chunk * BLOCK_T
    last = tl.minimum(first + blocks_per_chunk * BLOCK_T, tokens)
    if MASKED:
        seed = tl.load(seed_ptr)
    if WITH_ROWS:
        b_mask = (f < features) & (r < rank)
        b = tl.load(b_ptr + f * stride_bf + r * stride_br, mask=b_mask, other=0.0).to(compute)  # [BLOCK_F, BLOCK_R]

    columns = tl.zeros((BLOCK_F, BLOCK_R), dtype=tl.float32)
    for start in range(first, last, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T).to(tl.int64)
        v_mask = (t[:, None] < tokens) & (r < rank)
        v = tl.load(v_ptr + t[:, None] * stride_vt + r * stride_vr, mask=v_mask, other=0.0).to(compute)
        # loaded with features first: [BLOCK_T, BLOCK_F] and a transpose would not be copied asynchronously on sm_80
        x_mask = (f < features) & (t[None, :] < tokens)
        x = tl.load(x_ptr + f * stride_xf + t[None, :] * stride_xt, mask=x_mask, other=0.0).to(compute)
        if MASKED:
            keep = keep_tile(seed, threshold, start, first_feature, BLOCK_T, BLOCK_F)
            x = tl.where(tl.trans(keep), x, 0.0)
        columns = tl.dot(x, v, columns, input_precision=PRECISION)  # [BLOCK_F, BLOCK_T] [BLOCK_T, BLOCK_R]
        if WITH_ROWS:
            rows = tl.dot(tl.trans(x), b, input_precision=PRECISION) * scale  # [BLOCK_T, BLOCK_R]
            rows_ptrs = rows_ptr + block.to(tl.int64) * stride_rc + t[:, None] * stride_rt + r * stride_rr
            tl.store(rows_ptrs, rows.to(rows_ptr.dtype.element_ty), mask=v_mask)
    columns_ptrs = columns_ptr + chunk.to(tl.int64) * stride_cc + f * stride_cf + r * stride_cr
    tl.store(columns_ptrs, (columns * scale).to(columns_ptr.dtype.element_ty), mask=(f < features) & (r < rank))


@triton.jit(do_not_specialize=_PLAIN)
def _expand_kernel(
    s_ptr, b_ptr, bias_ptr, y_ptr, seed_ptr, threshold, tokens, features, rank, scale,
    stride_st, stride_sr, stride_bf, stride_br, stride_bias, stride_yt, stride_yf,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr, MASKED: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """y = (y) + m ⊙ (scale · s bᵀ) + bias; a program owns one tile of y, neighbours one row of tiles."""
    compute: tl.constexpr = tl.float32 if UPCAST else s_ptr.dtype.element_ty
    blocks = tl.cdiv(features, BLOCK_F)
    first_token = tl.program_id(0) // blocks * BLOCK_T
    first_feature = tl.program_id(0) % blocks * BLOCK_F
    t = first_token + tl.arange(0, BLOCK_T)[:, None].to(tl.int64)  # [BLOCK_T, 1]
    f = first_feature + tl.arange(0, BLOCK_F)[None, :].to(tl.int64)  # [1, BLOCK_F]
    r = tl.arange(0, BLOCK_R)
    s_mask = (t < tokens) & (r[None, :] < rank)
    s = tl.load(s_ptr + t * stride_st + r[None, :] * stride_sr, mask=s_mask, other=0.0).to(compute)
    b_mask = (f < features) & (r[:, None] < rank)
    b = tl.load(b_ptr + f * stride_bf + r[:, None] * stride_br, mask=b_mask, other=0.0).to(compute)
    y = tl.dot(s, b, input_precision=PRECISION) * scale
    if MASKED:
        y = tl.where(keep_tile(tl.load(seed_ptr), threshold, first_token, first_feature, BLOCK_T, BLOCK_F), y, 0.0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + f * stride_bias, mask=f < features, other=0.0).to(tl.float32)
    y_ptrs = y_ptr + t * stride_yt + f * stride_yf
    y_mask = (t < tokens) & (f < features)
    if ACCUMULATE:
        y += tl.load(y_ptrs, mask=y_mask, other=0.0).to(tl.float32)
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=y_mask)


def shrink(
    x: Tensor,
    a: Tensor,
    *,
    scale: float = 1.0,
    mask: Mask | None = None,
    out: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """s = scale · (x ⊙ m) aᵀ in one read of x.

    Args:
        x: [tokens, features]; fp32, fp16 or bf16, any strides, as everywhere here.
        a: [rank, features], any floating dtype; rank 1..256.
        scale: a factor of the fp32 sum.
        mask: m, the elements of x that count; None for all.
        out: where to write s, for instance a slice of a larger tensor.
        config: a row of `configs`; the first of them by default.

    Returns:
        s, [tokens, rank], dtype of x.
    """
    (tokens, features), rank = x.shape, a.shape[0]
    s = x.new_empty(tokens, rank) if out is None else out
    if not x.numel():
        return s.zero_()
    rank_block = padded_rank(rank)
    config = config or configs("shrink", x.dtype, rank_block, capability(x.device))[0]
    token_blocks = blocks_of(tokens, config.block_tokens)
    chunks, blocks_per_chunk = split(token_blocks, blocks_of(features, config.block_features), x.device)
    sums = s if chunks == 1 else x.new_empty(chunks, tokens, rank, dtype=torch.float32)
    seed, threshold = mask or (x, 0)
    _shrink_kernel[token_blocks, chunks](
        x_ptr=x, a_ptr=a, s_ptr=sums, seed_ptr=seed, threshold=threshold, tokens=tokens, features=features, rank=rank,
        blocks_per_chunk=blocks_per_chunk, scale=scale, stride_xt=x.stride(0), stride_xf=x.stride(1),
        stride_ar=a.stride(0), stride_af=a.stride(1), stride_sc=sums.stride(0), stride_st=sums.stride(-2),
        stride_sr=sums.stride(-1), **_constants(config, rank_block, x.dtype, mask),
    )  # fmt: skip
    if chunks > 1:
        add_up((sums, s))
    return s


def dual(
    dy: Tensor,
    s: Tensor,
    b: Tensor,
    *,
    scale: float,
    out_ds: Tensor | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """ds = scale · dy b and dB = scale · dyᵀ s in one read of dy, or in two where that moves fewer bytes.

    Args:
        dy: [tokens, features]; fp32, fp16 or bf16.
        s: [tokens, rank], dtype of dy.
        b: [features, rank], any floating dtype.
        scale: a factor of both fp32 sums.
        out_ds: where to write ds.
        config: a row of `configs`; the first of them by default.

    Returns:
        ds, [tokens, rank], dtype of dy, and dB, [features, rank], dtype of b, straight from its fp32 sum.
    """
    ds = dy.new_empty(s.shape) if out_ds is None else out_ds
    db = b.new_empty(b.shape)
    if not dy.numel():
        return ds.zero_(), db.zero_()
    config = config or configs("dual", dy.dtype, padded_rank(b.shape[1]), capability(dy.device))[0]
    if config == TWO_READS:
        return shrink(dy, b.T, scale=scale, out=ds), _outer(dy, s, None, db, None, scale, None, None)
    return ds, _outer(dy, s, b, db, ds, scale, None, config)


def outer(
    x: Tensor, ds: Tensor, *, dtype: torch.dtype, mask: Mask | None = None, config: Config | None = None
) -> Tensor:
    """dA = dsᵀ (x ⊙ m) in one read of x.

    Args:
        x: [tokens, features]; fp32, fp16 or bf16.
        ds: [tokens, rank], dtype of x.
        dtype: of the result, which is rounded once, from its fp32 sum.
        mask: m, the mask of the forward pass; None for all ones.
        config: a row of `configs`; the first of them by default.

    Returns:
        dA, [rank, features].
    """
    da = x.new_empty(ds.shape[1], x.shape[1], dtype=dtype)
    if not x.numel():
        return da.zero_()
    _outer(x, ds, None, da.T, None, 1.0, mask, config)
    return da


def expand(
    s: Tensor,
    b: Tensor,
    *,
    scale: float = 1.0,
    bias: Tensor | None = None,
    mask: Mask | None = None,
    out: Tensor | None = None,
    accumulate: bool = False,
    config: Config | None = None,
) -> Tensor:
    """y = (y) + m ⊙ (scale · s bᵀ) + bias in one write of y.

    Args:
        s: [tokens, rank]; fp32, fp16 or bf16.
        b: [features, rank], any floating dtype.
        scale: a factor of the fp32 product.
        bias: [features], any floating dtype.
        mask: m, the elements of y that get the product; None for all.
        out: y, any floating dtype.
        accumulate: whether to add to what is in `out`.
        config: a row of `configs`; the first of them by default.

    Returns:
        y, [tokens, features], dtype of s where `out` does not say.
    """
    (tokens, rank), features = s.shape, b.shape[0]
    y = s.new_empty(tokens, features) if out is None else out
    if not y.numel():
        return y
    rank_block = padded_rank(rank)
    config = config or configs("expand", s.dtype, rank_block, capability(s.device))[0]
    seed, threshold = mask or (s, 0)
    programs = blocks_of(tokens, config.block_tokens) * blocks_of(features, config.block_features)
    _expand_kernel[programs,](
        s_ptr=s, b_ptr=b, bias_ptr=s if bias is None else bias, y_ptr=y, seed_ptr=seed, threshold=threshold,
        tokens=tokens, features=features, rank=rank, scale=scale, stride_st=s.stride(0), stride_sr=s.stride(1),
        stride_bf=b.stride(0), stride_br=b.stride(1), stride_bias=0 if bias is None else bias.stride(0),
        stride_yt=y.stride(0), stride_yf=y.stride(1), HAS_BIAS=bias is not None, ACCUMULATE=accumulate,
        **_constants(config, rank_block, s.dtype, mask),
    )  # fmt: skip
    return y


def _outer(
    x: Tensor, v: Tensor, b: Tensor | None, columns: Tensor, rows: Tensor | None, scale: float, mask: Mask | None,
    config: Config | None,
) -> Tensor:  # fmt: skip
    """columns = scale · (x ⊙ m)ᵀ v, [features, rank], and with b also rows = scale · (x ⊙ m) b, [tokens, rank]."""
    (tokens, features), rank = x.shape, v.shape[1]
    rank_block = padded_rank(rank)
    config = config or configs("outer", x.dtype, rank_block, capability(x.device))[0]
    blocks = blocks_of(features, config.block_features)
    chunks, blocks_per_chunk = split(blocks, blocks_of(tokens, config.block_tokens), x.device)
    column_sums = columns if chunks == 1 else x.new_empty(chunks, features, rank, dtype=torch.float32)
    if rows is None or b is None:
        b = rows = row_sums = v
    else:
        row_sums = rows if blocks == 1 else x.new_empty(blocks, tokens, rank, dtype=torch.float32)
    seed, threshold = mask or (x, 0)
    _outer_kernel[blocks, chunks](
        x_ptr=x, v_ptr=v, b_ptr=b, columns_ptr=column_sums, rows_ptr=row_sums, seed_ptr=seed, threshold=threshold,
        tokens=tokens, features=features, rank=rank, blocks_per_chunk=blocks_per_chunk, scale=scale,
        stride_xt=x.stride(0), stride_xf=x.stride(1), stride_vt=v.stride(0), stride_vr=v.stride(1),
        stride_bf=b.stride(0), stride_br=b.stride(1), stride_cc=column_sums.stride(0),
        stride_cf=column_sums.stride(-2), stride_cr=column_sums.stride(-1), stride_rc=row_sums.stride(0),
        stride_rt=row_sums.stride(-2), stride_rr=row_sums.stride(-1), WITH_ROWS=rows is not v,
        **_constants(config, rank_block, x.dtype, mask),
    )  # fmt: skip
    add_up(*((sums, out) for sums, out in ((column_sums, columns), (row_sums, rows)) if sums is not out))
    return columns


def _constants(config: Config, rank_block: int, dtype: torch.dtype, mask: Mask | None) -> dict[str, object]:
    return {
        "BLOCK_T": config.block_tokens,
        "BLOCK_F": config.block_features,
        "BLOCK_R": rank_block,
        "MASKED": mask is not None,
        "PRECISION": precision(dtype),
        "UPCAST": upcasts(dtype),
        "num_warps": config.num_warps,
        **FUSED,
        "num_stages": config.num_stages,
    }


TWO_READS = Config(0, 0, 0, 0, form="two_reads")
"""The row of `dual` that is the default rows of `shrink` and `outer`, one after the other."""

# None of these spills or takes more than the 163 KB that a multiprocessor of sm_80 gives one program
_TABLES: dict[tuple[str, int], dict[int, tuple[Config, ...]]] = {
    # (kernel, bytes of an element): the largest padded rank that these rows serve, and the rows
    # fp32 has at most 32 rows a product: with 64, Triton 3.6 multiplies in TF32 on sm_100 whatever it is asked for
    ("shrink", 2): {
        32: (Config(64, 128, 8, 3), Config(64, 128, 4, 4), Config(64, 64, 8, 4)),
        64: (Config(64, 128, 8, 3), Config(64, 64, 8, 4)),
        128: (Config(64, 64, 8, 4), Config(64, 64, 8, 3)),
        256: (Config(64, 32, 8, 4),),
    },
    ("shrink", 4): {64: (Config(32, 32, 4, 3),), 256: (Config(16, 32, 8, 3),)},
    # One read of dy leaves partial sums. 8192 tokens and 4096 features in 16 bits are 67 MB of dy; blocks of 256
    # features and 16 chunks of tokens write and read 25 MB at rank 16, 50 MB at rank 32, and 101 MB at rank 64, where
    # a second read of dy is less. In fp32 it is at rank 16: 134 MB in blocks of 32 features, as much as dy itself.
    ("dual", 2): {
        32: (Config(64, 256, 8, 2), Config(64, 256, 8, 3), Config(64, 128, 8, 4), TWO_READS),
        64: (TWO_READS, Config(64, 128, 8, 3)),
        256: (TWO_READS,),
    },
    ("dual", 4): {256: (TWO_READS,)},
    ("outer", 2): {
        128: (Config(64, 128, 8, 3), Config(64, 128, 8, 4), Config(64, 128, 4, 3)),
        256: (Config(64, 64, 8, 3), Config(64, 128, 8, 3)),
    },
    ("outer", 4): {64: (Config(32, 32, 4, 3),), 256: (Config(32, 32, 8, 3),)},
    ("expand", 2): {64: (Config(64, 128, 8, 1), Config(32, 256, 8, 1)), 256: (Config(64, 128, 8, 1),)},
    ("expand", 4): {64: (Config(32, 64, 8, 1),), 256: (Config(32, 32, 8, 1),)},
}


# What takes their place on chips that give a block 99 KiB
_SMALL_TABLES: dict[tuple[str, int], dict[int, tuple[Config, ...]]] = {
    ("shrink", 2): _TABLES["shrink", 2] | {64: (Config(64, 64, 8, 4),), 256: (Config(64, 32, 8, 3),)},
    ("dual", 2): _TABLES["dual", 2] | {32: (Config(64, 256, 8, 2), TWO_READS)},  # sm_86 spills (64, 128, 8, 4)
    ("outer", 2): _TABLES["outer", 2] | {256: (Config(64, 64, 8, 3),)},
    ("expand", 2): _TABLES["expand", 2] | {256: (Config(64, 64, 8, 1),)},
}


@cache
def configs(kernel: str, dtype: torch.dtype, rank_block: int, capability: tuple[int, int]) -> tuple[Config, ...]:
    """The compiled forms of "shrink", "dual", "outer" or "expand" for a dtype and a padded rank, the default first."""
    tables = _TABLES if has_large_blocks(capability) else _TABLES | _SMALL_TABLES
    rows = tables[kernel, dtype.itemsize]
    return next(found for largest, found in rows.items() if rank_block <= largest)
