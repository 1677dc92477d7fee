"""Whose rows are where in a joint call, and what is drawn for them."""

from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from petune.kernels.grouped_lora import RowGroups
from petune.low_rank import rank_mask
from petune.many.calls import Span, part_of
from petune.many.dropout import DropoutByRun


class Run(Protocol):
    """Whose rows they are."""

    name: str

    @property
    def generator(self) -> torch.Generator:
        """Torch's, on the CPU, to draw from at once."""
        ...

    def generators(self) -> AbstractContextManager[None]:
        """Inside, what is drawn comes from the run's own random generators."""
        ...

    def draws(self) -> AbstractContextManager[None]:
        """As `generators`, of torch's alone."""
        ...


class Part(NamedTuple):
    """The rows of one run in a joint call."""

    run: Hashable
    span: Span


class Plan:
    """Whose rows are where, in one joint call, and what was drawn for their dropout.

    A call that activation checkpointing repeats in its backward is given the same seeds.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        self.rows = parts[-1].span.stop
        self.dropout = DropoutByRun(self.parts)
        self._groups: dict[tuple[Hashable, ...], RowGroups] = {}
        self._seeds: dict[tuple[Hashable, int], Tensor] = {}
        self._indices: dict[tuple[int, torch.device], Tensor | None] = {}

    def groups(self, runs: tuple[Hashable, ...]) -> RowGroups:
        """The rows of these runs as 0, 1, …; those of the others have no adapter."""
        if runs not in self._groups:
            order = {run: index for index, run in enumerate(runs)}
            ids = [order.get(part.run, -1) for part in self.parts for _ in range(part.span.start, part.span.stop)]
            self._groups[runs] = RowGroups.of(ids, len(runs))
        return self._groups[runs]

    def seed(self, run: Any, layer: nn.Module, device: torch.device) -> Tensor:
        """Of the dropout of a run's layer, as the layer would draw it alone: projections of one input share theirs."""
        key = (run, id(layer.__dict__.get("group") or layer))
        if key not in self._seeds:
            if device.type == "cpu":
                self._seeds[key] = torch.randint(2**63 - 1, (1,), generator=run.generator)
            else:
                with run.draws():
                    self._seeds[key] = torch.randint(2**63 - 1, (1,), device=device)
        return self._seeds[key]

    def rank_mask(self, x: Tensor, ranks: Mapping[Any, tuple[int, float]]) -> Tensor:
        """Dropout of s = x Aᵀ as each run draws it alone: 0 or 1 / (1 − p), [tokens, largest rank].

        Args:
            x: of all rows together.
            ranks: of each run with an adapter, and its p; the others drop nothing.
        """
        widest = max(rank for rank, _ in ranks.values())
        per_row = x.numel() // (x.shape[-1] * self.rows)
        mask = x.new_ones(self.rows, per_row, widest)
        for run, span in self.parts:
            rank, p = ranks.get(run, (0, 0.0))
            if p:
                own = part_of(mask[span.start : span.stop, :, :rank], span)
                with run.draws():  # pyright: ignore[reportAttributeAccessIssue]
                    own.copy_(rank_mask(own, rank, p).view_as(own))
        return mask.view(-1, widest)

    def token_index(self, tokens: int, device: torch.device) -> Tensor | None:
        """Which token each is among those of its run alone, where padding has moved them; else None.

        Args:
            tokens: of all rows together.
        """
        key = (tokens, device)
        if key not in self._indices:
            self._indices[key] = self._token_index(tokens // self.rows, device)
        return self._indices[key]

    def _token_index(self, tokens_per_row: int, device: torch.device) -> Tensor | None:
        spans = [part.span for part in self.parts]
        if all(span.length == span.padded or span.padded != tokens_per_row for span in spans):
            return None
        indices: list[Tensor] = []
        for span in spans:
            rows, columns = torch.arange(span.stop - span.start)[:, None], torch.arange(span.padded)[None]
            own = rows * span.length + columns
            # what is padded stands behind the run's own tokens
            beyond = len(rows) * span.length + rows * (span.padded - span.length) + columns - span.length
            indices.append(torch.where(columns < span.length, own, beyond).flatten())
        return torch.cat(indices).to(device)
