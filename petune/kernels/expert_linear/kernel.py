# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# Triton types a kernel's pointers and constants as what they are inside of it, not as what a launch takes
"""`expert_linear` on Triton: one product of sorted pairs serves both layers, and a sum over the pairs of each token.

    in:   h[p] = x[tokens[p]] weight[e]ᵀ + bias[e]                  for the pairs p of expert e
    out:  q[p] = h[p] weight[e],  y[t] = bias + Σ_j q[places[t, j]]

A tile holds pairs of one expert, which it finds by itself: the host never learns how many pairs an expert has.

Out by a buffer q, in the dtype of the products, because what it saves are products. At k / experts = 1/4 a pair costs
2 · size · out_features operations, and moves 4 · out_features bytes of q in 16 bits. An H100 (3 TB/s, 700 TFLOP/s in
dense products) so takes, for 4096 tokens and 64 experts,

    d = 768, F = 3072, size 48:      q is 101 MB, 67 us of traffic;  the dense product takes 28 us
    d = 4096, F = 11008, size 172:   q is 537 MB, 358 us;            the dense product takes 528 us

and up to 1024 tokens of the first, or 192 of the second, q stays in 25 MB of its L2. To add in registers instead, a
program would own a tile of tokens and meet every expert there: at 1/4 no expert is unused by 64 tokens, so it would
multiply as much as the dense layer. To add in place needs atomics, whose order is not fixed.
"""

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from petune.kernels.chooser import Config
from petune.kernels.launch import FUSED, blocks_of, precision, upcasts
from petune.kernels.lora_linear.kernel import unsupported as unsupported_rank

MAX_EXPERTS = 1024  # every program reads all offsets at once

# Triton would compile a kernel more for each of these that is 1 or a multiple of 16, and no load is wider for it
_PLAIN = ["experts", "tokens", "k"]


