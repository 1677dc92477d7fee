# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# Triton's own types cover neither the kernels' pointers nor their launches
"""The fused GEMM: the frozen product and the low-rank term in one fp32 accumulator, written once.

    out[tokens, features] = x[tokens, inner] weightᵀ + m ⊙ (scale · s[tokens, rank] b[features, rank]ᵀ) + bias

Forward is gemm(x, W, s, B); backward is dx = gemm(dy, Wᵀ, ds, Aᵀ) with the mask of x. The low-rank term comes first:
then the mask and the scale act on the accumulator itself, and the loop over `inner` adds on top of it.

Two forms: pointers, for any strides; and TMA descriptors on a persistent grid, for sm_90 and later.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from petune.kernels.chooser import Config
from petune.kernels.dropout import Mask
from petune.kernels.launch import FUSED, INTERPRETED, keep_tile, precision, upcasts

GROUP_T = 8  # token blocks that share a block of weight rows in L2 before the next one is read
FEW_TOKENS = 64  # up to here the bytes of the weight bind, and a tile of 16 rows wastes the least

# ---------------------------------------------------------------------------------------------------- the kernels
# Token counts change from batch to batch, and one build serves them all; a multiple of 16 would buy nothing
_PLAIN = ["threshold", "tokens"]


@triton.jit
def _tile(index, tokens, features, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, GROUP_T: tl.constexpr):
    """First token and first feature of a tile; neighbours go down GROUP_T blocks of tokens, then along features."""
    per_group = GROUP_T * tl.cdiv(features, BLOCK_F)
    first = index // per_group * GROUP_T
    height = tl.minimum(tl.cdiv(tokens, BLOCK_T) - first, GROUP_T)
    within = index % per_group
    return (first + within % height) * BLOCK_T, within // height * BLOCK_F


@triton.jit
def _low_rank_term(
    s_ptr, b_ptr, seed_ptr, first_token, first_feature, threshold, tokens, features, rank, scale,
    stride_st, stride_sr, stride_bf, stride_br,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """m ⊙ (scale · s bᵀ), fp32 [BLOCK_T, BLOCK_F]; no seed_ptr is no mask."""
    t = first_token + tl.arange(0, BLOCK_T)[:, None].to(tl.int64)  # [BLOCK_T, 1]
    f = first_feature + tl.arange(0, BLOCK_F)[None, :].to(tl.int64)  # [1, BLOCK_F]
    term = tl.zeros((BLOCK_T, BLOCK_F), dtype=tl.float32)
    # one stage: a pipeline of its own would add its shared memory to that of the loop over inner
    for start in tl.range(0, rank, BLOCK_R, num_stages=1):
        r = start + tl.arange(0, BLOCK_R)
        s_mask = (t < tokens) & (r[None, :] < rank)
        s = tl.load(s_ptr + t * stride_st + r[None, :] * stride_sr, mask=s_mask, other=0.0).to(COMPUTE)
        b_mask = (f < features) & (r[:, None] < rank)
        b = tl.load(b_ptr + f * stride_bf + r[:, None] * stride_br, mask=b_mask, other=0.0).to(COMPUTE)
        term = tl.dot(s, b, term, input_precision=PRECISION)
    term *= scale
    if seed_ptr is not None:
        # the mask in two halves: as one [128, 256] tile it takes 255 registers and spills, so it takes 222
        seed = tl.load(seed_ptr)
        left = keep_tile(seed, threshold, first_token, first_feature, BLOCK_T, BLOCK_F // 2)
        right = keep_tile(seed, threshold, first_token, first_feature + BLOCK_F // 2, BLOCK_T, BLOCK_F // 2)
        keep = tl.join(left, right).permute(0, 2, 1).reshape(BLOCK_T, BLOCK_F)
        term = tl.where(keep, term, 0.0)
    return term


@triton.jit
def _bias_row(bias_ptr, first_feature, features, stride_bias, BLOCK_F: tl.constexpr):
    f = first_feature + tl.arange(0, BLOCK_F)[None, :].to(tl.int64)
    return tl.load(bias_ptr + f * stride_bias, mask=f < features, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=_PLAIN)
def _gemm_kernel(
    x_ptr, weight_ptr, s_ptr, b_ptr, bias_ptr, out_ptr, seed_ptr, threshold,
    tokens, features, inner, rank, scale,
    stride_xt, stride_xk, stride_wf, stride_wk, stride_ot, stride_of,
    stride_st, stride_sr, stride_bf, stride_br, stride_bias,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_T: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out = x weightᵀ + m ⊙ (scale · s bᵀ) + bias by pointers; a program owns one tile of out, [tokens, features]."""
    compute: tl.constexpr = tl.float32 if UPCAST else x_ptr.dtype.element_ty
    first_token, first_feature = _tile(tl.program_id(0), tokens, features, BLOCK_T, BLOCK_F, GROUP_T)
    total = _low_rank_term(
        s_ptr, b_ptr, seed_ptr, first_token, first_feature, threshold, tokens, features, rank, scale,
        stride_st, stride_sr, stride_bf, stride_br, BLOCK_T, BLOCK_F, BLOCK_R, compute, PRECISION,
    )  # fmt: skip
    t = first_token + tl.arange(0, BLOCK_T)[:, None].to(tl.int64)  # [BLOCK_T, 1]
    f = first_feature + tl.arange(0, BLOCK_F)[None, :].to(tl.int64)  # [1, BLOCK_F]
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + t * stride_xt + k[None, :].to(tl.int64) * stride_xk
    weight_ptrs = weight_ptr + f * stride_wf + k[:, None].to(tl.int64) * stride_wk
    x_mask = t < tokens
    weight_mask = f < features
    for start in range(0, inner, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs, mask=x_mask, other=0.0).to(compute)  # [BLOCK_T, BLOCK_K]
            weight = tl.load(weight_ptrs, mask=weight_mask, other=0.0).to(compute)  # [BLOCK_K, BLOCK_F]
        else:
            left = inner - start
            x = tl.load(x_ptrs, mask=x_mask & (k[None, :] < left), other=0.0).to(compute)
            weight = tl.load(weight_ptrs, mask=weight_mask & (k[:, None] < left), other=0.0).to(compute)
        total = tl.dot(x, weight, total, input_precision=PRECISION)
        x_ptrs += BLOCK_K * stride_xk
        weight_ptrs += BLOCK_K * stride_wk
    if bias_ptr is not None:
        total += _bias_row(bias_ptr, first_feature, features, stride_bias, BLOCK_F)
    out_ptrs = out_ptr + t * stride_ot + f * stride_of
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=(t < tokens) & (f < features))


