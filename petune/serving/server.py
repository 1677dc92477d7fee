"""`AdapterServer`: answers batches whose rows take different tasks, with the tasks used last kept in memory."""

import copy
import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from threading import RLock
from types import TracebackType
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from petune.fingerprint import base_fingerprint, compare_fingerprints
from petune.layer import BASE
from petune.quantized.store import TaskStore
from petune.quantized.stored import Task, labels_of
from petune.serving.layers import Batch, Current, serve
from petune.serving.layout import Active, Layout
from petune.serving.sources import FolderTask, Source, StoredTask


class AdapterServer:
    """Answers of one base model with the tasks of a store, another one for each row

        server = AdapterServer(base, "tasks.safetensors", budget_bytes=160_000_000)
        answers = server.predict({"pixel_values": images}, adapter_names=["pets", "cars", None, "pets"])

    A task that a batch asks for is read once from the mapped file and stays resident until the budget is needed for
    others: those used least recently go first. No module is made for it. On a GPU it is moved there once. On a CPU it
    is a view of the mapped file: all processes that serve one store share its pages, and those of a task that was
    evicted go when the system needs them. The first task of each config takes longer: PEFT is asked what it adapts.

    The base is not changed: the server computes with a copy that shares its memory, in eval mode. Calls from several
    threads take turns.

    Args:
        base: the model that the tasks were trained on, on one device.
        store: a `TaskStore`, or its file; tasks of `BiLoraConfig`, of any ranks, bits, targets and heads.
        budget_bytes: what resident tasks may take together, as they are stored; None for no limit. Beside it the tasks
            of the last batch take about 60 KB each, for their views, and their quantised heads are unpacked.

    Raises:
        FileNotFoundError: no such store.
        TypeError: the base carries an adapter.
        ValueError: the store is damaged, or a task has the name `__base__`; the budget is not positive; the base is on
            several devices.
    """

    def __init__(self, base: nn.Module, store: TaskStore | str | Path, budget_bytes: int | None = None) -> None:
        self.store = store if isinstance(store, TaskStore) else TaskStore(store)
        self.budget_bytes = budget_bytes
        self.loads = 0
        """Tasks that were read from the store, one that came back counted again."""
        self.evictions = 0
        """Tasks that made room for others."""
        _check(base, self.store, budget_bytes)
        self._fingerprint, self._labels = base_fingerprint(base), labels_of(base)
        self._device = next(base.parameters()).device
        self._plain, self._model = _copy_of(base), _copy_of(base)
        self._current = Current()
        self._layouts: dict[tuple[str, int], Layout] = {}
        self._resident: OrderedDict[str, _Resident] = OrderedDict()
        self._active: dict[str, Active] = {}
        self._folders: dict[str, FolderTask] = {}
        self._bytes = 0
        self._lock = RLock()
        self._closed = False

    @property
    def names(self) -> list[str]:
        """The tasks of the store, and those that were added."""
        return [*self.store.names, *self._folders]

    @property
    def resident(self) -> list[str]:
        """The tasks in memory, the least recently used first."""
        return list(self._resident)

    @property
    def resident_bytes(self) -> int:
        """What they take together."""
        return self._bytes

    def labels(self, name: str | None) -> dict[int, str]:
        """Names of the entries of a task's answers; {} where neither the task nor the base has any.

        Raises:
            ValueError: no such task.
        """
        labels = self._labels if name is None or name == BASE else self._source(name).labels or self._labels
        return {int(index): label for index, label in labels.items()}

    def add(self, name: str, directory: str | Path) -> None:
        """Serve a float LoRA beside the tasks of the store; it is read from its folder whenever it is activated.

        Args:
            name: of the task.
            directory: an adapter folder, of PEFT or PETune.

        Raises:
            FileNotFoundError: no such folder, or a file of it is missing.
            TypeError: an adapter of another method.
            ValueError: a name that is taken, or a folder that is damaged.
        """
        with self._lock:
            if name in (*self.names, BASE):
                raise ValueError(f"AdapterServer.add: the name {name!r} is taken; choose another.")
            self._folders[name] = FolderTask(directory)

    def activate(self, names: Iterable[str]) -> None:
        """Have these tasks resident and ready for the next batch, as `predict` does.

        Raises:
            RuntimeError: the server is closed.
            TypeError: a task is of a method whose update is not low-rank.
            ValueError: no such task, a damaged one or one of another base; or the budget is too small for all of them.
        """
        with self._lock:
            self._activate([*dict.fromkeys(names)])

    def predict(self, inputs: Mapping[str, Any], adapter_names: Sequence[str | None]) -> list[Tensor]:
        """One answer for each row of a batch

        Args:
            inputs: what the model takes, without labels; on any device.
            adapter_names: of each row's task; None, or "__base__", for the base alone.

        Returns:
            Of a model with a head, each row's logits, as many as its task has labels. Of a model without,
            `last_hidden_state`. Of one that returns a tensor, its rows. Without gradients, on the model's device.

        Raises:
            As `activate`, and ValueError where the names are not as many as the rows, there are labels, or the model
            gives neither logits nor hidden states. The server goes on with what comes next.
        """
        names = tuple(BASE if name is None else name for name in adapter_names)
        tensors = {key: _on(value, self._device) for key, value in inputs.items()}
        self._check_rows(tensors, names)
        with self._lock, torch.no_grad():
            self._activate([name for name in dict.fromkeys(names) if name != BASE])
            self._current.batch = batch = Batch(names, self._active)
            try:
                found = _answers(self._model(**tensors))
            finally:
                self._current.batch = None
        return [answer[..., : batch.widths.get(name)] for name, answer in zip(names, found, strict=True)]

    def close(self) -> None:
        """Let go of the tasks and of the copy of the model; the base is as it was. A second call changes nothing."""
        with self._lock:
            self._closed = True
            self._resident.clear()
            self._active, self._layouts, self._bytes = {}, {}, 0
            self._plain = self._model = nn.Identity()

    def __enter__(self) -> "AdapterServer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_rows(self, tensors: Mapping[str, Any], names: Sequence[str]) -> None:
        if "labels" in tensors:
            raise ValueError("AdapterServer.predict gives answers and no loss; leave the labels out.")
        first = next((value for value in tensors.values() if isinstance(value, Tensor) and value.dim()), None)
        main = tensors.get(getattr(self._plain, "main_input_name", ""), first)
        rows = 0 if main is None else len(main)
        if rows != len(names) or not rows:
            raise ValueError(
                f"AdapterServer.predict: adapter_names has {len(names)} entries for a batch of {rows} rows; pass one "
                "name for each row, None for the base alone."
            )

    def _activate(self, names: list[str]) -> None:
        if self._closed:
            raise RuntimeError("the AdapterServer is closed; make another one.")
        sizes = self._sizes(names)
        for name in names:
            if name not in self._resident:
                task = self._read(name, sizes[name])
                self._make_room(task.size, names)
                self._resident[name] = task.on(self._device)
                self._bytes += task.size
                self.loads += 1
            self._resident.move_to_end(name)
        known = self._active
        held = self._resident
        self._active = {n: known.get(n) or held[n].layout.activate(held[n].tensors) for n in names}

    def _sizes(self, names: Sequence[str]) -> dict[str, int]:
        """Bytes of each task, once it is known that the budget is enough for all of them."""
        held, budget = self._resident, self.budget_bytes
        sizes = {name: held[name].size if name in held else self._source(name).size for name in names}
        if budget is None or sum(sizes.values()) <= budget:
            return sizes
        largest = max(sizes, key=lambda name: sizes[name])
        if sizes[largest] > budget:
            raise ValueError(
                f"the task {largest!r} takes {sizes[largest]:,} bytes, and budget_bytes={budget:,}; give the server "
                "at least as much."
            )
        raise ValueError(
            f"the {len(sizes)} tasks of the batch take {sum(sizes.values()):,} bytes, and budget_bytes={budget:,}; "
            "give the server more, or ask for fewer tasks at once."
        )

    def _make_room(self, size: int, wanted: Sequence[str]) -> None:
        while self.budget_bytes is not None and self._bytes + size > self.budget_bytes:
            oldest = next(name for name in self._resident if name not in wanted)  # one is: all of wanted fit together
            self._bytes -= self._resident.pop(oldest).size
            self._active.pop(oldest, None)
            self.evictions += 1

    def _read(self, name: str, size: int) -> "_Resident":
        source = self._source(name)
        task = source.read()
        compare_fingerprints(task.base, self._fingerprint, where=source.where)
        layout = self._layout(source, task)
        try:
            layout.check(task.tensors)
        except ValueError as error:
            raise ValueError(f"{source.where} cannot be served: {error}") from error
        return _Resident(layout, task.tensors, size)

    def _layout(self, source: Source, task: Task) -> Layout:
        # the size of the codes beside the config: a quantised head has the task's labels
        codes = sum(tensor.nbytes for tensor in task.tensors.values() if tensor.dtype == torch.uint8)
        key = json.dumps(task.config, sort_keys=True, default=str), codes
        if key not in self._layouts:
            # once for each config: the layers and modules that PEFT finds, on a copy that is thrown away
            layout = Layout.of(source.attached(_copy_of(self._plain)), source.where)
            serve(self._model, self._plain, layout, self._current)
            self._layouts[key] = layout
        return self._layouts[key]

    def _source(self, name: str) -> Source:
        return self._folders.get(name) or StoredTask(self.store, name)


