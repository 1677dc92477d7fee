"""`grouped_lora` and `grouped_packed_lora` on Triton: one base product of all tokens by cuBLAS, which also takes the
low-rank term of each adapter's tokens in one more pass.

Forward reads x for s and y for the term; backward reads dy once for ds with dB, x once for dA, and dx for the term.
The number of launches does not depend on the number of adapters.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from petune.kernels.autograd import in_shape_of
from petune.kernels.dropout import mask_of
from petune.kernels.grouped_lora import packed_skinny, skinny
from petune.kernels.grouped_lora.layout import Dropped, Layout, table
from petune.kernels.grouped_lora.reference import base_gradient, by_projection, widest
from petune.kernels.lora_linear.kernel import unsupported

__all__ = ["backward", "forward", "joined_forward", "packed_forward", "unsupported"]


def forward(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], a: Sequence[Tensor], b: Sequence[Tensor],
    scales: Sequence[float], order: Tensor, offsets: Tensor, dropout_p: Sequence[float], seeds: Tensor | None,
    token_index: Tensor | None, rank_mask: Tensor | None, dtype: torch.dtype, keeps_s: bool = True,
) -> tuple[Tensor, ...]:  # fmt: skip
    """y_i = x W_iᵀ + bias_i + scale_il/q_l · s_i B_ilᵀ,  s_i = (x ⊙ m_l) A_ilᵀ ⊙ n  for the tokens of adapter l.

    Returns (y_1, …, s_1, …) in `dtype`.
    """
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    masks = Dropped.of(dropout_p, seeds, token_index)
    ys: list[Tensor] = []
    ss: list[Tensor] = []
    downs, ups = by_projection(a, len(weights)), by_projection(b, len(weights))
    own_scales = by_projection(scales, len(weights))
    for weight, bias, down, up, scale in zip(weights, biases, downs, ups, own_scales, strict=True):
        layout = _layout(order, offsets, down)
        s = _on_rank(skinny.shrink(rows, torch.cat(tuple(down)), layout, masks=masks), rank_mask, layout)
        y = F.linear(rows, weight.to(dtype), None if bias is None else bias.to(dtype))
        factors = _scales(scale, dropout_p, seeds, x.device)
        skinny.expand(s, torch.cat(tuple(up), dim=1).T, layout, out=y, scales=factors)
        ys.append(in_shape_of(x, y))
        ss.append(s if keeps_s else s.new_empty(len(s), 0))
    return *ys, *ss


def backward(
    dys: Sequence[Tensor], x: Tensor | None, s: Sequence[Tensor], weights: Sequence[Tensor], a: Sequence[Tensor],
    b: Sequence[Tensor], scales: Sequence[float], order: Tensor, offsets: Tensor, dropout_p: Sequence[float],
    seeds: Tensor | None, token_index: Tensor | None, rank_mask: Tensor | None, needs_dx: bool,
    needs_a: Sequence[bool], needs_b: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """ds_i = scale_il/q_l · dy_i B_il ⊙ n,  dx = Σ dy_i W_i + m_l ⊙ (ds_i A_il),  dA_il = ds_iᵀ (x ⊙ m_l),
    dB_il = scale_il/q_l · dy_iᵀ s_i.

    Returns (dx, dA_1, …, dB_1, …): dA_i is [Σ rank, in_features], dB_i is flat; what no flag asks for is empty. dA
    takes x, dB takes s.
    """
    rows, in_features = [dy.reshape(-1, dy.shape[-1]) for dy in dys], weights[0].shape[1]
    x_rows = None if x is None else x.reshape(-1, in_features).to(rows[0].dtype)
    masks = Dropped.of(dropout_p, seeds, token_index)
    dx = base_gradient(rows, weights) if needs_dx else rows[0].new_empty(0)
    das: list[Tensor] = []
    dbs: list[Tensor] = []
    downs, ups = by_projection(a, len(weights)), by_projection(b, len(weights))
    factors = by_projection(scales, len(weights))
    for i, (dy, down, some, own) in enumerate(zip(rows, downs, ups, factors, strict=True)):
        layout, up = _layout(order, offsets, down), torch.cat(tuple(some), dim=1)
        scale = _scales(own, dropout_p, seeds, dy.device)
        if any(needs_b):
            ds, db = skinny.dual(dy, s[i], up, layout, scales=scale, dtype=widest(b))
        else:
            ds, db = skinny.shrink(dy, up.T, layout, scales=scale), dy.new_empty(0, dtype=widest(b))
        dbs.append(db)
        ds = _on_rank(ds, rank_mask, layout)
        if any(needs_a):
            assert x_rows is not None
            das.append(skinny.outer(x_rows, ds, layout, dtype=widest(a), masks=masks))
        else:
            das.append(dy.new_empty(0, in_features, dtype=widest(a)))
        if needs_dx:
            skinny.expand(ds, torch.cat(tuple(down)), layout, out=dx, masks=masks)
    return dx.view(*dys[0].shape[:-1], in_features) if needs_dx else dx, *das, *dbs


def joined_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, ranks: Sequence[int],
    scales: Sequence[float], order: Tensor, offsets: Tensor, dtype: torch.dtype,
) -> tuple[Tensor]:  # fmt: skip
    """y = x Wᵀ + bias + scale_l · (x A_lᵀ) B_lᵀ in `dtype`; A_l and B_l are parts of a and b."""
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    layout = Layout.of(order, offsets, tuple(ranks))
    s = skinny.shrink(rows, a, layout)
    y = F.linear(rows, weight.to(dtype), None if bias is None else bias.to(dtype))
    skinny.expand(s, b.T, layout, out=y, scales=table(tuple(scales), torch.float32, x.device))
    return (in_shape_of(x, y),)


def packed_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, a_bits: Sequence[Tensor], a_levels: Sequence[Tensor],
    b_bits: Sequence[Tensor], b_levels: Sequence[Tensor], ranks: Sequence[int], bits: Sequence[int],
    scales: Sequence[float], order: Tensor, offsets: Tensor, dtype: torch.dtype,
) -> tuple[Tensor]:  # fmt: skip
    """y = x Wᵀ + bias + scale_l · (x Â_lᵀ) B̂_lᵀ in `dtype`: one pair of launches for each width of codes."""
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    layout = Layout.of(order, offsets, tuple(ranks))
    y = F.linear(rows, weight.to(dtype), None if bias is None else bias.to(dtype))
    a = packed_skinny.Factors.of(a_bits, a_levels, ranks, bits)
    b = packed_skinny.Factors.of(b_bits, b_levels, ranks, bits)
    factors = table(tuple(scales), torch.float32, x.device)
    for width in sorted(set(bits)):
        s = packed_skinny.shrink(rows, a, layout, width)
        packed_skinny.expand(s, b, layout, width, out=y, scales=factors)
    return (in_shape_of(x, y),)


def _on_rank(s: Tensor, rank_mask: Tensor | None, layout: Layout) -> Tensor:
    """s ⊙ n, the rows of s in the order of the adapters; s is used up."""
    if rank_mask is None or not len(s):
        return s
    mask = rank_mask[:, : s.shape[1]].reshape(len(layout.order), -1, s.shape[1])
    return s.mul_(mask[layout.order].view_as(s))


def _layout(order: Tensor, offsets: Tensor, a: Sequence[Tensor]) -> Layout:
    return Layout.of(order, offsets, tuple(down.shape[0] for down in a))


def _scales(scales: Sequence[float], dropout_p: Sequence[float], seeds: Tensor | None, device: torch.device) -> Tensor:
    """scale_l/q_l, float32, [adapters]."""
    masks = (mask_of(p, seeds) for p in dropout_p)
    kept = (mask.keep_probability if mask else 1.0 for mask in masks)
    return table(tuple(scale / q for scale, q in zip(scales, kept, strict=True)), torch.float32, device)
