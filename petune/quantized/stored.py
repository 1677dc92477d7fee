"""One task of a store: an adapter of few bits outside of any model, taken from a PeftModel or from a folder."""

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from petune.fingerprint import base_fingerprint
from petune.load import check_weights, read_adapter_config
from petune.quantized.packing import Entry, encode
from petune.quantized.slots import packed_names
from petune.quantized.tuner import QuantizedConfig
from petune.registry import methods
from petune.run import ADAPTER_WEIGHTS, adapter_folder, read_run
from petune.state import active_adapter, peft_config, plain_name, unwrap

Source = PeftModel | str | Path
ROOT = "base_model.model."  # of every name in a PEFT checkpoint; left out of a store's


@dataclass(frozen=True)
class TaskBytes:
    """What a task takes in a store, in bytes."""

    codes: int
    """Its packed weights."""
    statistics: int
    """Their means and scales."""
    other: int
    """Heads of `modules_to_save` and whatever else is stored as it is."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.codes + self.statistics + self.other


class Task(NamedTuple):
    """A packed checkpoint and what it takes to use it."""

    config: dict[str, Any]
    """Of the adapter, as in adapter_config.json."""
    base: dict[str, Any]
    """Fingerprint of its base model; {} where the adapter's folder has none."""
    labels: dict[str, str]
    """Names of a classifier's labels by index, as JSON has it; {} where they are not known."""
    tensors: dict[str, Tensor]


def read_task(source: PeftModel | str | Path, name: str) -> Task:
    """The active adapter of a model, or that of a folder, packed.

    Args:
        name: of the task, for messages.

    Raises:
        FileNotFoundError: no such folder, or a file of it is missing.
        TypeError: neither a PeftModel nor a folder, or a method whose weights are not packed.
        ValueError: a damaged folder, or a tensor that is not finite.
    """
    task = _from_folder(source, name) if isinstance(source, str | Path) else _from_model(source, name)
    for key, tensor in task.tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"task {name!r}: {key} is not finite (NaN or infinite); train it again.")
    return task


def labels_of(model: nn.Module) -> dict[str, str]:
    """Names of a classifier's labels, {} for another model."""
    base = unwrap(model.get_base_model()) if isinstance(model, PeftModel) else model
    named = "Classification" in type(base).__name__
    return _text_keys(getattr(getattr(base, "config", None), "id2label", None) if named else None)


def run_labels(run: Mapping[str, Any]) -> dict[str, str]:
    """Names of the labels that an adapter folder's run file has, {} for another model."""
    return _text_keys((run.get("base") or {}).get("config", {}).get("id2label"))


def plain_config(config: PeftConfig) -> dict[str, Any]:
    """A config as JSON has it, for inference."""
    fields = {**config.to_dict(), "inference_mode": True}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in sorted(fields.items())}


def task_digest(task: Task) -> str:
    """A hash of all of a task, 16 hexadecimal digits."""
    digest = hashlib.blake2b(json.dumps(task[:3], sort_keys=True).encode(), digest_size=8)
    for key, tensor in sorted(task.tensors.items()):
        content: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(f"{key}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(content)
    return digest.hexdigest()


def sum_up(tensors: Iterable[tuple[str, int]]) -> TaskBytes:
    """Bytes by kind, of (name in a checkpoint, bytes)."""
    found = {"bits": 0, "stats": 0, "": 0}
    for key, size in tensors:
        kind = key.rpartition("_")[2] if "." not in key.removeprefix(ROOT) else ""
        found[kind if kind in found else ""] += size
    return TaskBytes(found["bits"], found["stats"], found[""])


def _from_model(source: nn.Module, name: str) -> Task:
    model = unwrap(source)
    if not isinstance(model, PeftModel):
        raise TypeError(f"task {name!r} is a {type(model).__name__}; pass a PeftModel or an adapter folder.")
    adapter, config = active_adapter(model), _checked(peft_config(model), name)
    model.peft_config[adapter] = packed = copy.copy(config)
    packed.storage = "packed"  # latents are packed as well
    try:
        found = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    finally:
        model.peft_config[adapter] = config
    # copies: a model that is stored once for each of its adapters goes on changing
    tensors = {plain_name(key): tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in found.items()}
    return Task(plain_config(packed), base_fingerprint(model), labels_of(model), tensors)


def _from_folder(source: str | Path, name: str) -> Task:
    folder = adapter_folder(source)
    config, run = _checked(read_adapter_config(folder), name), read_run(folder) or {}
    check_weights(folder, run.get("files", {}))
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    if any(key.endswith(".anchor") for key in tensors):
        tensors = _pack_latents(config, tensors)
    base: dict[str, Any] = run.get("base") or {}
    return Task(plain_config(config), base.get("fingerprint") or {}, run_labels(run), tensors)


def _pack_latents(config: QuantizedConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint of storage="latent" as one of storage="packed"; the config follows."""
    names = sorted(key.removesuffix(".anchor") for key in tensors if key.endswith(".anchor"))
    latents, anchors = ([tensors[f"{name}.{part}"] for name in names] for part in ("weight", "anchor"))
    entries = [Entry(name, w.shape, config.quantization) for name, w in zip(names, latents, strict=True)]
    config.storage = "packed"
    others = {key: tensor for key, tensor in tensors.items() if key.rpartition(".")[0] not in names}
    return {**dict(zip(packed_names(config), encode(entries, latents, anchors), strict=True)), **others}


def _checked(config: PeftConfig, name: str) -> QuantizedConfig:
    if not isinstance(config, QuantizedConfig):
        packed = sorted(m.config_cls.__name__ for m in methods().values() if issubclass(m.config_cls, QuantizedConfig))
        raise TypeError(
            f"task {name!r} is an adapter of {type(config).__name__}, whose weights are not packed; a store holds "
            f"those of {', '.join(packed)}: save this one with petune.save_adapter."
        )
    return config


def _text_keys(labels: Mapping[int, str] | None) -> dict[str, str]:
    return {str(index): name for index, name in (labels or {}).items()}
