"""The specification of `lora_group` in plain torch: every kernel is tested against these two functions."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from petune.kernels.dropout import keep_mask, mask_of


def forward(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], a: Sequence[Tensor], b: Sequence[Tensor],
    scales: Sequence[float], dropout_p: float, seed: Tensor | None, dtype: torch.dtype,
) -> tuple[Tensor, ...]:  # fmt: skip
    """s = (x ⊙ m) Aᵀ with A = [A₁; A₂; …],  y_i = x W_iᵀ + bias_i + scale_i/q · s_i B_iᵀ.

    m is the keep mask and q its mean. Returns (y_1, …, s), all in `dtype`; s_i are the columns of s that A_i made.
    """
    x = x.to(dtype)
    rows = x.reshape(-1, x.shape[-1])
    dropped, mask = rows, mask_of(dropout_p, seed)
    if mask is not None:
        scales = [scale / mask.keep_probability for scale in scales]
        dropped = keep_mask(rows.shape[0], rows.shape[1], mask, dtype).mul_(rows)
    s = dropped @ torch.cat([t.to(dtype) for t in a]).T
    parts = s.split([t.shape[0] for t in a], dim=1)
    ys: list[Tensor] = []
    for weight, bias, part, up, scale in zip(weights, biases, parts, b, scales, strict=True):
        y = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
        y.view(-1, weight.shape[0]).addmm_(part, up.to(dtype).T, alpha=scale)
        ys.append(y)
    return (*ys, s)


def differentiable(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], a: Sequence[Tensor], b: Sequence[Tensor],
    scales: Sequence[float], dropout_p: float, dtype: torch.dtype,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The same formula in operators that torch differentiates any number of times, forward or backward, or vmaps."""
    x = x.to(dtype)
    dropped = F.dropout(x, dropout_p)
    return tuple(
        F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
        + F.linear(F.linear(dropped, down.to(dtype)), up.to(dtype)) * scale
        for weight, bias, down, up, scale in zip(weights, biases, a, b, scales, strict=True)
    )


def backward(
    a: Tensor, x: Tensor | None, s: Sequence[Tensor], dys: Sequence[Tensor], weights: Sequence[Tensor],
    b: Sequence[Tensor], scales: Sequence[float], dropout_p: float, seed: Tensor | None, needs: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """ds_i = scale_i/q · dy_i B_i,  dx = m ⊙ (ds A) + Σ dy_i W_i,  dA = dsᵀ (x ⊙ m),  dB_i = scale_i/q · dy_iᵀ s_i.

    a is stacked. `needs` says which of dx, dA, dB_1, … to compute; the others are empty. Where s is empty it is made
    from x. The adapters' own products run in their dtype: fp32 adapters on a bf16 base get fp32 gradients.
    """
    needs_dx, needs_da, *needs_db = needs
    dtype = torch.promote_types(dys[0].dtype, a.dtype)
    flat = [dy.reshape(-1, dy.shape[-1]) for dy in dys]
    rows, up, wide_a = [dy.to(dtype) for dy in flat], [t.to(dtype) for t in b], a.to(dtype)
    dropped = None if x is None else x.reshape(-1, x.shape[-1]).to(dtype)
    keep, mask = None, mask_of(dropout_p, seed)
    if mask is not None:
        scales = [scale / mask.keep_probability for scale in scales]
        keep = keep_mask(rows[0].shape[0], a.shape[1], mask, dtype)
        dropped = None if dropped is None else keep * dropped
    dx, da, db = dys[0].new_empty(0), a.new_empty(0), [t.new_empty(0) for t in b]
    # the long axis of a skinny product goes last: MKL takes a tenth of the time for (sᵀ dy)ᵀ that it takes for dyᵀ s
    dst = torch.cat([(t.T @ dy.T).mul_(scale) for t, dy, scale in zip(up, rows, scales, strict=True)])
    if needs_da:
        assert dropped is not None
        da = (dst @ dropped).to(a.dtype)
    if any(needs_db):
        if not s:
            assert dropped is not None
            s = (dropped @ wide_a.T).split([t.shape[1] for t in b], dim=1)
        db = [
            (part.to(dtype).T @ dy).mul_(scale).T.to(t.dtype).contiguous() if needed else t.new_empty(0)
            for needed, t, part, dy, scale in zip(needs_db, b, s, rows, scales, strict=True)
        ]
    if needs_dx:
        dx = dst.T.to(flat[0].dtype) @ a.to(flat[0].dtype)
        dx = dx if keep is None else dx.mul_(keep)
        for dy, weight in zip(flat, weights, strict=True):
            dx.addmm_(dy, weight.to(dy.dtype))
        dx = dx.view(*dys[0].shape[:-1], a.shape[1])
    return (dx, da, *db)
