"""Which adapter each row of a batch takes, sorted once for all layers."""

from collections.abc import Sequence
from math import prod
from numbers import Integral

import torch
from torch import Tensor

from petune.kernels.checks import base_fault, described


class RowGroups:
    """Which adapter each row of a batch takes.

    The first layer that asks sorts the rows, on the device of the ids and without waiting for it; the others reuse the
    result. Ids that were rewritten in place are sorted again. In a CUDA graph that captures ids on the GPU the sort is
    replayed with the rest: make the object within what is captured, and it belongs to that graph; made before, it is
    sorted by every layer. So are ids that `torch.inference_mode` made, and ids in a compiled function. Ids on the host
    are copied to the GPU by the first layer that asks, which no graph captures.

    Attributes:
        ids: int32 or int64, [rows].
        adapters: how many there are; some may have no row.
    """

    def __init__(self, ids: Tensor, adapters: int, known: tuple[int, ...] | None = None) -> None:
        """Use `of`, which checks; known: the ids, where nobody can rewrite them."""
        self.ids = ids
        self.adapters = adapters
        self._known = known
        self._present = None if known is None else _present(known, adapters)
        self._sorted: dict[torch.device, tuple[tuple[int, bool], Tensor, Tensor]] = {}

    @classmethod
    def of(cls, ids: Sequence[int] | Tensor, adapters: int) -> "RowGroups":
        """Groups of the rows of a batch

        Args:
            ids: for each row 0..adapters − 1, or −1 for the base alone. A sequence, or an integer tensor [rows] on the
                CPU or on the device of the activations. Ids on a GPU are not read on the host: one that is out of
                range takes the base alone there.
            adapters: 1 or more.

        Raises:
            ValueError: an id on the host is out of range or no integer, or there is no adapter.
        """
        if adapters < 1:
            raise ValueError(
                f"RowGroups: adapters={adapters} is not positive; call the base layer where there is none."
            )
        if isinstance(ids, Tensor):
            if ids.dim() != 1 or ids.dtype not in (torch.int32, torch.int64):
                raise ValueError(
                    f"RowGroups: ids {tuple(ids.shape)} {ids.dtype} are not one integer a row; pass int32 or int64 "
                    "[rows]."
                )
            groups = cls(ids, adapters)
            groups.present()  # checks what the host can read
            return groups
        if wrong := [i for i in ids if not isinstance(i, Integral)]:
            raise ValueError(f"RowGroups: the id {wrong[0]!r} is no integer; pass the adapter's position, or -1.")
        known = tuple(int(i) for i in ids)
        return cls(torch.tensor(known, dtype=torch.int64, device="cpu"), adapters, known)

    @property
    def rows(self) -> int:
        """Of the batch."""
        return self.ids.shape[0]

    @property
    def lone(self) -> int | None:
        """The adapter that all rows take; None where they differ, or where the ids came in a tensor."""
        found = set(self._known or ())
        return found.pop() if len(found) == 1 and -1 not in found else None

    def present(self) -> tuple[bool, ...] | None:
        """Whether each adapter has rows; None where the host cannot read it: ids on a GPU, or in a traced function.

        Raises:
            ValueError: an id was rewritten and is out of range.
        """
        if self._known is not None or not self.ids.is_cpu or torch.compiler.is_compiling():
            return self._present
        return _present(self.ids.tolist(), self.adapters)

    def sorted_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(order, offsets) on a device: rows order[offsets[l] : offsets[l + 1]] take adapter l, in ascending order.

        order is int64, [rows], the rows of the base alone first, and offsets int64, [adapters + 1].
        """
        if torch.compiler.is_compiling() or (self._known is None and self.ids.is_inference()):
            return self._sort(device)
        version = self.ids._version if self._known is None else 0
        state = version, device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        found = self._sorted.get(device)
        if found is None or found[0] != state:
            found = state, *self._sort(device)
            self._sorted[device] = found
        return found[1:]

    def _sort(self, device: torch.device) -> tuple[Tensor, Tensor]:
        ids, order = torch.sort(self.ids, stable=True)
        offsets = torch.searchsorted(ids, torch.arange(self.adapters + 1, dtype=ids.dtype, device=ids.device))
        if ids.device == device:
            return order, offsets
        return order.to(device, non_blocking=True), offsets.to(device, non_blocking=True)


def _present(ids: Sequence[int], adapters: int) -> tuple[bool, ...]:
    for row, i in enumerate(ids):
        if not -1 <= i < adapters:
            raise ValueError(
                f"RowGroups: row {row} asks for adapter {i} of {adapters}; pass 0..{adapters - 1}, or -1 for the base "
                "alone."
            )
    found = set(ids)
    return tuple(adapter in found for adapter in range(adapters))


def check_base(operator: str, x: Tensor, weight: Tensor, bias: Tensor | None, groups: RowGroups, cast: bool) -> None:
    """Raises ValueError where x does not fit the base layer or its tokens do not fit the rows."""
    if fault := base_fault(x, weight, bias, cast):
        raise ValueError(f"{operator}: {described({'x': x, 'weight': weight, 'bias': bias})} {fault}")
    tokens = prod(x.shape[:-1])
    if tokens % groups.rows if groups.rows else tokens:
        raise ValueError(
            f"{operator}: x {tuple(x.shape)} has {tokens} tokens, which do not divide into {groups.rows} rows; pass "
            "one id for each row of the batch."
        )
    if groups.ids.device != x.device and not groups.ids.is_cpu:
        raise ValueError(
            f"{operator}: x is on {x.device} and the ids of its rows are on {groups.ids.device}; make them on the "
            "device of x, or pass a list."
        )


def check_lengths(operator: str, groups: RowGroups, **columns: Sequence[object] | None) -> None:
    """Raises ValueError where a list has not one entry for each adapter."""
    lengths = {name: len(column) for name, column in columns.items() if column is not None}
    if any(length != groups.adapters for length in lengths.values()):
        found = ", ".join(f"{length} {name}" for name, length in lengths.items())
        raise ValueError(f"{operator}: {found} for {groups.adapters} adapters; pass one of each for every adapter.")
