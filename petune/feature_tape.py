"""`Recording` and `Replay`: the hidden states of one batch on their way into a store of rows, and out of it."""

from collections.abc import Iterator, Sequence, Set
from itertools import groupby

import torch
from torch import Tensor

from petune.feature_rows import BatchRows, Spans
from petune.feature_store import Part


class Recording:
    """What the blocks give for a batch, as it is kept (a `petune.frozen_block.FeatureTape`).

    Args:
        blocks: indices of those that are kept.
        dtype: that they are kept in; None for what they give.
    """

    def __init__(self, blocks: Set[int], dtype: torch.dtype | None) -> None:
        self.hidden: dict[int, Tensor] = {}
        """By block [batch, tokens, width], on the CPU."""
        self._blocks, self._dtype = blocks, dtype
        self._given: dict[int, torch.dtype] = {}

    @torch.compiler.disable
    def replay(self, index: int, x: Tensor) -> None:
        """None: the block is to run."""

    @torch.compiler.disable
    def record(self, index: int, y: Tensor) -> None:
        """Copy a block's hidden states.

        Raises:
            ValueError: they are trained through, or do not fit into the dtype.
        """
        if index not in self._blocks:
            return
        _check_fixed(index, y)
        kept = y.detach().to("cpu", self._dtype or y.dtype, copy=True)
        if self._dtype == torch.float16 and torch.isinf(kept).any():
            raise ValueError(
                f"block {index} gives values up to {y.abs().max().item():,.0f}, and float16 ends at 65,504; keep them "
                "with dtype=torch.bfloat16."
            )
        self.hidden[index], self._given[index] = kept, y.dtype

    def parts(self, batch: BatchRows, decoder: Set[int]) -> tuple[Part, ...]:
        """What a row is made of.

        Args:
            batch: the rows.
            decoder: indices of the blocks of a decoder behind an encoder.

        Raises:
            ValueError: a block gives something else than the rows and tokens that went in.
        """
        for index, y in sorted(self.hidden.items()):
            spans = batch.decoder if index in decoder else batch.encoder
            wanted = (len(batch.digests), y.shape[1] if spans is None else spans.tokens)
            if y.dim() != 3 or y.shape[:2] != wanted:
                raise ValueError(
                    f"block {index} gives hidden states {tuple(y.shape)} for {wanted[0]} rows of {wanted[1]} tokens, "
                    "so that rows cannot be told apart in them; train this model without a feature cache."
                )

        def kind(index: int) -> tuple[bool, torch.Size, torch.dtype, torch.dtype]:
            y = self.hidden[index]
            return index in decoder, y.shape[1:], self._given[index], y.dtype

        return tuple(
            Part(tuple(blocks), shape[1], is_decoder, _say(given), _say(kept))
            for (is_decoder, shape, given, kept), blocks in groupby(sorted(self.hidden), kind)
        )

    def cut(self, parts: Sequence[Part], batch: BatchRows, rows: Sequence[int]) -> Iterator[tuple[Tensor, ...]]:
        """The tensors of some rows of the batch, [blocks, tokens, width] for each part, with storage of their own."""
        stacks = [torch.stack([self.hidden[index] for index in part.blocks]) for part in parts]
        spans = [batch.decoder if part.is_decoder else batch.encoder for part in parts]
        for row in rows:
            yield tuple(
                _cut(stack[:, row], one, row).clone(memory_format=torch.contiguous_format)
                for stack, one in zip(stacks, spans, strict=True)
            )


class Replay:
    """What was kept of the blocks, for a batch (a `petune.frozen_block.FeatureTape`).

    Args:
        parts: what the rows are made of.
        rows: of each row in the batch its tensors, [blocks, tokens, width] for each part.
        batch: the rows; where one is padded the hidden states are zero.
    """

    def __init__(self, parts: Sequence[Part], rows: Sequence[Sequence[Tensor]], batch: BatchRows) -> None:
        self._hidden: dict[int, tuple[Tensor, torch.dtype]] = {}
        for part, tensors in zip(parts, zip(*rows, strict=True), strict=True):
            together = _padded(tensors, batch.decoder if part.is_decoder else batch.encoder)
            given = getattr(torch, part.given)
            self._hidden.update({index: (together[i], given) for i, index in enumerate(part.blocks)})

    @torch.compiler.disable
    def replay(self, index: int, x: Tensor) -> Tensor:
        """What block `index` gave, or x where nothing was kept because nobody reads it.

        Raises:
            ValueError: the block would be trained through.
        """
        _check_fixed(index, x)
        if index not in self._hidden:
            return x
        hidden, dtype = self._hidden[index]
        return hidden.to(x.device, dtype)

    def record(self, index: int, y: Tensor) -> None:
        """Nothing: no block runs."""


def difference(ours: Sequence[Sequence[Tensor]], theirs: Sequence[Sequence[Tensor]]) -> float:
    """‖ours − theirs‖ / ‖ours‖ over all tensors."""
    pairs = [pair for rows in zip(ours, theirs, strict=True) for pair in zip(*rows, strict=True)]
    errors = sum((one.double() - other.double()).square().sum().item() for one, other in pairs)
    return (errors / max(sum(one.double().square().sum().item() for one, _ in pairs), 1e-30)) ** 0.5


def _padded(tensors: Sequence[Tensor], spans: Spans | None) -> Tensor:
    """[blocks, batch, tokens, width] of rows [blocks, tokens, width]."""
    if spans is None or all(bounds == (0, spans.tokens) for bounds in spans.bounds):
        return torch.stack(list(tensors), dim=1)
    blocks, _, width = tensors[0].shape
    together = tensors[0].new_zeros(blocks, len(tensors), spans.tokens, width)
    for row, (tensor, (start, end)) in enumerate(zip(tensors, spans.bounds, strict=True)):
        together[:, row, start:end] = tensor
    return together


def _cut(hidden: Tensor, spans: Spans | None, row: int) -> Tensor:
    if spans is None:
        return hidden
    start, end = spans.bounds[row]
    return hidden[:, start:end]


def _check_fixed(index: int, hidden: Tensor) -> None:
    if hidden.requires_grad:
        raise ValueError(
            f"the hidden states around block {index} require grad, so they change from step to step and cannot be "
            "kept; freeze what stands before the blocks, and do not call enable_input_require_grads()."
        )


def _say(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
