# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# Triton types a kernel's pointers and constants as what they are inside of it, not as what a launch takes
"""`packed_lora` on Triton: both factors are unpacked tile by tile, in registers, on their way into a product.

    s[c] = x[:, chunk c] Â[:, chunk c]ᵀ,  y = scale · (Σ_c s[c]) B̂ᵀ + bias,  and cuBLAS adds x Wᵀ to y (beta = 1)

Code j of row i begins at bit (i · columns + j) · BITS, BITS divides 8, and so a code lies in one byte. A tile is
unpacked again by every block of tokens: 64 tokens, 4096 features and rank 16 are 65,536 codes for 4 million products.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from petune.kernels.autograd import in_shape_of
from petune.kernels.chooser import Config
from petune.kernels.launch import FUSED, blocks_of, padded_rank, precision, split, upcasts
from petune.kernels.lora_linear.kernel import unsupported
from petune.kernels.lora_linear.sums import add_up

__all__ = ["forward", "unsupported"]

FEW_TOKENS = 64  # up to here launches bind, not bytes: a tile of 16 tokens, and partial sums added where they are read

# Triton would compile a kernel more for each of these that is 1 or a multiple of 16, and no load is wider for it
_PLAIN = ["tokens", "blocks_per_chunk", "chunks", "stride_lr"]
_BYTES = ["bits_ptr", "levels_ptr"]  # slices of a blob begin anywhere, and are read one at a time


@triton.jit
def _unpacked(
    bits_ptr, levels_ptr, first_row, first_column, rows, columns, stride_lr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """A tile of a packed matrix [rows, columns], fp32 [BLOCK_ROWS, BLOCK_COLUMNS], zero past the matrix's edges.

    One byte is loaded for all codes that it holds, and its neighbour where the row begins within a byte.
    """
    i = first_row + tl.arange(0, BLOCK_ROWS)[:, None].to(tl.int64)  # [BLOCK_ROWS, 1]
    j = first_column + tl.arange(0, BLOCK_COLUMNS)[None, :]  # [1, BLOCK_COLUMNS]
    k = first_column * BITS // 8 + tl.arange(0, BLOCK_COLUMNS * BITS // 8)[None, :]
    first_bit = i * columns * BITS
    byte_ptrs = bits_ptr + first_bit // 8 + k
    started = (i < rows) & (k * 8 < columns * BITS)
    codes = tl.load(byte_ptrs, mask=started, other=0).to(tl.int32)
    if BITS < 8:
        begun = (first_bit % 8).to(tl.int32)
        size = (rows.to(tl.int64) * columns * BITS + 7) // 8
        more = started & (begun > 0) & (first_bit // 8 + k + 1 < size)
        codes = (codes | (tl.load(byte_ptrs + 1, mask=more, other=0).to(tl.int32) << 8)) >> begun
    # the lower half of the codes of a byte, then the upper one: 8 bits are two of 4, four of 2, eight of 1
    if BITS <= 4:
        codes = tl.join(codes, codes >> 4).reshape(BLOCK_ROWS, BLOCK_COLUMNS * BITS // 4)
    if BITS <= 2:
        codes = tl.join(codes, codes >> 2).reshape(BLOCK_ROWS, BLOCK_COLUMNS * BITS // 2)
    if BITS == 1:
        codes = tl.join(codes, codes >> 1).reshape(BLOCK_ROWS, BLOCK_COLUMNS)
    codes &= 2**BITS - 1
    inside = (i < rows) & (j < columns)
    level_ptrs = levels_ptr + i * stride_lr
    if BITS == 1:
        low = tl.load(level_ptrs, mask=i < rows, other=0.0)
        high = tl.load(level_ptrs + 1, mask=i < rows, other=0.0)
        return tl.where(inside, tl.where(codes == 1, high, low), 0.0)
    return tl.load(level_ptrs + codes, mask=inside, other=0.0)


@triton.jit(do_not_specialize=_PLAIN, do_not_specialize_on_alignment=_BYTES)
def _packed_shrink_kernel(
    x_ptr, bits_ptr, levels_ptr, s_ptr, tokens, features, rank, blocks_per_chunk,
    stride_xt, stride_xf, stride_lr, stride_sc, stride_st,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr, BITS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """s[c] = x[:, chunk c] Â[:, chunk c]ᵀ; a program owns a tile of s[c], neighbours the same tokens."""
    compute: tl.constexpr = tl.float32 if UPCAST else x_ptr.dtype.element_ty
    rank_blocks = tl.cdiv(rank, BLOCK_R)
    first_rank = tl.program_id(0) % rank_blocks * BLOCK_R
    chunk = tl.program_id(1)
    t = tl.program_id(0) // rank_blocks * BLOCK_T + tl.arange(0, BLOCK_T)[:, None].to(tl.int64)  # [BLOCK_T, 1]
    first = chunk * blocks_per_chunk * BLOCK_F
    last = tl.minimum(first + blocks_per_chunk * BLOCK_F, features)
    s = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    for start in range(first, last, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)[None, :].to(tl.int64)
        x_mask = (t < tokens) & (f < features)
        x = tl.load(x_ptr + t * stride_xt + f * stride_xf, mask=x_mask, other=0.0).to(compute)
        # features last, as they lie: 32 lanes read 4 bytes of one row, not one byte each of 32 rows
        a = _unpacked(bits_ptr, levels_ptr, first_rank, start, rank, features, stride_lr, BLOCK_R, BLOCK_F, BITS)
        s = tl.dot(x, tl.trans(a.to(compute)), s, input_precision=PRECISION)  # [BLOCK_T, BLOCK_F] [BLOCK_F, BLOCK_R]
    r = first_rank + tl.arange(0, BLOCK_R)[None, :]  # [1, BLOCK_R]
    s_ptrs = s_ptr + chunk.to(tl.int64) * stride_sc + t * stride_st + r
    tl.store(s_ptrs, s.to(s_ptr.dtype.element_ty), mask=(t < tokens) & (r < rank))


@triton.jit(do_not_specialize=_PLAIN, do_not_specialize_on_alignment=_BYTES)
def _packed_expand_kernel(
    s_ptr, bits_ptr, levels_ptr, bias_ptr, y_ptr, tokens, features, rank, chunks, scale,
    stride_sc, stride_st, stride_lr, stride_bias, stride_yt,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr, BITS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """y = scale · (Σ_c s[c]) B̂ᵀ + bias; a program owns one tile of y, neighbours one row of tiles."""
    compute: tl.constexpr = tl.float32 if UPCAST else y_ptr.dtype.element_ty
    blocks = tl.cdiv(features, BLOCK_F)
    first_feature = tl.program_id(0) % blocks * BLOCK_F
    t = tl.program_id(0) // blocks * BLOCK_T + tl.arange(0, BLOCK_T)[:, None].to(tl.int64)  # [BLOCK_T, 1]
    f = first_feature + tl.arange(0, BLOCK_F)[None, :].to(tl.int64)  # [1, BLOCK_F]
    y = tl.zeros((BLOCK_T, BLOCK_F), dtype=tl.float32)
    for start in range(0, rank, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)[None, :]  # [1, BLOCK_R]
        s = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
        s_ptrs = s_ptr + t * stride_st + r
        for _ in range(chunks):
            s += tl.load(s_ptrs, mask=(t < tokens) & (r < rank), other=0.0).to(tl.float32)
            s_ptrs += stride_sc
        b = _unpacked(bits_ptr, levels_ptr, first_feature, start, features, rank, stride_lr, BLOCK_F, BLOCK_R, BITS)
        y = tl.dot(s.to(compute), tl.trans(b.to(compute)), y, input_precision=PRECISION)
    y *= scale
    if bias_ptr is not None:
        y += tl.load(bias_ptr + f * stride_bias, mask=f < features, other=0.0).to(tl.float32)
    tl.store(y_ptr + t * stride_yt + f, y.to(y_ptr.dtype.element_ty), mask=(t < tokens) & (f < features))


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, a_bits: Tensor, a_levels: Tensor, b_bits: Tensor, b_levels: Tensor,
    rank: int, bits: int, scale: float, dtype: torch.dtype,
) -> tuple[Tensor]:  # fmt: skip
    """y = x Wᵀ + bias + scale · (x Âᵀ) B̂ᵀ in `dtype`."""
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    s = shrink(rows, a_bits, a_levels, rank, bits)
    y = expand(s, b_bits, b_levels, weight.shape[0], bits, scale=scale, bias=bias, dtype=dtype)
    return (in_shape_of(x, y.addmm_(rows, weight.to(dtype).T)),)


def shrink(
    x: Tensor, a_bits: Tensor, a_levels: Tensor, rank: int, bits: int, *, config: Config | None = None
) -> Tensor:
    """Partial sums of s = x Âᵀ in one read of x.

    Args:
        x: [tokens, features]; fp32, fp16 or bf16, any strides.
        a_bits: codes of Â [rank, features], uint8, flat.
        a_levels: float32, [1 or rank, 2**bits].
        rank: 1..256.
        bits: of a code.
        config: one of `configs`; by default the one for this number of tokens.

    Returns:
        [chunks, tokens, rank], whose sum over the chunks is s; in the dtype of x if there is one chunk, else in fp32.
        More than FEW_TOKENS tokens have one.
    """
    tokens, features = x.shape
    if not x.numel():
        return x.new_zeros(1, tokens, rank)
    config = config or _config("shrink", x)
    tiles = blocks_of(tokens, config.block_tokens) * blocks_of(rank, _rank_block(rank))
    chunks, blocks_per_chunk = split(tiles, blocks_of(features, config.block_features), x.device)
    s = x.new_empty(chunks, tokens, rank, dtype=x.dtype if chunks == 1 else torch.float32)
    _packed_shrink_kernel[tiles, chunks](
        x_ptr=x, bits_ptr=a_bits.contiguous(), levels_ptr=a_levels.contiguous(), s_ptr=s, tokens=tokens,
        features=features, rank=rank, blocks_per_chunk=blocks_per_chunk, stride_xt=x.stride(0), stride_xf=x.stride(1),
        stride_lr=_row_stride(a_levels), stride_sc=s.stride(0), stride_st=s.stride(1),
        **_constants(config, rank, bits, x.dtype),
    )  # fmt: skip
    if chunks == 1 or tokens <= FEW_TOKENS:
        return s
    total = x.new_empty(1, tokens, rank)
    add_up((s, total[0]))
    return total


def expand(
    s: Tensor, b_bits: Tensor, b_levels: Tensor, features: int, bits: int, *,
    scale: float, bias: Tensor | None, dtype: torch.dtype, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """y = scale · (Σ_c s[c]) B̂ᵀ + bias in one write of y.

    Args:
        s: [chunks, tokens, rank], contiguous; any floating dtype.
        b_bits: codes of B̂ [features, rank], uint8, flat.
        b_levels: float32, [1 or features, 2**bits].
        features: of y.
        bits: of a code.
        scale: a factor of the fp32 product.
        bias: [features], any floating dtype.
        dtype: of y and of the product; fp32, fp16 or bf16.
        config: one of `configs`; by default the one for this number of tokens.

    Returns:
        y, [tokens, features].
    """
    chunks, tokens, rank = s.shape
    y = s.new_empty(tokens, features, dtype=dtype)
    if not y.numel():
        return y
    config = config or _config("expand", y)
    _packed_expand_kernel[blocks_of(tokens, config.block_tokens) * blocks_of(features, config.block_features),](
        s_ptr=s, bits_ptr=b_bits.contiguous(), levels_ptr=b_levels.contiguous(), bias_ptr=bias, y_ptr=y, tokens=tokens,
        features=features, rank=rank, chunks=chunks, scale=scale, stride_sc=s.stride(0), stride_st=s.stride(1),
        stride_lr=_row_stride(b_levels), stride_bias=0 if bias is None else bias.stride(0), stride_yt=y.stride(0),
        **_constants(config, rank, bits, dtype),
    )  # fmt: skip
    return y


def _row_stride(levels: Tensor) -> int:
    return levels.shape[1] if len(levels) > 1 else 0


def _constants(config: Config, rank: int, bits: int, dtype: torch.dtype) -> dict[str, object]:
    return {
        "BLOCK_T": config.block_tokens,
        "BLOCK_F": config.block_features,
        "BLOCK_R": _rank_block(rank),
        "BITS": bits,
        "PRECISION": precision(dtype),
        "UPCAST": upcasts(dtype),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **FUSED,
    }


def _rank_block(rank: int) -> int:
    """Ranks that are unpacked at once: 64 of 8 bits each would spill registers."""
    return min(padded_rank(rank), 32)


def _config(kernel: str, rows: Tensor) -> Config:
    few, many = configs(kernel, rows.dtype)
    return few if len(rows) <= FEW_TOKENS else many


# (kernel, bytes of an element): the config for few tokens and the one for many; none spills at 1, 2, 4 or 8 bits.
# fp32 has at most 32 rows a product: with 64, Triton 3.6 multiplies in TF32 on sm_100 whatever it is asked for
_TABLES: dict[tuple[str, int], tuple[Config, Config]] = {
    ("shrink", 2): (Config(16, 128, 8, 3), Config(64, 64, 8, 3)),
    ("shrink", 4): (Config(16, 32, 4, 3), Config(32, 32, 8, 3)),
    ("expand", 2): (Config(16, 64, 8, 1), Config(64, 64, 4, 1)),
    ("expand", 4): (Config(16, 64, 8, 1), Config(16, 64, 8, 1)),
}


def configs(kernel: str, dtype: torch.dtype) -> tuple[Config, Config]:
    """The compiled forms of "shrink" or "expand" for a dtype: for few tokens, and for many."""
    return _TABLES[kernel, dtype.itemsize]
