"""petune.yaml: what an adapter folder says about the run that made it."""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from datetime import UTC, datetime
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import transformers
import yaml
from peft import PeftConfig, PeftModel
from torch import nn

from petune.atomic import recover_folder
from petune.card import CardInfo
from petune.fingerprint import base_fingerprint
from petune.state import active_adapter, peft_config, unwrap

ADAPTER_CONFIG, ADAPTER_WEIGHTS, RUN_FILE = "adapter_config.json", "adapter_model.safetensors", "petune.yaml"
_PACKAGES = ("petune", "peft", "transformers", "torch", "lightning", "datasets")


@dataclass(frozen=True)
class Run:
    """What petune.yaml says about the run that made an adapter."""

    directory: Path
    """The adapter folder."""
    config: dict[str, Any]
    """The run's configuration, as the command line takes it."""
    base: dict[str, Any]
    """name, class, config (labels, pooling) and fingerprint of the base model."""
    adapter: dict[str, Any]
    """peft_type, task_type, name, parameters."""
    metrics: dict[str, float]
    """Metrics on held-out data."""
    versions: dict[str, str]
    """Package versions of the run."""
    seed: int | None
    """Seed of the run."""
    created: str
    """UTC, ISO 8601."""


def load_run(directory: str | Path) -> Run:
    """Read petune.yaml of an adapter folder, or of a run folder that has it below `adapter/`.

    Raises:
        FileNotFoundError: no such folder, or neither adapter nor petune.yaml in it.
        ValueError: petune.yaml cannot be read.
    """
    folder = adapter_folder(directory)
    content = read_run(folder)
    if content is None:
        if not (folder / ADAPTER_CONFIG).exists():
            raise FileNotFoundError(f"{folder} holds no adapter; pass the folder that holds {ADAPTER_CONFIG}.")
        raise FileNotFoundError(
            f"{folder} has no {RUN_FILE}: PETune did not write it; load it with petune.load_adapter(folder, base)."
        )
    names = Run.__dataclass_fields__.keys() - {"directory"}
    missing = sorted(names - content.keys())
    if missing:
        raise ValueError(f"{folder / RUN_FILE} lacks {', '.join(missing)}; export the adapter again.")
    return Run(directory=folder, **{name: content[name] for name in names})


def describe_run(
    model: PeftModel, run_config: Mapping[str, Any] | None, card: CardInfo, parameters: int
) -> dict[str, Any]:
    """The content of petune.yaml."""
    base, config = unwrap(model.get_base_model()), peft_config(model)
    in_transformers = getattr(transformers, type(base).__name__, None) is type(base)
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "base": {
            "name": _base_name(base, config),
            "class": type(base).__name__ if in_transformers else None,
            "config": _build_options(base),
            "fingerprint": base_fingerprint(model),
        },
        "adapter": {
            "name": active_adapter(model),
            "peft_type": _plain(config.peft_type),
            "task_type": _plain(config.task_type),
            "parameters": parameters,
        },
        "metrics": {name: float(value) for name, value in card.metrics.items()},
        "seed": card.seed,
        "versions": dict(_versions()),
        "config": _plain(run_config or {}),
    }


def _base_name(base: nn.Module, config: PeftConfig) -> str | None:
    name = config.base_model_name_or_path or getattr(base, "name_or_path", None)
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name or None


def _build_options(base: nn.Module) -> dict[str, Any]:
    """What the base's `from_pretrained` needs to build the same modules: labels of the head, whether it pools, and how
    it was quantised."""
    options: dict[str, Any] = {}
    if "add_pooling_layer" in inspect.signature(type(base).__init__).parameters:
        options["add_pooling_layer"] = getattr(base, "pooler", None) is not None
    config = getattr(base, "config", None)
    quantizer: Any = getattr(base, "hf_quantizer", None)
    if quantizer is not None and not quantizer.pre_quantized:
        options["quantization_config"] = _plain(quantizer.quantization_config.to_dict())
    if "Classification" in type(base).__name__ and config is not None:
        fields = ("id2label", "label2id", "problem_type")
        options |= {field: _plain(getattr(config, field)) for field in fields if getattr(config, field, None)}
    return options


def _versions() -> Iterator[tuple[str, str]]:
    for package in _PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue


def _plain(value: Any) -> Any:
    """`value` in the types that YAML has."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, bool | int | float | str) or value is None:
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {key if isinstance(key, int) else str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((_plain(item) for item in value), key=str)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value)


def adapter_folder(directory: str | Path) -> Path:
    """The adapter folder that `directory` is, or has below `adapter/`."""
    folder = Path(directory)
    recover_folder(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no adapter folder {folder}; pass the folder that holds {ADAPTER_CONFIG}.")
    below = folder / "adapter"
    if not (folder / ADAPTER_CONFIG).exists() and (below / ADAPTER_CONFIG).exists():
        return below
    return folder


def read_run(folder: Path) -> dict[str, Any] | None:
    """The content of petune.yaml, None where there is none."""
    path = folder / RUN_FILE
    if not path.exists():
        return None
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} cannot be read ({' '.join(str(error).split())}); export the adapter again."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no mapping; export the adapter again.")
    return content
