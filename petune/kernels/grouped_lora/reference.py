"""The specification of both operators in plain torch, which is also what runs on a CPU.

Rows of one adapter that lie beside each other are a view; only where an adapter's rows are scattered the batch is
gathered, once. No product ever has tokens of two adapters: 0 · NaN is NaN, and one adapter's must not reach another.
"""

from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from petune.kernels.autograd import in_shape_of
from petune.kernels.dropout import keep_mask, mask_of
from petune.kernels.packed_lora import unpacked

_T = TypeVar("_T")


def forward(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], a: Sequence[Tensor], b: Sequence[Tensor],
    scales: Sequence[float], order: Tensor, offsets: Tensor, dropout_p: Sequence[float], seeds: Tensor | None,
    token_index: Tensor | None, rank_mask: Tensor | None, dtype: torch.dtype, keeps_s: bool = True,
) -> tuple[Tensor, ...]:  # fmt: skip
    """y_i = x W_iᵀ + bias_i + scale_il/q_l · s_i B_ilᵀ,  s_i = (x ⊙ m_l) A_ilᵀ ⊙ n  for the tokens of adapter l.

    m_l is the keep mask, q_l its mean, n the mask of the rank. Factors and scales are those of all adapters for the
    first projection, then for the next. Returns (y_1, …, s_1, …) in `dtype`: s_i is [tokens, largest rank], its rows
    in the order of the adapters, or [tokens, 0] where it is not kept.
    """
    layout = _Layout.of(order, offsets, x)
    rows = layout.gathered(x.to(dtype))
    downs, ups = by_projection(a, len(weights)), by_projection(b, len(weights))
    factors = by_projection(scales, len(weights))
    ys = [
        F.linear(rows, weight.to(dtype), None if bias is None else bias.to(dtype))
        for weight, bias in zip(weights, biases, strict=True)
    ]
    ss = [rows.new_zeros(len(rows), max(t.shape[0] for t in own) if keeps_s else 0) for own in downs]
    masks = _Masks(dropout_p, seeds, token_index, rank_mask, layout)
    for block in layout.blocks(_kinds(downs, ups)):
        own = block.split(rows[block.tokens])
        if (mask := masks.of(block, own)) is not None:
            own = mask.mul_(own)
        parts = torch.bmm(own, block.below(downs, dtype).mT).split(block.ranks, dim=2)
        for y, s, part, up, scale in zip(ys, ss, parts, ups, factors, strict=True):
            part = masks.on_rank(block, part)
            if keeps_s:
                s[block.places, : part.shape[2]] = part.flatten(0, 1)
            y = block.split(y[block.tokens])
            _add_product(y, part, block.stack(up, dtype).mT, block.scales(scale, masks, part))
    return *(in_shape_of(x, layout.put_back(y)) for y in ys), *ss


