# pyright: basic
# Triton's own types cover neither the kernels' pointers nor their launches
"""The gate of an MLP in one pass forward and one pass backward, in fp32 registers.

h = act(g) ⊙ u;  dg = dh ⊙ u ⊙ act′(g),  du = dh ⊙ act(g).
With σ the logistic function and Φ, φ the normal distribution and its density:

silu       g σ(g)   act′ = σ + g σ (1 − σ)
gelu       g Φ(g)   act′ = Φ + g φ(g)
gelu_tanh  g σ(z)   act′ = σ + g σ (1 − σ) z′,  z = 2 √(2/π) (g + 0.044715 g³), for which (1 + tanh(z/2)) / 2 = σ(z)
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from petune.kernels.launch import FUSED

_TILE = 1024
"""Elements of a program: 8 a thread at 4 warps, which is one 16-byte load of a 16-bit dtype."""


@triton.jit
def _logistic(z):
    """σ(z) and σ(−z) = 1 − σ(z), each to the rounding of fp32: neither is a difference, and no exp overflows."""
    e = tl.exp(-tl.abs(z))
    larger = 1 / (1 + e)
    smaller = e * larger
    return tl.where(z < 0, smaller, larger), tl.where(z < 0, larger, smaller)


@triton.jit
def _activate(g, ACTIVATION: tl.constexpr):
    """act(g) and act′(g)."""
    if ACTIVATION == "silu":
        sigma, rest = _logistic(g)
        value, slope = g * sigma, sigma + g * sigma * rest
    elif ACTIVATION == "gelu":
        normal = 0.5 + 0.5 * tl.erf(g * 0.7071067811865476)  # 1/√2
        value, slope = g * normal, normal + g * (0.3989422804014327 * tl.exp(-0.5 * g * g))  # 1/√(2π)
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        # σ(z) is 0 or 1 in fp32 from |g| = 10 on; beyond 32, g² stays 1024: else z′ is infinite there, and 0 · z′ NaN
        square = tl.minimum(g * g, 1024.0)
        sigma, rest = _logistic(g * (1.5957691216057308 + 0.07135481627260025 * square))  # 2 √(2/π), 0.044715 · that
        value, slope = g * sigma, sigma + g * sigma * rest * (1.5957691216057308 + 0.21406444881780073 * square)
    return value, slope


@triton.jit
def _gate_forward_kernel(
    gate_ptr, up_ptr, h_ptr, tokens, features,
    stride_gt, stride_ut, stride_ht,
    ACTIVATION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """h = act(g) ⊙ u; a program owns one tile."""
    blocks = tl.cdiv(features, BLOCK_F)
    t = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]  # [BLOCK_T, 1]
    f = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]  # [1, BLOCK_F]
    inside = (t < tokens) & (f < features)
    g = tl.load(gate_ptr + t * stride_gt + f, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_F]
    u = tl.load(up_ptr + t * stride_ut + f, mask=inside, other=0.0).to(tl.float32)
    value, _ = _activate(g, ACTIVATION)
    tl.store(h_ptr + t * stride_ht + f, (value * u).to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gate_backward_kernel(
    dh_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, h_ptr, tokens, features,
    stride_dt, stride_gt, stride_ut, stride_ot,
    ACTIVATION: tl.constexpr, WITH_H: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """dg = dh ⊙ u ⊙ act′(g), du = dh ⊙ act(g), and h again; du may lie in dh, read by then."""
    blocks = tl.cdiv(features, BLOCK_F)
    t = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]  # [BLOCK_T, 1]
    f = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]  # [1, BLOCK_F]
    inside = (t < tokens) & (f < features)
    dh = tl.load(dh_ptr + t * stride_dt + f, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_F]
    g = tl.load(gate_ptr + t * stride_gt + f, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up_ptr + t * stride_ut + f, mask=inside, other=0.0).to(tl.float32)
    value, slope = _activate(g, ACTIVATION)
    out = t * stride_ot + f
    tl.store(dgate_ptr + out, (dh * (u * slope)).to(dgate_ptr.dtype.element_ty), mask=inside)
    tl.store(dup_ptr + out, (dh * value).to(dup_ptr.dtype.element_ty), mask=inside)
    if WITH_H:
        tl.store(h_ptr + out, (value * u).to(h_ptr.dtype.element_ty), mask=inside)


def gate_forward(gate: Tensor, up: Tensor, activation: str, dtype: torch.dtype) -> Tensor:
    """h = act(gate) ⊙ up, contiguous, in `dtype`; gate and up have one shape and any strides."""
    h = gate.new_empty(gate.shape, dtype=dtype)
    g, u, out = _as_rows(gate, up, h)
    if out.numel():
        grid, constants = _tiles(out, ACTIVATION=activation)
        _gate_forward_kernel[grid](
            gate_ptr=g, up_ptr=u, h_ptr=out, tokens=out.shape[0], features=out.shape[1],
            stride_gt=g.stride(0), stride_ut=u.stride(0), stride_ht=out.stride(0), **constants,
        )  # fmt: skip
    return h


def gate_backward(
    dh: Tensor, gate: Tensor, up: Tensor, activation: str, *, in_place: bool = False, with_h: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dgate, dup, h where asked for), contiguous, in the dtype of dh; in place, dup takes the buffer of dh."""
    assert dh.is_contiguous() or not in_place
    dgate = dh.new_empty(dh.shape)
    dup = dh if in_place else torch.empty_like(dgate)
    h = torch.empty_like(dgate) if with_h else None
    d, g, u, out = _as_rows(dh, gate, up, dgate)
    if out.numel():
        grid, constants = _tiles(out, ACTIVATION=activation, WITH_H=with_h)
        _gate_backward_kernel[grid](
            dh_ptr=d, gate_ptr=g, up_ptr=u, dgate_ptr=dgate, dup_ptr=dup, h_ptr=dgate if h is None else h,
            tokens=out.shape[0], features=out.shape[1], stride_dt=d.stride(0), stride_gt=g.stride(0),
            stride_ut=u.stride(0), stride_ot=out.stride(0), **constants,
        )  # fmt: skip
    return dgate, dup, h


def _as_rows(*tensors: Tensor) -> list[Tensor]:
    """Matrices of one shape with unit inner strides: a single row where no tensor has a gap."""
    dense = [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]
    if all(t.is_contiguous() for t in dense):
        return [t.view(1, -1) for t in dense]
    return [t.reshape(-1, t.shape[-1]) for t in dense]


def _tiles(rows: Tensor, **constants: object) -> tuple[tuple[int], dict[str, Any]]:
    """The grid of a launch over a matrix, and the constants of its programs."""
    features = min(triton.next_power_of_2(rows.shape[1]), _TILE)
    tokens = _TILE // features
    grid = triton.cdiv(rows.shape[0], tokens) * triton.cdiv(rows.shape[1], features)
    return (grid,), {**constants, "BLOCK_T": tokens, "BLOCK_F": features, "num_warps": 4, **FUSED}
