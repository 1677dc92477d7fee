"""A store of tasks: many adapters of few bits in one memory-mapped file, switched on one model by name."""

import copy
import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.peft_types import PeftType
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from petune.atomic import replacing_file
from petune.fingerprint import base_fingerprint, compare_fingerprints
from petune.quantized.slots import fill
from petune.quantized.stored import ROOT, Source, Task, TaskBytes, labels_of, read_task, sum_up, task_digest
from petune.state import active_adapter, peft_config, unwrap

_INDEX, _FORMAT = "petune_tasks", 1
_SHARED = ("config", "base", "labels")  # what a store holds once for all tasks that have the same
_MARK = "_petune_task"
_KEPT = ("peft_type", "task_type", "bi_head", "modules_to_save")  # fields in which tasks of one model are alike
_ADAPTERS = ("default", "other")  # names of a model's adapter; tasks of another shape take the one that is free
# fields of a config that leave the layers as they are
_NOT_OF_THE_LAYERS = {
    *("base_model_name_or_path", "revision", "peft_version", "auto_mapping", "inference_mode"),
    *("init_weights", "layout", "base_shape"),
}
_WIDTHS = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}  # bytes


@dataclass(frozen=True)
class StoreReport:
    """What `write_tasks` wrote."""

    path: Path
    """The file."""
    size: int
    """Its bytes on the disk."""
    tasks: dict[str, TaskBytes]
    """Task name to bytes."""

    @property
    def overhead(self) -> float:
        """Bytes a task beside its own: names, shapes, configs."""
        return (self.size - sum(task.total for task in self.tasks.values())) / len(self.tasks)

    def share(self, name: str) -> float:
        """Of the file, names and shapes included, 0..1."""
        return (self.tasks[name].total + self.overhead) / self.size

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {len(self.tasks)} tasks, {self.size:,} bytes, of which {self.overhead:,.0f} a task are "
            "names and shapes"
        ]
        width = max(map(len, self.tasks))
        for name, task in self.tasks.items():
            lines.append(
                f"  {name:<{width}}  {task.total:>11,} bytes ({self.share(name):6.1%}): {task.codes:,} codes, "
                f"{task.statistics:,} statistics, {task.other:,} heads and other tensors"
            )
        return "\n".join(lines)


def write_tasks(path: str | Path, tasks: Mapping[str, Source] | Iterable[tuple[str, Source]]) -> StoreReport:
    """Write the adapters of many tasks as one file, which `TaskStore` reads.

    The file is a safetensors file with the tensors of each adapter's checkpoint below `<task>/`. It is written beside
    `path` and then put in its place: whatever fails, the store that was there stays.

    Args:
        path: becomes the file.
        tasks: name to a PeftModel, whose active adapter is taken, or to an adapter folder. Pairs are asked for one
            after the other, so that a generator can give the same model with one adapter after the other.

    Raises:
        FileExistsError: `path` is something, and no store.
        OSError: a full disk, or no right to write.
        TypeError: an adapter of a method whose weights are not packed.
        ValueError: no task; a name that is empty, taken or has a "/"; a folder that is damaged; a tensor not finite.
    """
    path = Path(path)
    _check_replaceable(path)
    index: dict[str, Any] = {"format": _FORMAT, "tasks": {}, **{kind: [] for kind in _SHARED}}
    tensors: dict[str, Tensor] = {}
    sizes: dict[str, TaskBytes] = {}
    pairs: Any = tasks.items() if isinstance(tasks, Mapping) else tasks
    for name, source in pairs:
        _check_name(name, sizes)
        task = read_task(source, name)
        index["tasks"][name] = {
            **{kind: _position(index[kind], getattr(task, kind)) for kind in _SHARED},
            "digest": task_digest(task),
        }
        tensors |= {f"{name}/{key.removeprefix(ROOT)}": tensor for key, tensor in task.tensors.items()}
        sizes[name] = sum_up((key, tensor.nbytes) for key, tensor in task.tensors.items())
    if not sizes:
        raise ValueError(f"{path}: there is no task to write; pass at least one.")
    # no more metadata than this: safetensors writes several in any order
    content = save(tensors, {_INDEX: json.dumps(index, separators=(",", ":"))})
    with replacing_file(path) as incoming:
        incoming.write_bytes(content)
    return StoreReport(path, path.stat().st_size, sizes)


def _check_replaceable(path: Path) -> None:
    if not path.exists():
        return
    try:
        with safe_open(path, framework="pt") as file:
            if _INDEX in (file.metadata() or {}):
                return
    except (OSError, SafetensorError):
        pass  # a folder, or a file of another kind
    raise FileExistsError(f"{path} exists and is no task store; name a new file, or an earlier store.")


