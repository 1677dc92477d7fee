"""Dropout of a joint batch: each run's rows drop what they drop alone."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from petune.many.calls import Span, part_of


class DropoutByRun(TorchFunctionMode):
    """Inside, `F.dropout`, and so `nn.Dropout`, and the dropout of attention draw for each run by itself

    A run's own random generators draw for its rows, in the shape that they have alone, without the padding that only
    its neighbours need: on a CPU, bit for bit what they draw alone. Tensors that are not made of the rows of the
    batch are left as they are.

    Args:
        parts: (run, span) of the joint call, in the order of their rows.
    """

    def __init__(self, parts: Sequence[tuple[Any, Span]]) -> None:
        super().__init__()
        self.parts = parts
        self._rows = parts[-1][1].stop
        self._passes = False
        self._own: dict[Any, Callable[..., Tensor]] = {
            F.dropout: self._dropout,
            F.scaled_dot_product_attention: self._attention,
        }

    @contextmanager
    def passing(self) -> Generator[None]:
        """Inside, nothing is taken apart: the rows of one run alone are computed, under its own generators."""
        self._passes = True
        try:
            yield
        finally:
            self._passes = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if not self._passes:
            func = self._own.get(func, func)
        return func(*args, **(kwargs or {}))

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0.0 or not input.dim() or len(input) % self._rows:
            return F.dropout(input, p, training, inplace)
        return input * self._noise(input, p)

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        attention: Callable[..., Tensor] = F.scaled_dot_product_attention
        if dropout_p == 0.0 or len(query) != self._rows:
            return attention(query, key, value, attn_mask, dropout_p, is_causal, **kwargs)
        if query.is_cpu:  # where dropout has no fused kernel, and keeps the weights of attention anyway
            noise = self._noise(query.new_empty(()).expand(*query.shape[:-1], key.shape[-2]), dropout_p)
            return _attention(query, key, value, noise, attn_mask, is_causal, **kwargs)
        pieces: list[Tensor] = []
        for run, span in self.parts:
            whole = query[span.start : span.stop]
            # heads are the second axis here, and the sequence the third
            own = [_cut(tensor[span.start : span.stop], span, 2) for tensor in (query, key, value)]
            mask = attn_mask
            if mask is not None:
                mask = mask[span.start : span.stop] if len(mask) == self._rows else mask
                mask = _cut(_cut(mask, span, mask.dim() - 1), span, mask.dim() - 2)
            with run.draws():
                pieces.append(_padded_like(attention(*own, mask, dropout_p, is_causal, **kwargs), whole))
        return torch.cat(pieces)

    def _noise(self, like: Tensor, p: float) -> Tensor:
        """What dropout multiplies with: 0 or 1 / (1 − p), drawn by each run for its own rows; in shape and dtype of
        `like`."""
        each = len(like) // self._rows
        if like.is_cpu:
            noise = like.new_zeros(like.shape)
            for run, span in self.parts:
                part_of(noise[each * span.start : each * span.stop], span).bernoulli_(1 - p, generator=run.generator)
            return noise.div_(1 - p)
        pieces: list[Tensor] = []
        for run, span in self.parts:
            whole = like[each * span.start : each * span.stop]
            ones = like.new_ones(part_of(whole, span).shape)
            with run.draws():
                pieces.append(_padded_like(F.dropout(ones, p), whole))
        return torch.cat(pieces)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, noise: Tensor, attn_mask: Tensor | None, is_causal: bool,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """(softmax(Q Kᵀ · scale + mask) ⊙ noise) V; arguments as those of torch's attention."""
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], dim=-3) for t in (key, value))
    weights: Tensor = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.mT
    if is_causal:
        attn_mask = weights.new_ones(weights.shape[-2:], dtype=torch.bool).tril_()
    if attn_mask is not None:
        least = torch.finfo(weights.dtype).min  # not -inf: a token that may see nothing must not become NaN
        is_bool = attn_mask.dtype == torch.bool
        added = weights.new_zeros(attn_mask.shape).masked_fill_(~attn_mask, least) if is_bool else attn_mask
        weights = weights + added.clamp(min=least)
    return (weights.softmax(-1) * noise) @ value


def _cut(tensor: Tensor, span: Span, axis: int) -> Tensor:
    if span.length == span.padded or tensor.shape[axis] != span.padded:
        return tensor
    return tensor.narrow(axis, 0, span.length)


def _padded_like(tensor: Tensor, whole: Tensor) -> Tensor:
    """`tensor` with zeros behind it on every axis that is shorter than in `whole`; the last axis may differ."""
    missing = [large - small for large, small in zip(whole.shape[1:-1], tensor.shape[1:-1], strict=True)]
    last = whole.shape[-1] - tensor.shape[-1] if any(missing) and whole.shape[-1] == whole.shape[-2] else 0
    if not any(missing) and not last:
        return tensor
    return F.pad(tensor, [side for amount in (last, *reversed(missing)) for side in (0, amount)])
