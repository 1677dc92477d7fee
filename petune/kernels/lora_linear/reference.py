"""The specification of `lora_linear` in plain torch: every kernel is tested against these two functions."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from petune.kernels.lora_linear.dropout import keep_mask, keep_probability


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor,
    scale: float, dropout_p: float, seed: Tensor | None, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y = x Wᵀ + bias + scale/q · s Bᵀ,  s = (x ⊙ m) Aᵀ; m is the keep mask, q its mean; both results in `dtype`."""
    x, weight, a, b = (t.to(dtype) for t in (x, weight, a, b))
    rows = x.reshape(-1, x.shape[-1])
    if seed is not None:
        scale = scale / keep_probability(dropout_p)
        rows = keep_mask(rows.shape[0], rows.shape[1], dropout_p, seed, dtype).mul_(rows)
    s = rows @ a.T
    y = F.linear(x, weight, None if bias is None else bias.to(dtype))
    y.view(-1, weight.shape[0]).addmm_(s, b.T, alpha=scale)
    return y, s


def backward(
    dy: Tensor, x: Tensor | None, s: Tensor | None, weight: Tensor, a: Tensor, b: Tensor,
    scale: float, dropout_p: float, seed: Tensor | None, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """ds = scale/q · dy B,  dx = dy W + m ⊙ (ds A),  dA = dsᵀ (x ⊙ m),  dB = scale/q · dyᵀ s.

    `needs` says which of dx, dA and dB to compute; the others are empty. dA takes x, dB takes s or makes it from x.
    dx has the dtype of dy.
    """
    needs_dx, needs_da, needs_db = needs
    rows, weight, low_a, low_b = dy.reshape(-1, dy.shape[-1]), *(t.to(dy.dtype) for t in (weight, a, b))
    dropped = None if x is None else x.reshape(-1, x.shape[-1]).to(dy.dtype)
    mask = None
    if seed is not None:
        scale = scale / keep_probability(dropout_p)
        if needs_dx or dropped is not None:
            mask = keep_mask(rows.shape[0], a.shape[1], dropout_p, seed, dy.dtype)
            dropped = None if dropped is None else mask * dropped
    dx, da, db = dy.new_empty(0), a.new_empty(0), b.new_empty(0)
    ds_t = (low_b.T @ rows.T).mul_(scale)
    if needs_da:
        assert dropped is not None
        da = _sum_over_tokens(ds_t, dropped).to(a.dtype)
    if needs_db:
        if s is None:
            assert dropped is not None
            s = dropped @ low_a.T
        db = _sum_over_tokens(s.T, rows).mul_(scale).T.to(b.dtype).contiguous()
    if needs_dx:
        dx = rows @ weight if mask is None else mask.mul_(ds_t.T @ low_a)
        dx = dx.addmm_(ds_t.T, low_a) if mask is None else dx.addmm_(rows, weight)
        dx = dx.view(*dy.shape[:-1], a.shape[1])
    return dx, da, db


def _sum_over_tokens(left_t: Tensor, right: Tensor) -> Tensor:
    """leftᵀ right, [rank, features], with the long axis last: MKL takes ten times as long for (rightᵀ left)ᵀ.

    In bf16 and fp16 eight partial sums are added in fp32, because the product itself is rounded to their dtype.
    """
    if left_t.dtype in (torch.float32, torch.float64):
        return left_t @ right
    step = -(-max(right.shape[0], 1) // 8)
    parts = zip(left_t.split(step, dim=1), right.split(step), strict=True)
    return torch.stack([(left @ part).float() for left, part in parts]).sum(0)