def backward(
    dys: Sequence[Tensor], x: Tensor | None, s: Sequence[Tensor], weights: Sequence[Tensor], a: Sequence[Tensor],
    b: Sequence[Tensor], scales: Sequence[float], order: Tensor, offsets: Tensor, dropout_p: Sequence[float],
    seeds: Tensor | None, token_index: Tensor | None, rank_mask: Tensor | None, needs_dx: bool,
    needs_a: Sequence[bool], needs_b: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """ds_i = scale_il/q_l · dy_i B_il ⊙ n,  dx = Σ dy_i W_i + m_l ⊙ (ds_i A_il),  dA_il = ds_iᵀ (x ⊙ m_l),
    dB_il = scale_il/q_l · dy_iᵀ s_i.

    Returns (dx, dA_1, …, dB_1, …): dA_i is [Σ rank, in_features], one adapter below the other; dB_i is flat, one
    [out_features, rank_l] after the other; zero where an adapter has no tokens. What no flag asks for is empty. dA
    takes x, dB takes s. The adapters' own products run in their dtype: fp32 adapters on a bf16 base get fp32
    gradients, not rounded sums.
    """
    layout = _Layout.of(order, offsets, dys[0])
    rows, x_rows = [layout.gathered(dy) for dy in dys], None if x is None else layout.gathered(x)
    downs, ups = by_projection(a, len(weights)), by_projection(b, len(weights))
    factors = by_projection(scales, len(weights))
    in_features, device = weights[0].shape[1], dys[0].device
    dx = base_gradient(rows, weights) if needs_dx else rows[0].new_empty(0)
    wants_a, wants_b = any(needs_a), any(needs_b)
    starts = [[0, *accumulate(len(t) for t in own)] for own in downs]
    das = [torch.zeros(start[-1] if wants_a else 0, in_features, dtype=widest(a), device=device) for start in starts]
    dbs = [
        torch.zeros(len(weight) * start[-1] if wants_b else 0, dtype=widest(b), device=device)
        for weight, start in zip(weights, starts, strict=True)
    ]
    masks = _Masks(dropout_p, seeds, token_index, rank_mask, layout)
    for block in layout.blocks(_kinds(downs, ups)):
        dtype = widest([rows[0], *(own[block.adapters.start] for own in downs)])
        own = [block.split(dy[block.tokens]).to(dtype) for dy in rows]
        spans = [slice(start[block.adapters.start], start[block.adapters.stop]) for start in starts]
        scale = [block.scales(some, masks, own[0]) for some in factors]
        if wants_b:
            for db, dy, part, span, factor in zip(dbs, own, s, spans, scale, strict=True):
                width = (span.stop - span.start) // len(block.adapters)
                scaled = block.split(part[block.places, :width]).to(dtype) * factor
                # the long axis of a skinny product goes last: MKL takes a tenth of the time for (sᵀ dy)ᵀ
                product = torch.bmm(scaled.mT, dy).mT
                db[product.shape[1] * span.start : product.shape[1] * span.stop].view_as(product).copy_(product)
        if wants_a or needs_dx:
            ds = [  # [adapters, rank, tokens of each]
                masks.on_rank(block, torch.bmm(block.stack(up, dtype).mT, dy.mT).mul_(factor).mT).mT
                for up, dy, factor in zip(ups, own, scale, strict=True)
            ]
            joint = ds[0] if len(ds) == 1 else torch.cat(ds, dim=1)
            mask = masks.of(block, own[0], in_features)
            if wants_a:
                assert x_rows is not None
                dropped = block.split(x_rows[block.tokens]).to(dtype)
                product = torch.bmm(joint, dropped if mask is None else mask * dropped)
                for da, span, part in zip(das, spans, product.split(block.ranks, dim=1), strict=True):
                    da[span].view_as(part).copy_(part)
            if needs_dx:
                _add_low_rank(block.split(dx[block.tokens]), joint.mT, block.below(downs, dx.dtype), mask)
    dx = layout.put_back(dx).view(*dys[0].shape[:-1], in_features) if needs_dx else dx
    return dx, *das, *dbs


def joined_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, ranks: Sequence[int],
    scales: Sequence[float], order: Tensor, offsets: Tensor, dtype: torch.dtype,
) -> tuple[Tensor]:  # fmt: skip
    """y = x Wᵀ + bias + scale_l · (x A_lᵀ) B_lᵀ in `dtype`; A_l and B_l are parts of a and b."""
    layout, starts = _Layout.of(order, offsets, x), [0, *accumulate(ranks)]
    rows, a, b = layout.gathered(x.to(dtype)), a.to(dtype), b.to(dtype)
    y = F.linear(rows, weight.to(dtype), None if bias is None else bias.to(dtype))
    for block in layout.blocks([((rank,),) for rank in ranks]):
        own = slice(starts[block.adapters.start], starts[block.adapters.stop])
        down = torch.bmm(block.split(rows[block.tokens]), block.split(a[own]).mT)
        up = b[:, own].unflatten(1, (len(block.adapters), -1)).transpose(0, 1)  # [adapters, out_features, rank]
        _add_product(block.split(y[block.tokens]), down, up.mT, block.scales(scales, None, down))
    return (in_shape_of(x, layout.put_back(y)),)


