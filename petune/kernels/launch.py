"""What the Triton kernels share: how a rank is padded, how dtypes multiply, the dropout mask in registers.

Only other Triton modules import this one: it loads triton.
"""
# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false
# a @triton.jit function takes tensors and plain integers where Triton's stubs ask for its own types

from functools import cache

import torch
import triton
import triton.language as tl

MAX_RANK = 256  # a padded rank lives in registers: [64, 256] in fp32 is what eight warps hold without spilling

# The interpreter multiplies the bit patterns of bf16 as integers: under it every kernel computes in fp32 instead
INTERPRETED = bool(triton.knobs.runtime.interpret)


# a · b + c in one rounding: from Triton 3.10 on the default is two, and 3.9 warns of that at every compilation
FUSED = {"enable_fp_fusion": True}


def padded_rank(rank: int) -> int:
    """The block that holds a rank: a power of two, 16 at least, which is the shortest axis that tl.dot takes."""
    return max(16, triton.next_power_of_2(rank))


def upcasts(dtype: torch.dtype) -> bool:
    """Whether kernels must cast what they load to fp32 before they compute with it."""
    return INTERPRETED and dtype == torch.bfloat16


def precision(dtype: torch.dtype) -> str:
    """tl.dot's input_precision: fp32 stays fp32 unless torch's own products may use TF32; 16-bit dtypes ignore it."""
    fast = dtype != torch.float32 or torch.backends.cuda.matmul.allow_tf32
    return "tf32" if fast else "ieee"


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability, (major, minor); that of an H100 where the interpreter runs."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def has_large_blocks(capability: tuple[int, int]) -> bool:
    """Whether a block may have 163 KiB of shared memory, as on A100, H100 and B200, or only the 99 of other chips."""
    return capability == (8, 0) or capability[0] in (9, 10)


def blocks_of(size: int, block: int) -> int:
    """Blocks that cover an axis."""
    return -(-size // block)


def split(owned_blocks: int, summed_blocks: int, device: torch.device) -> tuple[int, int]:
    """(programs that share one block of the output, blocks that each of them sums); more than one costs a launch.

    Three quarters of the multiprocessors with one program each keep the memory busy. Below that the sum is split, into
    no more programs than run at once, two a multiprocessor, and no fewer than two blocks each.
    """
    available = multiprocessors(device)
    if 4 * owned_blocks >= 3 * available:
        return 1, summed_blocks
    per_chunk = max(2, blocks_of(summed_blocks, 2 * available // owned_blocks))
    return blocks_of(summed_blocks, per_chunk), per_chunk


@cache
def multiprocessors(device: torch.device) -> int:
    """Of the device; those of an H100 where the interpreter runs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@triton.jit
def keep_tile(seed, threshold, first_token, first_feature, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr):
    """The keep mask of BLOCK_T tokens one after the other, [BLOCK_T, BLOCK_F]; first_feature is a multiple of 8."""
    return keep_tokens(seed, threshold, first_token + tl.arange(0, BLOCK_T), first_feature, BLOCK_T, BLOCK_F)


@triton.jit
def keep_tokens(seed, threshold, tokens, first_feature, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr):
    """The keep mask of `petune.kernels.dropout.philox_lanes` for any tokens, int32 [BLOCK_T], [BLOCK_T, BLOCK_F].

    16 bits an element: 14 instructions each, where a Philox call an element would take 59 and bind the kernel.
    """
    groups = first_feature // 8 + tl.arange(0, BLOCK_F // 8)
    w0, w1, w2, w3 = tl.philox(seed, groups[None, :], tokens[:, None], 0, 0, n_rounds=7)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(BLOCK_T, BLOCK_F // 2)
    lanes = tl.join(words & 0xFFFF, words >> 16).reshape(BLOCK_T, BLOCK_F)
    return lanes.to(tl.int32) >= threshold