def _check_name(name: str, taken: Mapping[str, Any]) -> None:
    if not isinstance(name, str) or not name or "/" in name:
        raise ValueError(f"the task name {name!r} must be a string that is not empty and has no '/'; choose another.")
    if name in taken:
        raise ValueError(f"the task name {name!r} was given twice; choose another for one of the two.")


def _position(values: list[Any], value: Any) -> int:
    """Where `value` stands in `values`, put there if it does not: tasks of one kind share what is said of them."""
    if value not in values:
        values.append(value)
    return values.index(value)


class TaskStore:
    """The tasks of a file that `write_tasks` wrote, put on one model in turn

        store = TaskStore("tasks.safetensors")
        model = store.attach(base)            # the first task; eval mode, frozen
        store.switch(model, "sentiment")      # reads that task's tensors alone

    The file is memory-mapped: opening reads the names, and a task's tensors are read when it is asked for. A store
    that is written anew under the same name is not seen by one that is open.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is cut short or damaged, or no task store.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._file: Any = safe_open(self.path, framework="pt")
            self._tasks = _read_index(self._file)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"no task store {self.path}; pass a file that write_tasks wrote.") from error
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.path} is cut short or damaged, or no task store ({error}); copy or write it again."
            ) from error

    @property
    def names(self) -> list[str]:
        """The tasks, in the order in which they were written."""
        return list(self._tasks)

    def bytes(self, name: str) -> TaskBytes:
        """What a task takes in the file.

        Raises:
            ValueError: no such task.
        """
        slices = [(key.partition("/")[2], self._file.get_slice(key)) for key in self._stored(name).keys]
        return sum_up((key, prod(part.get_shape()) * _WIDTHS[part.get_dtype()]) for key, part in slices)

    def labels(self, name: str) -> dict[str, str]:
        """Names of a task's labels by index, as JSON has it; {} where they are not known.

        Raises:
            ValueError: no such task.
        """
        return dict(self._stored(name).labels)

    def read(self, name: str) -> Task:
        """A task as it was written; its tensors are views of the mapped file.

        Raises:
            ValueError: no such task, or a damaged one.
        """
        stored = self._stored(name)
        tensors = {f"{ROOT}{key.partition('/')[2]}": self._file.get_tensor(key) for key in stored.keys}
        task = Task(stored.config, stored.base, stored.labels, tensors)
        if task_digest(task) != stored.digest:
            raise ValueError(
                f"{self._where(name)} is damaged: it is not what was written; copy or write the file again."
            )
        return task

    def attach(self, base: nn.Module, name: str | None = None) -> PeftModel:
        """Put a task on a base model: packed weights, no latents; in eval mode, and frozen.

        Args:
            base: the model that the task was trained on; its head may have another number of labels.
            name: None for the first task.

        Raises:
            TypeError: the model already carries an adapter.
            ValueError: no such task, another base, or a damaged file. The model is left as it was.
        """
        name = self.names[0] if name is None else name
        task = self.read(name)
        if any(isinstance(module, BaseTunerLayer | PeftModel) for module in base.modules()):
            raise TypeError(f"{type(base).__name__} already carries an adapter; pass the base model, or use switch().")
        found, labels = base_fingerprint(base), labels_of(base)
        compare_fingerprints(task.base, found, where=self._where(name))
        config = _config(task)
        model: Any = get_peft_model(base, config, low_cpu_mem_usage=True)  # pyright: ignore[reportArgumentType]
        adapter = active_adapter(model)
        try:
            self._fill(model, adapter, task, name)
        except BaseException:
            model.delete_adapter(adapter)
            model.base_model.unload()
            raise
        setattr(model, _MARK, _Attached(found, labels))
        _name_labels(model, task.labels or labels)
        return model.requires_grad_(False).eval()

    def switch(self, model: PeftModel, name: str) -> None:
        """Make an attached model the one of another task.

        Tasks of one shape are written over one another in place; rank, scale, bits and labels may differ.

        Args:
            model: from `attach`.

        Raises:
            TypeError: the model is not from `attach`.
            ValueError: no such task; one of another method, with other targets or of another base; or a damaged file.
                The model is left as it was.
        """
        attached: _Attached | None = getattr(model, _MARK, None)
        if attached is None:
            raise TypeError(
                f"{type(model).__name__} was not made by TaskStore.attach, and only such a model is switched."
            )
        task = self.read(name)
        compare_fingerprints(task.base, attached.base, where=self._where(name))
        adapter, config = active_adapter(model), _config(task)
        if _of_the_layers(config) == _of_the_layers(peft_config(model)):
            self._fill(model, adapter, task, name)
        else:
            self._check_alike(model, config, name)
            self._replace(model, adapter, config, task, name)
        _name_labels(model, task.labels or attached.labels)

    def _replace(self, model: PeftModel, old: str, config: PeftConfig, task: Task, name: str) -> None:
        """Add an adapter of another shape beside the old one, and delete that."""
        new = next(free for free in _ADAPTERS if free != old)
        model.add_adapter(new, config, low_cpu_mem_usage=True)
        try:
            self._fill(model, new, task, name)
        except BaseException:
            model.delete_adapter(new)
            raise
        model.set_adapter(new)
        model.delete_adapter(old)
        model.requires_grad_(False).eval()

    def _fill(self, model: PeftModel, adapter: str, task: Task, name: str) -> None:
        if task.config["modules_to_save"]:  # PEFT adds those of the task_type once more
            model.peft_config[adapter].modules_to_save = list(task.config["modules_to_save"])  # pyright: ignore
        try:
            fill(model, adapter, task.tensors, task.config["layout"])
        except ValueError as error:
            raise ValueError(f"{self._where(name)} cannot be put on the model: {error}") from error

    def _check_alike(self, model: PeftModel, config: PeftConfig, name: str) -> None:
        wanted, found = _of_the_layers(config), _of_the_layers(peft_config(model))
        for field in _KEPT:
            if wanted.get(field) != found.get(field):
                raise ValueError(
                    f"{self._where(name)} has {field}={wanted.get(field)!r}, and the model's task has "
                    f"{found.get(field)!r}; attach it to a base of its own."
                )
        tuner: Any = model.base_model
        targets = {path for path, _ in tuner._expand_targets(config, tuner.model)}
        only = sorted(targets ^ {path.removeprefix("model.") for path in tuner._targets_of(active_adapter(model))})
        if only:
            which = "adapts" if only[0] in targets else "does not adapt"
            raise ValueError(
                f"{self._where(name)} {which} {only[0]}, unlike the model's task ({len(only)} modules differ); attach "
                "it to a base of its own."
            )

    def _stored(self, name: str) -> "_Stored":
        if name not in self._tasks:
            near = difflib.get_close_matches(str(name), self.names, n=1) or self.names[:1]
            raise ValueError(
                f"{self.path} has no task {name!r} among its {len(self.names)}; the closest is {near[0]!r}."
            )
        return self._tasks[name]

    def _where(self, name: str) -> str:
        return f"{self.path}: the task {name!r}"


class _Attached(NamedTuple):
    """What is known of the base of an attached model."""

    base: dict[str, Any]
    labels: dict[str, str]


class _Stored(NamedTuple):
    """What the index says of a task."""

    config: dict[str, Any]
    base: dict[str, Any]
    labels: dict[str, str]
    digest: str
    keys: list[str]


def _read_index(file: Any) -> dict[str, _Stored]:
    index: Any = json.loads((file.metadata() or {})[_INDEX])
    if index["format"] != _FORMAT:
        raise ValueError(f"format {index['format']}, and this version reads {_FORMAT}")
    tasks: dict[str, _Stored] = {}
    for name, task in index["tasks"].items():
        config, base, labels = (index[kind][task[kind]] for kind in _SHARED)
        tasks[name] = _Stored(config, base, labels, task["digest"], [])
    for key in list(file.keys()):
        tasks[key.partition("/")[0]].keys.append(key)
    return tasks


def _config(task: Task) -> PeftConfig:
    return PeftConfig.from_peft_type(**copy.deepcopy(task.config))


def _of_the_layers(config: PeftConfig) -> dict[str, Any]:
    """The fields that shape the layers, with names in one order."""
    fields = {**config.to_dict(), "peft_type": PeftType(config.peft_type).value}
    fields = {name: value for name, value in fields.items() if name not in _NOT_OF_THE_LAYERS}
    return {name: sorted(set(v)) if isinstance(v, set | list | tuple) else v for name, v in fields.items()}


def _name_labels(model: PeftModel, labels: Mapping[str, str]) -> None:
    """Have the model's config say what the task's outputs are."""
    base: Any = unwrap(model.get_base_model())
    if labels:
        base.config.id2label = {int(index): name for index, name in labels.items()}  # JSON has no integer keys
        base.config.label2id = {name: int(index) for index, name in labels.items()}
        base.num_labels = len(labels)
