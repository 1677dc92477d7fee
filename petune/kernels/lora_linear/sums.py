# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# Triton types a kernel's pointers and constants as what they are inside of it, not as what a launch takes
"""Partial sums added up in a fixed order, by no atomics: the same inputs give the same bits."""

import triton
import triton.language as tl
from torch import Tensor

from petune.kernels.launch import FUSED, padded_rank

# Triton would compile a kernel more for each of these that is 1 or a multiple of 16, and no load is wider for it
_PLAIN = ["chunks", "second_chunks"]


@triton.jit
def _sum_tile(
    block, partial_ptr, out_ptr, chunks, count, rank, stride_pc, stride_on, stride_or,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out[n, r] = Σ_c partial[c, n, r]; every partial[c] is contiguous."""
    c = tl.arange(0, BLOCK_C)[:, None, None].to(tl.int64)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)[:, None].to(tl.int64)  # [BLOCK_N, 1]
    r = tl.arange(0, BLOCK_R)[None, :]  # [1, BLOCK_R]
    inside = (n < count) & (r < rank)
    total = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    for first in range(0, chunks, BLOCK_C):  # BLOCK_C at once: their loads wait for the memory together
        partial_ptrs = partial_ptr + (first + c) * stride_pc + (n * rank + r)[None, :, :]
        total += tl.sum(tl.load(partial_ptrs, mask=(first + c < chunks) & inside[None, :, :], other=0.0), axis=0)
    tl.store(out_ptr + n * stride_on + r * stride_or, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_PLAIN)
def _sum_kernel(
    partial_ptr, out_ptr, chunks, count, stride_pc, stride_on, stride_or, second_partial_ptr, second_out_ptr,
    second_chunks, second_count, second_stride_pc, second_stride_on, second_stride_or, rank,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    """The sum of one stack of partial sums, or of the two that `dual` leaves: one launch for both."""
    block, blocks = tl.program_id(0), tl.cdiv(count, BLOCK_N)
    if block < blocks:
        _sum_tile(
            block, partial_ptr, out_ptr, chunks, count, rank, stride_pc, stride_on, stride_or,
            BLOCK_C, BLOCK_N, BLOCK_R,
        )  # fmt: skip
    elif PAIR:
        _sum_tile(
            block - blocks, second_partial_ptr, second_out_ptr, second_chunks, second_count, rank, second_stride_pc,
            second_stride_on, second_stride_or, BLOCK_C, BLOCK_N, BLOCK_R,
        )  # fmt: skip


def add_up(*jobs: tuple[Tensor, Tensor]) -> None:
    """out[n, r] = Σ_c partial[c, n, r] for none, one or two (partial, out) of one rank."""
    if not jobs:
        return
    (partial, out), (second_partial, second_out) = jobs[0], jobs[-1]
    rank_block = padded_rank(out.shape[1])
    block = 1024 // rank_block  # four elements a thread, which four chunks at once fill to 52 registers at most
    _sum_kernel[sum(triton.cdiv(out.shape[0], block) for _, out in jobs),](
        partial_ptr=partial, out_ptr=out, chunks=partial.shape[0], count=out.shape[0], stride_pc=partial.stride(0),
        stride_on=out.stride(0), stride_or=out.stride(1), second_partial_ptr=second_partial,
        second_out_ptr=second_out, second_chunks=second_partial.shape[0], second_count=second_out.shape[0],
        second_stride_pc=second_partial.stride(0), second_stride_on=second_out.stride(0),
        second_stride_or=second_out.stride(1), rank=out.shape[1],
        BLOCK_C=4, BLOCK_N=block, BLOCK_R=rank_block, PAIR=len(jobs) == 2, num_warps=8, **FUSED,
    )  # fmt: skip
