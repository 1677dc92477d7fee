"""`lora_group` on Triton: the launches of `lora_linear`, with x read and dx written once for all projections.

Forward reads x for s once and once more for each base product; backward reads each dy_i twice (ds_i with dB_i, and the
base product) and x once (dA). dx is written once by the low-rank term, and the base products accumulate into it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from petune.kernels.autograd import in_shape_of
from petune.kernels.dropout import mask_of
from petune.kernels.lora_linear.kernel import dual, expand, outer, project, shrink, unsupported

__all__ = ["backward", "forward", "unsupported"]


def forward(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], a: Sequence[Tensor], b: Sequence[Tensor],
    scales: Sequence[float], dropout_p: float, seed: Tensor | None, dtype: torch.dtype,
) -> tuple[Tensor, ...]:  # fmt: skip
    """s = (x ⊙ m) Aᵀ with A = [A₁; A₂; …],  y_i = x W_iᵀ + bias_i + scale_i/q · s_i B_iᵀ; (y_1, …, s) in `dtype`."""
    mask = mask_of(dropout_p, seed)
    q = mask.keep_probability if mask else 1.0
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    s = shrink(rows, torch.cat(tuple(a)), mask=mask)
    parts = s.split([factor.shape[0] for factor in a], dim=1)
    ys = [
        project(rows, weight.to(dtype), None if bias is None else bias.to(dtype), part, up, scale / q)
        for weight, bias, part, up, scale in zip(weights, biases, parts, b, scales, strict=True)
    ]
    return (*(in_shape_of(x, y) for y in ys), s)


def backward(
    a: Tensor, x: Tensor | None, s: Sequence[Tensor], dys: Sequence[Tensor], weights: Sequence[Tensor],
    b: Sequence[Tensor], scales: Sequence[float], dropout_p: float, seed: Tensor | None, needs: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """ds_i = scale_i/q · dy_i B_i,  dx = m ⊙ (ds A) + Σ dy_i W_i,  dA = dsᵀ (x ⊙ m),  dB_i = scale_i/q · dy_iᵀ s_i.

    a is stacked. `needs` says which of dx, dA, dB_1, … to compute; the others are empty. Where s is empty it is made
    from x.
    """
    needs_dx, needs_da, *needs_db = needs
    mask = mask_of(dropout_p, seed)
    q = mask.keep_probability if mask else 1.0
    dtype, ranks = dys[0].dtype, [factor.shape[1] for factor in b]
    dy_rows = [dy.reshape(-1, dy.shape[-1]) for dy in dys]
    rows = None if x is None else x.reshape(-1, x.shape[-1]).to(dtype)
    if any(needs_db) and not s:
        assert rows is not None
        s = shrink(rows, a, mask=mask).split(ranks, dim=1)

    ds = dy_rows[0].new_empty(len(dy_rows[0]), len(a))
    db = [factor.new_empty(0) for factor in b]
    for i, part in enumerate(ds.split(ranks, dim=1)):
        if needs_db[i]:
            _, db[i] = dual(dy_rows[i], s[i], b[i], scale=scales[i] / q, out_ds=part)
        else:
            shrink(dy_rows[i], b[i].T, scale=scales[i] / q, out=part)
    dx, da = dys[0].new_empty(0), a.new_empty(0)
    if needs_da:
        assert rows is not None
        da = outer(rows, ds, dtype=a.dtype, mask=mask)
    if needs_dx:
        dx = expand(ds, a.T, mask=mask)
        for dy, weight in zip(dy_rows, weights, strict=True):
            dx.addmm_(dy, weight.to(dtype))
        dx = dx.view(*dys[0].shape[:-1], a.shape[1])
    return (dx, da, *db)
