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
from petune.kernels.grouped_lora.reference import widest
from petune.kernels.lora_linear.kernel import unsupported

__all__ = ["backward", "forward", "joined_forward", "packed_forward", "unsupported"]


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Sequence[Tensor], b: Sequence[Tensor], scales: Sequence[float],
    order: Tensor, offsets: Tensor, dropout_p: Sequence[float], seeds: Tensor | None, token_index: Tensor | None,
    rank_mask: Tensor | None, dtype: torch.dtype, keeps_s: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y = x Wᵀ + bias + scale_l/q_l · s B_lᵀ,  s = (x ⊙ m_l) A_lᵀ ⊙ n  for the tokens of adapter l, in `dtype`."""
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    layout = _layout(order, offsets, a)
    masks = Dropped.of(dropout_p, seeds, token_index)
    s = _on_rank(skinny.shrink(rows, torch.cat(tuple(a)), layout, masks=masks), rank_mask, layout)
    y = F.linear(rows, weight.to(dtype), None if bias is None else bias.to(dtype))
    factors = _scales(scales, dropout_p, seeds, x.device)
    skinny.expand(s, torch.cat(tuple(b), dim=1).T, layout, out=y, scales=factors)
    return in_shape_of(x, y), s if keeps_s else s.new_empty(len(s), 0)


def backward(
    dy: Tensor, x: Tensor | None, s: Tensor | None, weight: Tensor, a: Sequence[Tensor], b: Sequence[Tensor],
    scales: Sequence[float], order: Tensor, offsets: Tensor, dropout_p: Sequence[float], seeds: Tensor | None,
    token_index: Tensor | None, rank_mask: Tensor | None, needs_dx: bool, needs_a: Sequence[bool],
    needs_b: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """ds = scale_l/q_l · dy B_l ⊙ n,  dx = dy W + m_l ⊙ (ds A_l),  dA_l = dsᵀ (x ⊙ m_l),  dB_l = scale_l/q_l · dyᵀ s.

    dA is [Σ rank, in_features], dB is flat; what no flag asks for is empty. dA takes x, dB takes s.
    """
    rows = dy.reshape(-1, dy.shape[-1])
    layout = _layout(order, offsets, a)
    masks = Dropped.of(dropout_p, seeds, token_index)
    factors, up = _scales(scales, dropout_p, seeds, dy.device), torch.cat(tuple(b), dim=1)
    dx, da = dy.new_empty(0), dy.new_empty(0, weight.shape[1], dtype=widest(a))
    db = dy.new_empty(0, dtype=widest(b))
    if any(needs_b):
        assert s is not None
        ds, db = skinny.dual(rows, s, up, layout, scales=factors, dtype=db.dtype)
    else:
        ds = skinny.shrink(rows, up.T, layout, scales=factors)
    ds = _on_rank(ds, rank_mask, layout)
    if any(needs_a):
        assert x is not None
        x_rows = x.reshape(-1, x.shape[-1]).to(dy.dtype)
        da = skinny.outer(x_rows, ds, layout, dtype=da.dtype, masks=masks)
    if needs_dx:
        dx = rows @ weight.to(dy.dtype)
        skinny.expand(ds, torch.cat(tuple(a)), layout, out=dx, masks=masks)
        dx = dx.view(*dy.shape[:-1], weight.shape[1])
    return dx, da, db


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
    return s.mul_(rank_mask.reshape(len(layout.order), -1, s.shape[1])[layout.order].view_as(s))


def _layout(order: Tensor, offsets: Tensor, a: Sequence[Tensor]) -> Layout:
    return Layout.of(order, offsets, tuple(down.shape[0] for down in a))


def _scales(scales: Sequence[float], dropout_p: Sequence[float], seeds: Tensor | None, device: torch.device) -> Tensor:
    """scale_l/q_l, float32, [adapters]."""
    masks = (mask_of(p, seeds) for p in dropout_p)
    kept = (mask.keep_probability if mask else 1.0 for mask in masks)
    return table(tuple(scale / q for scale, q in zip(scales, kept, strict=True)), torch.float32, device)