class _Resident(NamedTuple):
    """A task in memory."""

    layout: Layout
    tensors: dict[str, Tensor]
    size: int
    """Bytes in the store, or of its file."""

    def on(self, device: torch.device) -> "_Resident":
        return self._replace(tensors={name: tensor.to(device) for name, tensor in self.tensors.items()})


def _check(base: nn.Module, store: TaskStore, budget_bytes: int | None) -> None:
    if any(isinstance(module, BaseTunerLayer | PeftModel) for module in base.modules()):
        raise TypeError(f"{type(base).__name__} already carries an adapter; pass AdapterServer the base model.")
    if BASE in store.names:
        raise ValueError(f"{store.path} has a task {BASE!r}, the name of the base alone; write it with another.")
    if budget_bytes is not None and budget_bytes < 1:
        raise ValueError(f"AdapterServer: budget_bytes={budget_bytes} is not positive; pass None for no limit.")
    if len(devices := {str(parameter.device) for parameter in base.parameters()}) > 1:
        raise ValueError(
            f"AdapterServer: the base is on {', '.join(sorted(devices))}, and tasks are kept on one device; move it."
        )


def _copy_of(model: nn.Module) -> nn.Module:
    """A copy in eval mode that shares the model's memory; freezing its parameters freezes no others."""
    known: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        plain = type(parameter) is nn.Parameter
        known[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False) if plain else parameter
    return copy.deepcopy(model, known).eval()


def _on(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _answers(output: Any) -> Tensor:
    """What the rows of a batch are answered with."""
    found = output if isinstance(output, Tensor) else None
    for name in ("logits", "last_hidden_state"):
        found = getattr(output, name, None) if found is None else found
    if not isinstance(found, Tensor):
        gives = ", ".join(output) if isinstance(output, Mapping) else type(output).__name__
        raise ValueError(
            f"AdapterServer.predict: the model gives {gives}, and neither logits nor last_hidden_state; serve a model "
            "that does."
        )
    return found
