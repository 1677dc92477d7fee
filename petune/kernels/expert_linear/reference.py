"""The specification of `expert_linear` in plain torch: every kernel is tested against these functions."""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# One sum of all products takes 0.3 to 0.9 of the time of a sum by each expert, two threads and one, while the buffer
# stays in a cache; 12 million elements take 1.5 to 2 times as long
BUFFER_ELEMENTS = 2**22


class Assignment(NamedTuple):
    """The (token, expert) pairs of a batch, sorted by expert and then by token."""

    tokens: Tensor
    """The token of every pair, int64, [tokens · k]."""
    offsets: Tensor
    """Where the pairs of each expert begin, int64, [experts + 1]; the last is tokens · k."""
    places: Tensor
    """Where the pairs of each token lie, int64, [tokens, k]."""

    @property
    def k(self) -> int:
        """Experts of a token."""
        return self.places.shape[1]


def assign(chosen: Tensor, num_experts: int) -> Assignment:
    """The pairs sorted by expert; nothing waits for the device.

    Args:
        chosen: the experts of each token, distinct and ascending, 0..num_experts - 1, int64, [tokens, k].
        num_experts: 1 or more.

    Raises:
        ValueError: chosen is not such a matrix.
    """
    if chosen.dim() != 2 or chosen.dtype != torch.int64 or not 1 <= chosen.shape[1] <= num_experts:
        raise ValueError(
            f"assign: chosen {tuple(chosen.shape)} {chosen.dtype} does not give each token some of {num_experts} "
            f"experts; pass int64 [tokens, k], k in 1..{num_experts}."
        )
    tokens, k = chosen.shape
    expert, order = chosen.flatten().sort(stable=True)
    offsets = torch.searchsorted(expert, torch.arange(num_experts + 1, device=chosen.device))
    positions = torch.arange(tokens * k, device=chosen.device)
    return Assignment(order // k, offsets, torch.empty_like(order).scatter_(0, order, positions).view(tokens, k))


def expert_in(
    x: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, offsets: Tensor, dtype: torch.dtype
) -> tuple[Tensor]:
    """h[p] = x[token of p] weight[expert of p]ᵀ + bias[expert of p] in `dtype`."""
    x, weight = x.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    h = x.new_empty(len(tokens), weight.shape[1])
    for expert, pairs in _used(offsets):
        # an expert of all tokens has them in order
        rows = x if pairs.stop - pairs.start == len(x) else x.index_select(0, tokens[pairs])
        if bias is None:
            torch.mm(rows, weight[expert].T, out=h[pairs])
        else:
            torch.addmm(bias[expert], rows, weight[expert].T, out=h[pairs])
    return (h,)


def expert_out(
    h: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, offsets: Tensor, places: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor]:  # fmt: skip
    """y[t] = bias + Σ_{p of t} h[p] weight[expert of p] in `dtype`: of products rounded to it, summed in fp32."""
    h, weight = h.to(dtype), weight.to(dtype)
    shape, total = (len(tokens), weight.shape[2]), torch.promote_types(dtype, torch.float32)
    if shape[0] * shape[1] <= BUFFER_ELEMENTS:
        products = h.new_empty(shape, dtype=total)
        for expert, pairs in _used(offsets):
            products[pairs] = torch.mm(h[pairs], weight[expert])
        y = F.embedding_bag(places, products, mode="sum")
    else:
        y = h.new_zeros(len(places), shape[1], dtype=total)
        for expert, pairs in _used(offsets):
            y.index_add_(0, tokens[pairs], torch.mm(h[pairs], weight[expert]).to(total))
    if bias is not None:
        y += bias
    return (y.to(dtype),)


def _used(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """The experts that have pairs, in order, each with where those lie."""
    bounds: list[int] = offsets.tolist()
    for expert, (start, stop) in enumerate(pairwise(bounds)):
        if start < stop:
            yield expert, slice(start, stop)