@triton.jit(do_not_specialize=_PLAIN)
def _expert_product_kernel(
    x_ptr, weight_ptr, bias_ptr, tokens_ptr, offsets_ptr, out_ptr, experts, features, inner,
    stride_xt, stride_xk, stride_we, stride_wf, stride_wk, stride_be, stride_bf,
    BLOCK_P: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    ALIGNED_F: tl.constexpr, ALIGNED_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out[p] = x[tokens[p]] weight[e]ᵀ + bias[e]; no tokens_ptr: x[p].

    A program owns a tile [BLOCK_P, BLOCK_F] of out, neighbours one row of tiles; the last may find no pairs left.
    """
    compute: tl.constexpr = tl.float32 if UPCAST else x_ptr.dtype.element_ty
    # Triton tells multiples of 16 from all other sizes: 11008 / 64 = 172 would be read 2 bytes at a time, and not 8
    features = features // ALIGNED_F * ALIGNED_F
    inner, stride_xt = inner // ALIGNED_K * ALIGNED_K, stride_xt // ALIGNED_K * ALIGNED_K
    blocks = tl.cdiv(features, BLOCK_F)
    tile = tl.program_id(0) // blocks
    e = tl.arange(0, BLOCK_E)
    starts = tl.load(offsets_ptr + e, mask=e < experts, other=0)
    stops = tl.load(offsets_ptr + e + 1, mask=e < experts, other=0)
    tiles = (stops - starts + BLOCK_P - 1) // BLOCK_P
    expert = tl.sum((tl.cumsum(tiles, axis=0) <= tile).to(tl.int32), axis=0)  # experts all of whose tiles come before
    if expert >= experts:
        return
    first = tl.load(offsets_ptr + expert) + (tile - tl.sum(tl.where(e < expert, tiles, 0), axis=0)) * BLOCK_P
    stop = tl.load(offsets_ptr + expert + 1)
    p = first + tl.arange(0, BLOCK_P)[:, None].to(tl.int64)  # [BLOCK_P, 1]
    f = tl.program_id(0) % blocks * BLOCK_F + tl.arange(0, BLOCK_F)[None, :].to(tl.int64)  # [1, BLOCK_F]
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    t = p if tokens_ptr is None else tl.load(tokens_ptr + p, mask=p < stop, other=0)
    x_ptrs = x_ptr + t * stride_xt + k[None, :] * stride_xk
    weight_ptrs = weight_ptr + expert.to(tl.int64) * stride_we + f * stride_wf + k[:, None] * stride_wk
    total = tl.zeros((BLOCK_P, BLOCK_F), dtype=tl.float32)
    for start in range(0, inner, BLOCK_K):
        left = inner - start
        x = tl.load(x_ptrs, mask=(p < stop) & (k[None, :] < left), other=0.0).to(compute)  # [BLOCK_P, BLOCK_K]
        weight = tl.load(weight_ptrs, mask=(f < features) & (k[:, None] < left), other=0.0).to(compute)
        total = tl.dot(x, weight, total, input_precision=PRECISION)
        x_ptrs += BLOCK_K * stride_xk
        weight_ptrs += BLOCK_K * stride_wk
    if bias_ptr is not None:
        bias_ptrs = bias_ptr + expert.to(tl.int64) * stride_be + f * stride_bf
        total += tl.load(bias_ptrs, mask=f < features, other=0.0).to(tl.float32)
    tl.store(out_ptr + p * features + f, total.to(out_ptr.dtype.element_ty), mask=(p < stop) & (f < features))


@triton.jit(do_not_specialize=_PLAIN)
def _expert_sum_kernel(
    q_ptr, places_ptr, bias_ptr, y_ptr, tokens, features, k, stride_qp, stride_bf, stride_yt,
    BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """y[t] = bias + Σ_j q[places[t, j]]; a program owns a tile of y."""
    blocks = tl.cdiv(features, BLOCK_F)
    t = tl.program_id(0) // blocks * BLOCK_T + tl.arange(0, BLOCK_T)[:, None].to(tl.int64)  # [BLOCK_T, 1]
    f = tl.program_id(0) % blocks * BLOCK_F + tl.arange(0, BLOCK_F)[None, :].to(tl.int64)  # [1, BLOCK_F]
    j = tl.arange(0, BLOCK_J)[:, None, None]
    inside = (t < tokens) & (f < features)
    y = tl.zeros((BLOCK_T, BLOCK_F), dtype=tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + f * stride_bf, mask=f < features, other=0.0).to(tl.float32)
    for first in range(0, k, BLOCK_J):  # BLOCK_J at once: their loads wait for the memory together
        own = (first + j < k) & (t < tokens)[None, :, :]
        p = tl.load(places_ptr + (t * k)[None, :, :] + first + j, mask=own, other=0)  # [BLOCK_J, BLOCK_T, 1]
        q = tl.load(q_ptr + p * stride_qp + f[None, :, :], mask=own & inside[None, :, :], other=0.0)
        y += tl.sum(q.to(tl.float32), axis=0)
    tl.store(y_ptr + t * stride_yt + f, y.to(y_ptr.dtype.element_ty), mask=inside)


def unsupported(dtype: torch.dtype, experts: int) -> str | None:
    """Why these kernels cannot take products of this dtype with so many experts, or None."""
    return f"{experts} experts are above {MAX_EXPERTS}" if experts > MAX_EXPERTS else unsupported_rank(dtype, 1)


def expert_in(
    x: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, offsets: Tensor, dtype: torch.dtype
) -> tuple[Tensor]:
    """h[p] = x[token of p] weight[expert of p]ᵀ + bias[expert of p] in `dtype`."""
    return (product(x.to(dtype), weight.to(dtype), offsets, pairs=len(tokens), tokens=tokens, bias=bias),)


def expert_out(
    h: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, offsets: Tensor, places: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor]:  # fmt: skip
    """y[t] = bias + Σ_{p of t} h[p] weight[expert of p] in `dtype`: of products rounded to it, summed in fp32."""
    return (add_up(product(h.to(dtype), weight.to(dtype).mT, offsets, pairs=len(tokens)), places, bias),)


def product(
    x: Tensor, weight: Tensor, offsets: Tensor, *,
    pairs: int, tokens: Tensor | None = None, bias: Tensor | None = None, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """out[p] = x[tokens[p]] weight[e]ᵀ + bias[e] for the pairs p of each expert e

    Args:
        x: [rows, inner], any strides; fp32, fp16 or bf16.
        weight: [experts, features, inner], any strides; dtype of x.
        offsets: where the pairs of each expert begin, int64, [experts + 1].
        pairs: of all experts.
        tokens: the row of x of each pair, int64, [pairs]; None for row p.
        bias: [experts, features], any strides and floating dtype, or None.
        config: one of `configs`; by default the one for this number of pairs.

    Returns:
        out, [pairs, features], dtype of x.
    """
    experts, features, inner = weight.shape
    out = x.new_empty(pairs, features)
    if not out.numel():
        return out
    config = config or _config(x, pairs, experts)
    block_features = min(config.block_features, _block(features))
    # every expert that has pairs may leave one tile that is not full
    tiles = min(experts, pairs) + pairs // config.block_tokens
    _expert_product_kernel[tiles * blocks_of(features, block_features),](
        x_ptr=x, weight_ptr=weight, bias_ptr=bias, tokens_ptr=None if tokens is None else tokens.contiguous(),
        offsets_ptr=offsets.contiguous(), out_ptr=out, experts=experts, features=features, inner=inner,
        stride_xt=x.stride(0), stride_xk=x.stride(1), stride_we=weight.stride(0), stride_wf=weight.stride(1),
        stride_wk=weight.stride(2), stride_be=0 if bias is None else bias.stride(0),
        stride_bf=0 if bias is None else bias.stride(1),
        BLOCK_P=config.block_tokens, BLOCK_F=block_features, BLOCK_K=min(config.block_inner, _block(inner)),
        BLOCK_E=triton.next_power_of_2(experts), ALIGNED_F=gcd(16, features),
        ALIGNED_K=gcd(16, inner, x.stride(0)), PRECISION=precision(x.dtype), UPCAST=upcasts(x.dtype),
        num_warps=config.num_warps, num_stages=config.num_stages, **FUSED,
    )  # fmt: skip
    return out


def add_up(q: Tensor, places: Tensor, bias: Tensor | None) -> Tensor:
    """y[t] = bias + Σ_j q[places[t, j]] in fp32, rounded once to the dtype of q

    Args:
        q: [pairs, features], contiguous; fp32, fp16 or bf16.
        places: int64, [tokens, k].
        bias: [features], any stride and floating dtype, or None.

    Returns:
        y, [tokens, features], dtype of q.
    """
    (tokens, k), features = places.shape, q.shape[1]
    y = q.new_empty(tokens, features)
    if not y.numel():
        return y
    block = min(256, _block(features))
    block_tokens = 1024 // block  # 16 elements a thread with four pairs at once
    _expert_sum_kernel[blocks_of(tokens, block_tokens) * blocks_of(features, block),](
        q_ptr=q, places_ptr=places.contiguous(), bias_ptr=bias, y_ptr=y, tokens=tokens, features=features, k=k,
        stride_qp=q.stride(0), stride_bf=0 if bias is None else bias.stride(0), stride_yt=y.stride(0),
        BLOCK_T=block_tokens, BLOCK_J=4, BLOCK_F=block, num_warps=8, **FUSED,
    )  # fmt: skip
    return y


def _block(size: int) -> int:
    """The block that holds an axis: a power of two, 16 at least, which is the shortest that tl.dot takes."""
    return max(16, triton.next_power_of_2(size))


def _config(x: Tensor, pairs: int, experts: int) -> Config:
    """The smallest tile that holds the pairs of a mean expert, else the largest."""
    of_dtype = configs(x.dtype)
    return next((config for config in of_dtype if config.block_tokens * experts >= pairs), of_dtype[-1])


def configs(dtype: torch.dtype) -> tuple[Config, ...]:
    """The compiled forms of the product for a dtype, from few pairs an expert to many."""
    return _FP32 if dtype == torch.float32 else _16_BITS


_16_BITS = (
    Config(16, 32, num_warps=4, num_stages=4, block_inner=128),
    Config(64, 128, num_warps=4, num_stages=3, block_inner=64),
    Config(128, 128, num_warps=8, num_stages=3, block_inner=64),  # 128 x 256 spills, with Triton 3.6 on sm_90 as well
)
# fp32 has at most 32 rows a product: with 64, Triton 3.6 multiplies in TF32 on sm_100 whatever it is asked for
_FP32 = (
    Config(16, 32, num_warps=4, num_stages=3, block_inner=32),
    Config(32, 64, num_warps=8, num_stages=3, block_inner=32),
)
