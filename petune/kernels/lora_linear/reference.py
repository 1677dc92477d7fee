"""The specification of `lora_linear` in plain torch: every kernel is tested against these two functions."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from petune.kernels.dropout import keep_mask, mask_of


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor,
    scale: float, dropout_p: float, seed: Tensor | None, dtype: torch.dtype, rank_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y = x Wᵀ + bias + scale/q · s Bᵀ,  s = (x ⊙ m) Aᵀ ⊙ rank_mask; both results in `dtype`.

    m is the keep mask, q its mean.
    """
    x, weight, a, b = (t.to(dtype) for t in (x, weight, a, b))
    rows = x.reshape(-1, x.shape[-1])
    if (mask := mask_of(dropout_p, seed)) is not None:
        scale = scale / mask.keep_probability
        rows = keep_mask(rows.shape[0], rows.shape[1], mask, dtype).mul_(rows)
    s = _times(rows @ a.T, rank_mask)
    y = F.linear(x, weight, None if bias is None else bias.to(dtype))
    y.view(-1, weight.shape[0]).addmm_(s, b.T, alpha=scale)
    return y, s


def differentiable(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor,
    scale: float, dropout_p: float, dtype: torch.dtype, rank_mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The same formula in operators that torch differentiates any number of times, forward or backward, or vmaps."""
    x, weight, a, b = (t.to(dtype) for t in (x, weight, a, b))
    s = F.linear(F.dropout(x, dropout_p), a)
    if rank_mask is not None:
        s = s * rank_mask.to(dtype).reshape(s.shape)
    return F.linear(x, weight, None if bias is None else bias.to(dtype)) + F.linear(s, b) * scale


def backward(
    dy: Tensor, x: Tensor | None, s: Tensor | None, weight: Tensor, a: Tensor, b: Tensor,
    scale: float, dropout_p: float, seed: Tensor | None, needs: Sequence[bool], rank_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """ds = scale/q · dy B ⊙ rank_mask,  dx = dy W + m ⊙ (ds A),  dA = dsᵀ (x ⊙ m),  dB = scale/q · dyᵀ s.

    `needs` says which of dx, dA and dB to compute; the others are empty. dA takes x, dB takes s or makes it from x.
    The adapters' own products run in their dtype: fp32 adapters on a bf16 base get fp32 gradients, not rounded sums.
    """
    needs_dx, needs_da, needs_db = needs
    dtype = torch.promote_types(dy.dtype, a.dtype)
    rows = dy.reshape(-1, dy.shape[-1])
    wide_rows, wide_a, wide_b = rows.to(dtype), a.to(dtype), b.to(dtype)
    dropped = None if x is None else x.reshape(-1, x.shape[-1]).to(dtype)
    kept = None
    if (mask := mask_of(dropout_p, seed)) is not None:
        scale = scale / mask.keep_probability
        kept = keep_mask(rows.shape[0], a.shape[1], mask, dtype)
        dropped = None if dropped is None else kept * dropped
    dx, da, db = dy.new_empty(0), a.new_empty(0), b.new_empty(0)
    # the long axis of a skinny product goes last: MKL takes a tenth of the time for (sᵀ dy)ᵀ that it takes for dyᵀ s
    ds = _times((wide_b.T @ wide_rows.T).mul_(scale).T, rank_mask)
    if needs_da:
        assert dropped is not None
        da = (ds.T @ dropped).to(a.dtype)
    if needs_db:
        if s is None:
            assert dropped is not None
            s = _times(dropped @ wide_a.T, rank_mask)
        db = (s.to(dtype).T @ wide_rows).mul_(scale).T.to(b.dtype).contiguous()
    if needs_dx:
        weight, ds, a = (t.to(dy.dtype) for t in (weight, ds, a))
        if kept is None:
            dx = (rows @ weight).addmm_(ds, a)
        else:
            dx = kept.to(dy.dtype).mul_(ds @ a).addmm_(rows, weight)
        dx = dx.view(*dy.shape[:-1], weight.shape[1])
    return dx, da, db


def _times(s: Tensor, rank_mask: Tensor | None) -> Tensor:
    """s ⊙ rank_mask, into s."""
    return s if rank_mask is None else s.mul_(rank_mask)
