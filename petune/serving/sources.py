"""Where a served task comes from: a store of tasks, or an adapter folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.peft_types import PeftType
from safetensors.torch import load_file
from torch import nn

from petune.adapters.onebit import BiLoraConfig
from petune.load import check_weights, read_adapter_config
from petune.quantized.store import TaskStore
from petune.quantized.stored import Task, plain_config, run_labels
from petune.run import ADAPTER_WEIGHTS, adapter_folder, read_run

_STARTS = ("gaussian", "eva", "orthogonal")  # of LoRA's factors; by the others PEFT changes the base's weight as well


class Source(Protocol):
    """A task that can be read, as often as it is asked for."""

    @property
    def where(self) -> str:
        """For messages: the file, and the task in it."""
        ...

    @property
    def size(self) -> int:
        """Bytes of its tensors."""
        ...

    @property
    def labels(self) -> dict[str, str]:
        """Names of its labels by index; {} where they are not known."""
        ...

    def read(self) -> Task:
        """All of it, checked."""
        ...

    def attached(self, base: nn.Module) -> PeftModel:
        """A base model with an adapter of the task's config."""
        ...


@dataclass(frozen=True)
class StoredTask:
    """A task of a store."""

    store: TaskStore
    name: str

    @property
    def where(self) -> str:
        return f"{self.store.path}: the task {self.name!r}"

    @property
    def size(self) -> int:
        return self.store.bytes(self.name).total

    @property
    def labels(self) -> dict[str, str]:
        return self.store.labels(self.name)

    def read(self) -> Task:
        task = self.store.read(self.name)
        kind: type[PeftConfig] = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(task.config["peft_type"])]
        if not issubclass(kind, BiLoraConfig):
            raise TypeError(
                f"{self.where} is an adapter of {kind.__name__}, which is no low-rank update, and only such are "
                "served together; put it on a base of its own with TaskStore.attach."
            )
        return task

    def attached(self, base: nn.Module) -> PeftModel:
        return self.store.attach(base, self.name)


class FolderTask:
    """A LoRA in an adapter folder, of PEFT or PETune

    Raises:
        FileNotFoundError: no such folder, or a file of it is missing.
        TypeError: an adapter of another method.
        ValueError: a damaged folder, or a LoRA that trained on a changed base.
    """

    def __init__(self, directory: str | Path) -> None:
        self.folder = adapter_folder(directory)
        self.labels = self.read().labels

    @property
    def where(self) -> str:
        return str(self.folder)

    @property
    def size(self) -> int:
        return (self.folder / ADAPTER_WEIGHTS).stat().st_size  # the file's, a header more than the tensors

    def read(self) -> Task:
        config, run = self._config(), read_run(self.folder) or {}
        check_weights(self.folder, run.get("files", {}))
        base: dict[str, Any] = run.get("base") or {}
        tensors = load_file(self.folder / ADAPTER_WEIGHTS)
        return Task(plain_config(config), base.get("fingerprint") or {}, run_labels(run), tensors)

    def attached(self, base: nn.Module) -> PeftModel:
        model: Any = get_peft_model(base, self._config(), low_cpu_mem_usage=True)  # pyright: ignore[reportArgumentType]
        return model

    def _config(self) -> LoraConfig:
        config = read_adapter_config(self.folder)
        if not isinstance(config, LoraConfig):
            raise TypeError(
                f"{self.folder} is an adapter of {type(config).__name__}, and beside a store's tasks only LoRA is "
                "served; put packed ones into the store with write_tasks."
            )
        changes = {"bias": config.bias != "none", "layer_replication": config.layer_replication is not None}
        start = config.init_lora_weights
        changes["init_lora_weights"] = isinstance(start, str) and start not in _STARTS
        for field, changed in changes.items():
            if changed:
                raise ValueError(
                    f"{self.folder} has {field}={getattr(config, field)!r}, which changes the base too; serve the "
                    "adapter on a base of its own."
                )
        return config
