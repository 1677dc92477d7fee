"""`Flow`: how far the side network has come in the forward that runs, and what a side block gets to see of it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from petune.frozen_block import Call


@dataclass(frozen=True)
class Place:
    """Where a block stands."""

    chain: int
    """0, or 1 for a decoder that follows an encoder."""
    position: int
    """In its chain."""
    blocks: int
    """Of its chain."""
    rung: int | None
    """Number of its rung in the chain; None where the block is not read."""
    is_causal: bool
    """Whether its attention is, where no mask says so."""
    reads_memory: bool
    """Whether it is a decoder's, behind an encoder."""
    fuses: bool
    """Whether the ladder's output joins the hidden states at the end of this chain."""

    @property
    def is_first(self) -> bool:
        return self.position == 0

    @property
    def is_last(self) -> bool:
        return self.position == self.blocks - 1


class Flow:
    """State of the side network between the blocks of one forward."""

    def __init__(self) -> None:
        self.s: Tensor | None = None
        """Output of the last rung, [batch, tokens, width]."""
        self._awaited: dict[int, int] = {}  # chain -> position of the block that has to run next
        self._grid: tuple[int, int] | None = None
        self._leaving: Tensor | None = None  # the next `_memory`, until the encoder has come to its end
        self._encoded: Tensor | None = None  # what the frozen encoder gave, by which `memory` is known
        self._memory: Tensor | None = None
        self._spread: tuple[Tensor, Tensor] | None = None  # the same for generate's beams

    def begin(self) -> None:
        """Forget a forward that broke off."""
        self.s, self._awaited, self._leaving = None, {}, None

    def start(self, place: Place, s: Tensor) -> None:
        """Enter a chain with its first block."""
        self.s = s
        self._awaited = {place.chain: 1}
        self._grid = None

    def passed(self, place: Place) -> None:
        """Note that a block has run.

        Raises:
            RuntimeError: another block was to run before it.
        """
        awaited = self._awaited.get(place.chain, 0)
        if awaited != place.position:
            raise RuntimeError(
                f"block {place.position} ran where the side network awaited block {awaited}; it reads the blocks in "
                "their order, each once a forward: run the whole model, without skipping layers."
            )
        self._awaited[place.chain] = place.position + 1

    def leave(self, place: Place) -> None:
        """Leave a chain with its last block."""
        self.s = None
        del self._awaited[place.chain]

    def check_finished(self) -> None:
        """Refuse a forward that ended in the middle of a chain.

        Raises:
            RuntimeError: it did, so that the side network's output went nowhere.
        """
        if self._awaited:
            awaited = next(iter(self._awaited.values()))
            self.begin()
            raise RuntimeError(
                f"the model returned before block {awaited}, so the side network's output went nowhere; run all of "
                "its blocks, or turn the adapter off with disable_adapter()."
            )

    def reset(self) -> None:
        """Drop everything, as it belongs to another adapter."""
        self.__init__()

    # --- between encoder and decoder ---

    def encoded(self, hidden_states: Tensor) -> None:
        """Tell what the frozen encoder gave, at the end of its forward."""
        self._encoded, self._memory, self._leaving, self._spread = hidden_states, self._leaving, None, None

    def remember(self, memory: Tensor) -> None:
        """Keep the output of the encoder's side network for the decoder's."""
        self._leaving = memory

    def memory_for(self, hidden_states: Tensor | None) -> Tensor:
        """What the side network of the encoder gave beside these hidden states.

        Args:
            hidden_states: what the decoder attends to; the encoder's, or those repeated for beams.

        Raises:
            RuntimeError: they come from elsewhere.
        """
        if self._spread is not None and self._spread[0] is hidden_states:
            return self._spread[1]
        memory, encoded = self._memory, self._encoded
        if memory is not None and encoded is not None and hidden_states is not None:
            times, rest = divmod(len(hidden_states), len(encoded))
            alike = not rest and hidden_states.shape[1:] == encoded.shape[1:]
            if alike and (hidden_states is encoded or torch.equal(hidden_states[::times], encoded)):
                spread = memory if times == 1 else memory.repeat_interleave(times, dim=0)
                self._spread = (hidden_states, spread)
                return spread
        raise RuntimeError(
            "the decoder was given encoder outputs that are not those of the last forward of the encoder with this "
            "adapter on, so there is no side network's output beside them; pass the inputs, or run the encoder anew."
        )

    # --- where tokens are merged ---

    def fit(self, s: Tensor, call: Call) -> Tensor:
        """s with as many tokens as the block has: hierarchical models (Swin) merge patches between their stages."""
        grid = call.named.get("input_dimensions")
        if grid is None:
            return s
        before, self._grid = self._grid, (int(grid[0]), int(grid[1]))
        if before in (None, self._grid):
            return s
        image = s.transpose(1, 2).unflatten(-1, before)  # pyright: ignore[reportArgumentType]
        return F.adaptive_avg_pool2d(image, self._grid).flatten(2).transpose(1, 2)

    def __getstate__(self) -> dict[str, Any]:
        return Flow().__dict__

    def __deepcopy__(self, memo: dict[int, Any]) -> "Flow":
        found = memo[id(self)] = Flow()  # a tensor with a graph behind it cannot be copied
        return found