def packed_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, a_bits: Sequence[Tensor], a_levels: Sequence[Tensor],
    b_bits: Sequence[Tensor], b_levels: Sequence[Tensor], ranks: Sequence[int], bits: Sequence[int],
    scales: Sequence[float], order: Tensor, offsets: Tensor, dtype: torch.dtype,
) -> tuple[Tensor]:  # fmt: skip
    """y = x Wᵀ + bias + scale_l · (x Â_lᵀ) B̂_lᵀ in `dtype`; the factors of an adapter without tokens stay packed."""
    layout = _Layout.of(order, offsets, x)
    rows = layout.gathered(x.to(dtype))
    y = F.linear(rows, weight.to(dtype), None if bias is None else bias.to(dtype))
    for i, tokens, _ in layout.parts:
        a = unpacked(a_bits[i], a_levels[i], (ranks[i], weight.shape[1]), bits[i]).to(dtype)
        b = unpacked(b_bits[i], b_levels[i], (weight.shape[0], ranks[i]), bits[i]).to(dtype)
        y[tokens].addmm_(rows[tokens] @ a.T, b.T, alpha=scales[i])
    return (in_shape_of(x, layout.put_back(y)),)


def widest(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype that holds the numbers of all of them."""
    return reduce(torch.promote_types, {t.dtype for t in tensors})


def by_projection(flat: Sequence[_T], projections: int) -> list[Sequence[_T]]:
    """The equally long parts of a list."""
    size = len(flat) // projections
    return [flat[i * size : (i + 1) * size] for i in range(projections)]


def _kinds(a: Sequence[Sequence[Tensor]], b: Sequence[Sequence[Tensor]]) -> list[tuple[Any, ...]]:
    """Of each adapter its ranks in all projections, and the dtypes."""
    return [
        (tuple(len(t) for t in down), *(t.dtype for t in down), *(t.dtype for t in up))
        for down, up in zip(zip(*a, strict=True), zip(*b, strict=True), strict=True)
    ]


def base_gradient(rows: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Σ dy_i W_i."""
    first, *others = zip(rows, weights, strict=True)
    dx = first[0] @ first[1].to(first[0].dtype)
    for dy, weight in others:
        dx.addmm_(dy, weight.to(dy.dtype))
    return dx


def _add_product(y: Tensor, left: Tensor, right: Tensor, scale: float | Tensor) -> None:
    """y += scale · left right, for each adapter."""
    if isinstance(scale, Tensor):
        y.baddbmm_(left * scale, right)
    else:
        y.baddbmm_(left, right, alpha=scale)


def _add_low_rank(dx: Tensor, ds: Tensor, a: Tensor, mask: Tensor | None) -> None:
    """dx += m ⊙ (ds A); the mask is used up."""
    ds = ds.to(dx.dtype)
    if mask is None:
        dx.baddbmm_(ds, a)
    else:
        dx += mask.to(dx.dtype).mul_(ds @ a)


class _Part(NamedTuple):
    """The tokens of one adapter that has some."""

    adapter: int
    tokens: slice
    """Where they lie in x, or in its gathered copy."""
    places: slice
    """Where they lie in the order of the adapters."""

    @property
    def size(self) -> int:
        return self.tokens.stop - self.tokens.start


class _Block(NamedTuple):
    """Adapters of one rank and dtype whose tokens are as many and lie one after the other: one batched product."""

    adapters: range
    ranks: tuple[int, ...]
    """In each projection."""
    tokens: slice
    places: slice

    def split(self, rows: Tensor) -> Tensor:
        """[adapters, tokens of each, features], a view of the block's rows."""
        return rows.unflatten(0, (len(self.adapters), -1))

    def stack(self, factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """[adapters, …] of the block's factors; a view of the only one."""
        own = factors[self.adapters.start : self.adapters.stop]
        return (own[0].unsqueeze(0) if len(own) == 1 else torch.stack(tuple(own))).to(dtype)

    def below(self, factors: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> Tensor:
        """[adapters, Σ rank, in_features] of the block's down projections, those of one adapter below each other."""
        if len(factors) == 1:
            return self.stack(factors[0], dtype)
        return self.split(torch.cat([own[i] for i in self.adapters for own in factors])).to(dtype)

    def scales(self, scales: Sequence[float], masks: "_Masks | None", like: Tensor) -> float | Tensor:
        """scale_l/q_l, one number where all have the same, else [adapters, 1, 1] on the device of `like`."""
        found = [scales[i] / (masks.mean(i) if masks else 1.0) for i in self.adapters]
        return found[0] if len(set(found)) == 1 else like.new_tensor(found).view(-1, 1, 1)


class _Layout(NamedTuple):
    """Where the tokens of every adapter lie."""

    parts: list[_Part]
    gather: Tensor | None
    """The tokens in the order of the adapters, int64; None where views do."""

    @classmethod
    def of(cls, order: Tensor, offsets: Tensor, x: Tensor) -> "_Layout":
        per_row = x.numel() // (x.shape[-1] * len(order)) if x.numel() else 0
        rows, bounds = order.tolist(), offsets.tolist()
        runs = [(i, first, stop) for i, (first, stop) in enumerate(pairwise(bounds)) if first < stop and per_row]
        # rows of one adapter are in ascending order
        beside = all(rows[stop - 1] - rows[first] == stop - 1 - first for _, first, stop in runs)
        parts: list[_Part] = []
        for i, first, stop in runs:
            places = slice(first * per_row, stop * per_row)
            tokens = slice(rows[first] * per_row, (rows[stop - 1] + 1) * per_row) if beside else places
            parts.append(_Part(i, tokens, places))
        if beside:
            return cls(parts, None)
        return cls(parts, (order.unsqueeze(1) * per_row + torch.arange(per_row, device=order.device)).flatten())

    def blocks(self, kinds: Sequence[tuple[Any, ...]]) -> Iterator[_Block]:
        """The parts, as many at a time as can be.

        Args:
            kinds: of each adapter its ranks, and what else must be equal.
        """
        block, last = None, None
        for part in self.parts:
            i = part.adapter
            kind = *kinds[i], part.size
            if block is not None and last == (kind, i - 1, part.tokens.start):
                block = block._replace(
                    adapters=range(block.adapters.start, i + 1),
                    tokens=slice(block.tokens.start, part.tokens.stop),
                    places=slice(block.places.start, part.places.stop),
                )
            else:
                if block is not None:
                    yield block
                block = _Block(range(i, i + 1), kinds[i][0], part.tokens, part.places)
            last = kind, i, part.tokens.stop
        if block is not None:
            yield block

    def gathered(self, x: Tensor) -> Tensor:
        """The tokens of x, [tokens, features], where `tokens` of the parts says."""
        rows = x.reshape(-1, x.shape[-1])
        return rows if self.gather is None else rows.index_select(0, self.gather)

    def put_back(self, rows: Tensor) -> Tensor:
        """The inverse of `gathered`."""
        return rows if self.gather is None else torch.empty_like(rows).index_copy_(0, self.gather, rows)


class _Masks:
    """The masks of the adapters' tokens, as `lora_linear` would make each for its tokens alone."""

    def __init__(
        self,
        dropout_p: Sequence[float],
        seeds: Tensor | None,
        token_index: Tensor | None,
        rank_mask: Tensor | None,
        layout: _Layout,
    ) -> None:
        self._masks = [
            mask_of(p, seeds[i : i + 1]) if p and seeds is not None else None for i, p in enumerate(dropout_p)
        ]
        if token_index is not None and layout.gather is not None:
            token_index = token_index.index_select(0, layout.gather)
        self._token_index = token_index
        self._rank_mask = None if rank_mask is None else layout.gathered(rank_mask)

    def on_rank(self, block: _Block, s: Tensor) -> Tensor:
        """s ⊙ n, [adapters, tokens of each, rank]."""
        if self._rank_mask is None:
            return s
        return s * block.split(self._rank_mask[block.tokens, : s.shape[2]]).to(s.dtype)

    def mean(self, adapter: int) -> float:
        """q_l, 1 where nothing is dropped."""
        mask = self._masks[adapter]
        return mask.keep_probability if mask else 1.0

    def of(self, block: _Block, rows: Tensor, features: int | None = None) -> Tensor | None:
        """m_l, [adapters, tokens of each, features], dtype of rows; None where none of the block drops anything."""
        if all(self._masks[i] is None for i in block.adapters):
            return None
        each, width = rows.shape[1], rows.shape[2] if features is None else features
        found: list[Tensor] = []
        for number, i in enumerate(block.adapters):
            mask, first = self._masks[i], block.tokens.start + number * each
            if mask is None:
                found.append(rows.new_ones(each, width))
            elif self._token_index is None:
                found.append(keep_mask(each, width, mask, rows.dtype))
            else:
                index = self._token_index[first : first + each].long()
                found.append(keep_mask(int(index.max()) + 1, width, mask, rows.dtype).index_select(0, index))
        return found[0].unsqueeze(0) if len(found) == 1 else torch.stack(found)