@triton.jit(do_not_specialize=_PLAIN)
def _gemm_tma_kernel(
    x_desc, weight_desc, s_ptr, b_ptr, bias_ptr, out_desc, seed_ptr, threshold,
    tokens, features, inner, rank, scale,
    stride_st, stride_sr, stride_bf, stride_br, stride_bias,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_T: tl.constexpr, INNER_FIRST: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The same by descriptors, which mask the edges; a program owns every num_programs-th tile of out.

    INNER_FIRST: weight_desc is of weightᵀ, [inner, features], which is what lies in memory under a transposed view.
    """
    compute: tl.constexpr = tl.float32 if UPCAST else x_desc.dtype
    tiles = tl.cdiv(tokens, BLOCK_T) * tl.cdiv(features, BLOCK_F)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        first_token, first_feature = _tile(tile, tokens, features, BLOCK_T, BLOCK_F, GROUP_T)
        total = _low_rank_term(
            s_ptr, b_ptr, seed_ptr, first_token, first_feature, threshold, tokens, features, rank, scale,
            stride_st, stride_sr, stride_bf, stride_br, BLOCK_T, BLOCK_F, BLOCK_R, compute, PRECISION,
        )  # fmt: skip
        for start in range(0, inner, BLOCK_K):
            x = x_desc.load([first_token, start]).to(compute)  # [BLOCK_T, BLOCK_K]
            if INNER_FIRST:
                weight = weight_desc.load([start, first_feature]).to(compute)  # [BLOCK_K, BLOCK_F]
            else:
                weight = weight_desc.load([first_feature, start]).to(compute).T
            total = tl.dot(x, weight, total, input_precision=PRECISION)
        if bias_ptr is not None:
            total += _bias_row(bias_ptr, first_feature, features, stride_bias, BLOCK_F)
        # stored in two halves: a whole [128, 256] tile in shared memory would cost the loop its fourth stage
        left, right = tl.split(total.reshape(BLOCK_T, 2, BLOCK_F // 2).permute(0, 2, 1))
        out_desc.store([first_token, first_feature], left.to(out_desc.dtype))
        out_desc.store([first_token, first_feature + BLOCK_F // 2], right.to(out_desc.dtype))


# ---------------------------------------------------------------------------------------------- the host functions


def gemm(
    x: Tensor, weight: Tensor, s: Tensor, b: Tensor, *,
    scale: float = 1.0, bias: Tensor | None = None, mask: Mask | None = None, out: Tensor | None = None,
    config: Config,
) -> Tensor:  # fmt: skip
    """x weightᵀ + m ⊙ (scale · s bᵀ) + bias, rounded once: the low-rank term joins the fp32 sum of the base product.

    Args:
        x: [tokens, inner], any strides; fp32, fp16 or bf16.
        weight: [features, inner], any strides; dtype of x.
        s: [tokens, rank], any strides; dtype of x.
        b: [features, rank], any strides; any floating dtype, cast to that of x in registers.
        scale: factor of the low-rank term, dimensionless.
        bias: [features], any stride, or None.
        mask: m over [tokens, features], 0 where the low-rank term is dropped; None drops nothing.
        out: [tokens, features] to write into, in rows that TMA can take where config.form is tma; None allocates it.
        config: one of `configs` that is `eligible`.

    Returns:
        out, dtype of x.
    """
    if out is None:
        out = x.new_empty(x.shape[0], weight.shape[0])
    if out.numel() == 0:
        return out
    launch = _launch_tma if config.form == "tma" else _launch_pointer
    launch(
        x, weight, out, config,
        s_ptr=s, b_ptr=b, bias_ptr=bias,
        seed_ptr=None if mask is None else mask.seed, threshold=0 if mask is None else mask.threshold,
        tokens=x.shape[0], features=weight.shape[0], inner=x.shape[1], rank=s.shape[1], scale=scale,
        stride_st=s.stride(0), stride_sr=s.stride(1), stride_bf=b.stride(0), stride_br=b.stride(1),
        stride_bias=0 if bias is None else bias.stride(0),
        BLOCK_T=config.block_tokens, BLOCK_F=config.block_features, BLOCK_K=config.block_inner,
        BLOCK_R=_block_rank(s.shape[1]), GROUP_T=GROUP_T,
        PRECISION=precision(x.dtype), UPCAST=upcasts(x.dtype),
        num_warps=config.num_warps, num_stages=config.num_stages, **FUSED,
    )  # fmt: skip
    return out


def _launch_pointer(x: Tensor, weight: Tensor, out: Tensor, config: Config, **arguments: Any) -> None:
    _gemm_kernel[(_tiles(out, config),)](
        x_ptr=x, weight_ptr=weight, out_ptr=out,
        stride_xt=x.stride(0), stride_xk=x.stride(1), stride_wf=weight.stride(0), stride_wk=weight.stride(1),
        stride_ot=out.stride(0), stride_of=out.stride(1),
        EVEN_K=x.shape[1] % config.block_inner == 0, **arguments,
    )  # fmt: skip


def _launch_tma(x: Tensor, weight: Tensor, out: Tensor, config: Config, **arguments: Any) -> None:
    block_t, block_f, block_k = config.block_tokens, config.block_features, config.block_inner
    inner_first = weight.stride(1) != 1
    rows, block = (weight.T, [block_k, block_f]) if inner_first else (weight, [block_f, block_k])
    _gemm_tma_kernel[(min(_tiles(out, config), _multiprocessors(x.device)),)](
        x_desc=TensorDescriptor(x, x.shape, x.stride(), [block_t, block_k]),
        weight_desc=TensorDescriptor(rows, rows.shape, rows.stride(), block),
        out_desc=TensorDescriptor(out, out.shape, out.stride(), [block_t, block_f // 2]),
        INNER_FIRST=inner_first, **arguments,
    )  # fmt: skip


def _tiles(out: Tensor, config: Config) -> int:
    return triton.cdiv(out.shape[0], config.block_tokens) * triton.cdiv(out.shape[1], config.block_features)


def _block_rank(rank: int) -> int:
    """Ranks in one step of the low-rank product: above 32, a tile of an fp32 b spills registers.

    A rank that is no multiple of 16 is loaded element by element, which takes more of them.
    """
    return 32 if rank % 32 == 0 else 16


def configs(dtype: torch.dtype, rank_block: int, capability: tuple[int, int]) -> tuple[Config, ...]:
    """The variants to choose among.

    None for fp32: without TF32 a GEMM is bound by its multiply-adds, where cuBLAS leaves nothing to win. The same ones
    for every rank_block: the low-rank product is a loop, and its step does not grow with the rank.
    """
    if dtype not in (torch.float16, torch.bfloat16) or capability < (8, 0):
        return ()
    if capability[0] in (9, 10):
        return _HOPPER
    return _AMPERE if capability == (8, 0) else _SMALL


# A tile of 128 x 256 with 4 warps spills 333 registers, one of 128 x 128 spills the mask: 8 warps each. On sm_80 one
# of 128 x 256 spills with 8 too, since there the operands pass through registers on their way to the tensor cores.
_FEW = Config(16, 32, num_warps=4, num_stages=4, block_inner=128, form="pointer")
_HOPPER = (
    Config(128, 256, num_warps=8, num_stages=4, block_inner=64, form="tma"),
    Config(128, 256, num_warps=8, num_stages=4, block_inner=64, form="pointer"),
    Config(128, 128, num_warps=8, num_stages=4, block_inner=64, form="tma"),
    Config(128, 128, num_warps=8, num_stages=3, block_inner=64, form="pointer"),
    Config(64, 128, num_warps=4, num_stages=4, block_inner=64, form="pointer"),
    _FEW,
)
_AMPERE = (
    Config(128, 128, num_warps=8, num_stages=4, block_inner=64, form="pointer"),
    Config(128, 128, num_warps=8, num_stages=5, block_inner=32, form="pointer"),
    Config(64, 128, num_warps=8, num_stages=4, block_inner=64, form="pointer"),
    Config(64, 64, num_warps=4, num_stages=4, block_inner=64, form="pointer"),
    _FEW,
)
_SMALL = (  # 99 KiB of shared memory a block: sm_86, sm_89, sm_120
    Config(128, 128, num_warps=8, num_stages=5, block_inner=32, form="pointer"),
    Config(64, 128, num_warps=4, num_stages=4, block_inner=32, form="pointer"),
    Config(64, 64, num_warps=4, num_stages=4, block_inner=64, form="pointer"),
    _FEW,
)


def eligible(config: Config, x: Tensor, weight: Tensor) -> bool:
    """Whether a variant can take these operands and could be the fastest.

    A tile of 16 rows reads the weight once for every 16 tokens. TMA wants sm_90, and a unit stride, with rows and base
    aligned to 16 bytes, of x, of weight or weightᵀ, and of the output.
    """
    if config.block_tokens < FEW_TOKENS < x.shape[0]:
        return False
    if config.form != "tma":
        return True
    rows = weight if weight.stride(1) == 1 else weight.T
    aligned = _has_tma_rows(x) and _has_tma_rows(rows) and weight.shape[0] * x.element_size() % 16 == 0
    return aligned and _has_tma(x.device)


def _has_tma_rows(t: Tensor) -> bool:
    pitch, step = t.stride()
    return (
        step == 1
        and pitch >= t.shape[1] > 0
        and pitch * t.element_size() % 16 == 0
        and t.data_ptr() % 16 == 0
        and t.shape[0] > 0
    )


@cache
def _has_tma(device: torch.device) -> bool:
    return INTERPRETED or torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def _multiprocessors(device: torch.device) -> int:
    return 3 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count