class Step:
    """What a side block sees of the call of the block that it reads (`rung.Context`)."""

    def __init__(self, place: Place, call: Call, flow: Flow) -> None:
        self.place, self.call, self.flow = place, call, flow

    def self_mask(self, queries: int, keys: int) -> tuple[Tensor | None, bool]:
        """The block's own mask, or where it has none whether it is causal."""
        mask = self.call.named.get("attention_mask")
        if mask is None:
            return _causal(queries, keys, self.call.x.device) if self.place.is_causal else (None, False)
        if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
            raise ValueError(
                f"the side network cannot read an attention mask that is a {type(mask).__name__}; load the model with "
                "attn_implementation='sdpa'."
            )
        if mask.dim() == 4:
            return mask[..., :keys], False
        seen = mask[:, None, None, -keys:].bool()  # flash attention's: which tokens are none of the padding
        if self.place.is_causal and queries > 1:
            causal = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril(keys - queries)
            seen = seen & causal
        return seen, False

    def cached(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The side network's keys and values are further layers of the model's own cache, which so reorders, crops
        and resets them with the rest."""
        cache = self.call.named.get("past_key_values")
        cache = getattr(cache, "self_attention_cache", cache)
        if not isinstance(cache, Cache):
            return keys, values
        assert self.place.rung is not None
        index = self.place.blocks + self.place.rung
        layer = cache.layers[index] if index < len(cache.layers) else None
        beside: Any = cache.layers[self.place.position]
        if layer is None or isinstance(layer, DynamicLayer):  # a static one would make every step wait for its device
            before = 0 if layer is None else layer.get_seq_length()
            after = int(beside.get_seq_length()) - keys.shape[2]
            if before != after:
                raise ValueError(
                    f"the cache holds {after} tokens of the model, but {before} of the side network; fill it with the "
                    "adapter on."
                )
        while len(cache.layers) <= index:
            cache.layers.append(_alike(beside))
        return cache.update(keys, values, index)

    @property
    def memory(self) -> Tensor | None:
        """The side network's output beside the encoder states that the block attends to."""
        return self.flow.memory_for(self.call.tensor("encoder_hidden_states")) if self.place.reads_memory else None

    @property
    def memory_mask(self) -> Tensor | None:
        """Mask of the block's attention to the encoder."""
        mask = self.call.tensor("encoder_attention_mask")
        return mask[:, None, None, :].bool() if mask is not None and mask.dim() == 2 else mask


def _causal(queries: int, keys: int, device: torch.device) -> tuple[Tensor | None, bool]:
    if queries == 1:
        return None, False
    if queries == keys:
        return None, True
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries), False


def _alike(layer: Any) -> Any:
    """An empty cache layer that keeps as many tokens as this one, so that one mask fits both."""
    if isinstance(layer, StaticSlidingWindowLayer):
        return StaticSlidingWindowLayer(layer.max_cache_len, sliding_window=layer.max_cache_len)
    if isinstance(layer, StaticLayer):
        return StaticLayer(layer.max_cache_len)
    if isinstance(layer, DynamicSlidingWindowLayer):
        alike = DynamicSlidingWindowLayer(layer.sliding_window)
        alike.record_past = layer.record_past
        return alike
    return DynamicLayer()
