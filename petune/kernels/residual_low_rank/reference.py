"""The specification of `residual_low_rank` in plain torch: every kernel is tested against these two functions."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def forward(u: Tensor, down: Tensor, up: Tensor, gate: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """z = gate ⊙ u + s (gate ⊙ up)ᵀ in the dtype of u, and s = u downᵀ in `dtype`."""
    rows = u.reshape(-1, u.shape[-1])
    # the long axis of a skinny product goes last: MKL takes 0.7 of the time for (down uᵀ)ᵀ that it takes for u downᵀ,
    # and a third of it for (sᵀ dz)ᵀ in place of dzᵀ s
    s = (down.to(dtype) @ rows.to(dtype).T).T.contiguous()
    # the gate on u and on up, not on their sum: that would be one more pass over z
    z = u.new_empty(u.shape)
    z_rows = torch.mul(rows, gate, out=z.view(rows.shape))
    z_rows.addmm_(s.to(z.dtype), (gate.unsqueeze(1) * up).to(z.dtype).T)
    return z, s


def differentiable(u: Tensor, down: Tensor, up: Tensor, gate: Tensor, dtype: torch.dtype) -> Tensor:
    """The same formula in operators that torch differentiates any number of times, forward or backward, or vmaps."""
    low_rank = F.linear(F.linear(u.to(dtype), down.to(dtype)), up.to(dtype))
    return (gate * (u + low_rank)).to(u.dtype)


def backward(
    dz: Tensor, u: Tensor | None, s: Tensor | None, down: Tensor, up: Tensor, gate: Tensor,
    dtype: torch.dtype, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """ds = dz (gate ⊙ up),  du = gate ⊙ dz + ds down,  ddown = dsᵀ u,  and with p = dzᵀ s
    dup = gate ⊙ p,  dgate = Σ_tokens dz ⊙ u + Σ_rank up ⊙ p.

    `needs` says which of du, ddown, dup and dgate to compute; the others are empty. u + s upᵀ is not made again:
    Σ_tokens dz ⊙ (s upᵀ) = Σ_rank up ⊙ p. The products run in the dtype of dz or the factors, whichever is wider.
    """
    needs_du, needs_ddown, needs_dup, needs_dgate = needs
    wide = torch.promote_types(dz.dtype, down.dtype)
    rows = dz.reshape(-1, dz.shape[-1]).to(wide)
    u_rows = None if u is None else u.reshape(rows.shape).to(wide)
    du, ddown, dup, dgate = dz.new_empty(0), down.new_empty(0), up.new_empty(0), gate.new_empty(0)
    buffer = rows.new_empty(rows.shape if needs_du or needs_dgate else 0)
    if needs_dup or needs_dgate:
        assert s is not None
        p = (s.to(wide).T @ rows).T
        if needs_dup:
            dup = (gate.unsqueeze(1) * p).to(up.dtype).contiguous()
        if needs_dgate:
            assert u_rows is not None
            dgate = (torch.mul(rows, u_rows, out=buffer).sum(0) + (up * p).sum(1)).to(gate.dtype)
    if needs_du or needs_ddown:
        ds = ((gate.unsqueeze(1) * up).to(wide).T @ rows.T).T
        if needs_ddown:
            assert u_rows is not None
            ddown = (ds.T @ u_rows).to(down.dtype)
        if needs_du:
            du = torch.mul(rows, gate, out=buffer).addmm_(ds, down.to(wide)).to(dz.dtype).view(dz.shape)
    return du, ddown, dup, dgate
