# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# Triton types a kernel's pointers and constants as what they are inside of it, not as what a launch takes
"""Where the tokens of each adapter are, for the host and for a program.

A tile holds tokens of one adapter, and finds out by itself of which: the host never learns how many rows an adapter
has, and launches as many programs as there can be tiles. Those that find no tokens end at once.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from petune.kernels.dropout import mask_of


@triton.jit
def tile_of(tile, offsets_ptr, adapters, per_row, BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr):
    """(the adapter of a tile, which of its tiles it is); the adapter is past the last where no tokens are left."""
    n = tl.arange(0, BLOCK_L)
    starts = tl.load(offsets_ptr + n, mask=n < adapters, other=0)
    stops = tl.load(offsets_ptr + n + 1, mask=n < adapters, other=0)
    tiles = ((stops - starts).to(tl.int32) * per_row + BLOCK_T - 1) // BLOCK_T
    adapter = tl.sum((tl.cumsum(tiles, axis=0) <= tile).to(tl.int32), axis=0)  # all of whose tiles come before
    return adapter, tile - tl.sum(tl.where(n < adapter, tiles, 0), axis=0)


@triton.jit
def places_of(offsets_ptr, adapter, per_row):
    """(first, past the last) place of an adapter's tokens in the order, int32."""
    start, stop = tl.load(offsets_ptr + adapter), tl.load(offsets_ptr + adapter + 1)
    return start.to(tl.int32) * per_row, stop.to(tl.int32) * per_row


@triton.jit
def tokens_at(order_ptr, p, stop, per_row):
    """The tokens at places p, int64."""
    return tl.load(order_ptr + p // per_row, mask=p < stop, other=0) * per_row + p % per_row


class Layout(NamedTuple):
    """Where the tokens and the factors of each adapter are."""

    order: Tensor
    """Rows in the order of their adapters, int64, [rows]."""
    offsets: Tensor
    """Where those of each begin in it, int64, [adapters + 1]; rows before the first and after the last take none."""
    ranks: tuple[int, ...]
    """Of each adapter."""
    starts: Tensor
    """Where those of each begin among all, int64, [adapters + 1]."""

    @classmethod
    def of(cls, order: Tensor, offsets: Tensor, ranks: tuple[int, ...]) -> "Layout":
        """The layout of factors that lie one after the other."""
        starts = tuple(accumulate(ranks, initial=0))
        return cls(order, offsets, ranks, table(starts, torch.int64, order.device))

    @property
    def adapters(self) -> int:
        """Whether or not they have rows."""
        return len(self.ranks)

    @property
    def block(self) -> int:
        """The block that holds one number of each adapter."""
        return triton.next_power_of_2(self.adapters)

    @property
    def largest(self) -> int:
        """Rank."""
        return max(self.ranks)

    @property
    def most(self) -> int:
        """Adapters that may have rows."""
        return min(self.adapters, len(self.order))

    def per_row(self, tokens: int) -> int:
        """Tokens of a row."""
        return tokens // len(self.order)

    def tiles(self, tokens: int, block: int) -> int:
        """Tiles that the tokens can take: every adapter that has rows may leave one that is not full."""
        return tokens // block + self.most


class Dropped(NamedTuple):
    """The masks of all adapters."""

    seeds: Tensor
    """int64, [adapters]."""
    thresholds: Tensor
    """int32, [adapters]; 0 drops nothing."""
    token_index: Tensor | None
    """The place of each token of x among those of its adapter, [tokens]; None counts them."""

    @classmethod
    def of(cls, dropout_p: Sequence[float], seeds: Tensor | None, token_index: Tensor | None) -> "Dropped | None":
        """The masks of these seeds; None where there are none."""
        if seeds is None:
            return None
        masks = (mask_of(p, seeds) for p in dropout_p)
        thresholds = tuple(mask.threshold for mask in masks if mask is not None)
        return cls(seeds, table(thresholds, torch.int32, seeds.device), token_index)


@lru_cache(maxsize=1024)
def table(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers that stay the same from call to call, copied to the device once: before a CUDA graph records them."""
    return torch.tensor(values, dtype=dtype, device=device)
