"""The layers of a served model: each looks up what the tasks of the batch that runs have for it."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from petune.kernels.grouped_lora import grouped_packed_lora
from petune.low_rank import Operands, takes, tensor, uncovered_base
from petune.mixed_batch import Mixed, row_groups
from petune.serving.layout import Active, Layout, Update


class Batch:
    """Which row takes which task, while the model runs.

    Attributes:
        names: of each row's task, or `petune.layer.BASE`.
        tasks: those that the rows take.
        widths: by name, how many entries of an answer's last axis are the task's own; {} where all are.
    """

    def __init__(self, names: tuple[str, ...], tasks: Mapping[str, Active]) -> None:
        self.names = names
        self.tasks = tasks
        self.widths: dict[str, int] = {}

    def positions(self, wanted: Collection[str], x: Tensor) -> Tensor:
        """Where in x the rows of these tasks are, int64; its first axis is the batch's rows, or a multiple of them."""
        per_row = len(x) // len(self.names)
        rows = torch.tensor([row for row, name in enumerate(self.names) if name in wanted], dtype=torch.int64)
        return (rows.unsqueeze(1) * per_row + torch.arange(per_row)).flatten().to(x.device)

    def check(self, x: Tensor, path: str) -> None:
        """Raises ValueError where x has not the batch's rows."""
        if len(x) % len(self.names):
            raise ValueError(
                f"{path} is given {len(x)} rows in a batch of {len(self.names)}, and which task each takes is not "
                "known; serve one task at a time, with TaskStore.attach."
            )


class Current:
    """The batch that runs; one for all layers of a model."""

    batch: Batch | None = None


class ServedModule(nn.Module):
    """A module of the base, or for the rows of a task that has a version of its own, that one

    Args:
        base: the base's module; layers inside of it may be served too.
        plain: the same without them.
        path: its name in the model.
        current: says which batch runs.
    """

    def __init__(self, base: nn.Module, plain: nn.Module, path: str, current: Current) -> None:
        super().__init__()
        self.base = base
        self.path = path
        self._plain = (plain,)  # in a tuple, and not a part of the model
        self._current = current

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        batch = self._current.batch
        own = [] if batch is None else [name for name in batch.tasks if self._is_own(batch, name)]
        if batch is None or not own:
            return self.base(x, *args, **kwargs)
        batch.check(x, self.path)
        parts: dict[Collection[str], Tensor] = {}
        if rest := frozenset(batch.names) - frozenset(own):
            parts[rest] = self._tensor(self.base(x, *args, **kwargs))[batch.positions(rest, x)]
        for name in own:
            rows = batch.positions({name}, x)
            inputs = tuple(_rows_of(value, rows, len(x)) for value in (x, *args))
            named = {key: _rows_of(value, rows, len(x)) for key, value in kwargs.items()}
            state = batch.tasks[name].modules[self.path]
            parts[frozenset((name,))] = self._tensor(functional_call(self._plain[0], state, inputs, named))
        return self._joined(batch, parts, x)

    def _joined(self, batch: Batch, parts: Mapping[Collection[str], Tensor], x: Tensor) -> Tensor:
        """All rows in their order, as wide as the widest; NaN fills up the others, so that a use of it would show."""
        widths = {name: y.shape[-1] for names, y in parts.items() for name in names}
        # what a module inside of this one has filled up already is no part of the answer either
        inner = {name: width for name, width in batch.widths.items() if not self._is_own(batch, name)}
        widths |= inner
        batch.widths = widths if len(set(widths.values())) > 1 else {}
        first = next(iter(parts.values()))
        widest = max(y.shape[-1] for y in parts.values())
        joined = first.new_full((len(x), *first.shape[1:-1], widest), torch.nan)
        for names, y in parts.items():
            joined[batch.positions(names, x), ..., : y.shape[-1]] = y
        return joined

    def _is_own(self, batch: Batch, name: str) -> bool:
        return name in batch.tasks and self.path in batch.tasks[name].modules

    def _tensor(self, y: Any) -> Tensor:
        if not isinstance(y, Tensor):
            raise TypeError(
                f"{self.path} gives a {type(y).__name__}, and rows of several tasks are joined of tensors alone; put "
                "a task that has this module whole on a base of its own with TaskStore.attach."
            )
        return y

    def __getattr__(self, name: str) -> Any:
        if name == "base" or name.startswith("_"):
            return super().__getattr__(name)
        return getattr(self.base, name)  # models ask for a layer's weight, or its dtype


class ServedLinear(ServedModule):
    """y = x Wᵀ + bias + scale · (x Aᵀ) Bᵀ, A and B those of the row's task

    By `grouped_packed_lora` where the factors of all tasks of the batch are packed; by `grouped_lora` where some are
    not; and one task after the other where the base layer is none that these operators read.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        batch = self._current.batch
        found: dict[str, Update] = {}
        if batch is not None:
            found = {name: task.updates[self.path] for name, task in batch.tasks.items() if self.path in task.updates}
        if batch is None or not found:
            return self.base(x, *args, **kwargs)
        batch.check(x, self.path)
        if args or kwargs or not self._is_covered(x):
            return self._by_tasks(batch, found, x, self.base(x, *args, **kwargs))
        weight, bias = tensor(self.base, "weight"), tensor(self.base, "bias")
        weight = weight.T if isinstance(self.base, Conv1D) else weight
        present, groups = row_groups(batch.names, frozenset(found))
        assert groups is not None
        packed = [codes for name in present if (codes := found[name].codes) is not None]
        if len(packed) == len(present):
            return grouped_packed_lora(x, weight, bias, packed, groups)
        operands = [Operands(weight, bias, *found[name].dense(), found[name].scale, 0.0) for name in present]
        return Mixed(operands, groups)(x)

    def _is_covered(self, x: Tensor) -> bool:
        if _has_any_global_hook() or uncovered_base(self.base):
            return False
        return takes(x, tensor(self.base, "weight"), True)

    def _by_tasks(self, batch: Batch, found: dict[str, Update], x: Tensor, y: Tensor) -> Tensor:
        for name, update in found.items():
            rows = batch.positions({name}, x)
            a, b = update.dense()
            s = F.linear(x[rows].to(a.dtype), a)
            y = y.index_add(0, rows, (F.linear(s, b) * update.scale).to(y.dtype))
        return y


def serve(model: nn.Module, plain: nn.Module, layout: Layout, current: Current) -> None:
    """Put served layers wherever a task of the layout has something, unless they are there.

    Args:
        plain: the same model, without any.
    """
    for layer in layout.layers:
        _put(model, layer.path, plain, current, ServedLinear)
    for module in layout.modules:
        _put(model, module.path, plain, current, ServedModule)


def _put(model: nn.Module, path: str, plain: nn.Module, current: Current, kind: type[ServedModule]) -> None:
    parent_path, _, child = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    while isinstance(parent, ServedModule):
        parent = parent.base
    found = parent.get_submodule(child)
    if kind is ServedLinear and type(found) is ServedModule:  # rows of another task have the whole layer anew
        parent, child, found = found, "base", found.base
    if type(found) is not kind:
        setattr(parent, child, kind(found, plain.get_submodule(path), path, current))


def _rows_of(value: Any, rows: Tensor, count: int) -> Any:
    return value[rows] if isinstance(value, Tensor) and value.dim() and len(value) == count else value
