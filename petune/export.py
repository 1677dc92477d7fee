"""Write what was trained: an adapter folder, a merged model, or a plain LoRA; whole, checked, or not at all."""

import copy
import os
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import try_to_load_from_cache
from peft import PeftModel, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.peft_types import PeftType
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from petune.atomic import copy_over, replacing_folder
from petune.card import CardInfo, render_card
from petune.convert import plain_lora, unwrap_heads
from petune.load import file_digest, load_adapter
from petune.pruned import MARK, write_mark
from petune.quantized.slots import packed_names, packed_weights
from petune.quantized.store import StoreReport, TaskStore, write_tasks
from petune.quantized.tuner import QuantizedConfig
from petune.run import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RUN_FILE, Run, describe_run, load_run
from petune.state import active_adapter, base_parameters, peft_config, plain_name, unwrap

__all__ = [
    "CardInfo",
    "ExportReport",
    "Run",
    "StoreReport",
    "TaskStore",
    "check_target",
    "export_lora",
    "export_merged",
    "load_adapter",
    "load_run",
    "save_adapter",
    "save_model",
    "write_tasks",
]

_ROOT = "base_model.model."  # of every name in a PeftModel


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote."""

    directory: Path
    """The folder."""
    files: dict[str, int]
    """File name to bytes."""
    tensors: int
    """Tensors in the weights, read back and found equal to the model's."""
    parameters: int
    """Weights in them, packed ones counted one by one."""
    dead: tuple[str, ...] = ()
    """Parts of the adapter (such as lora_B) that are zero in every layer: training never reached them."""
    relative_error: float = 0.0
    """‖ΔW of what was written − ΔW of the adapter‖ / ‖ΔW‖, over all layers; 0 where nothing is approximated."""
    dense_bytes: int = 0
    """Of the weights before channels were pruned; 0 where none were."""
    dense_parameters: int = 0
    """Before channels were pruned; 0 where none were."""
    compact: bool = False
    """Whether the config cannot say how narrow the pruned model is, so that only `petune.load_pruned` loads it."""

    def __str__(self) -> str:
        kib = sum(self.files.values()) / 1024
        written = f"{self.directory}: {self.parameters:,} parameters in {self.tensors} tensors, {kib:,.0f} KiB"
        if not self.dense_parameters:
            return written
        form = "compact, for petune.load_pruned" if self.compact else "stock, for from_pretrained"
        return (
            f"{written}; pruned from {self.dense_parameters:,} parameters, {self.dense_bytes / 1024:,.0f} KiB ({form})"
        )


def save_adapter(
    model: nn.Module,
    directory: str | Path,
    *,
    run_config: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    card: CardInfo | None = None,
) -> ExportReport:
    """Write the active adapter of `model` as a folder that `load_adapter`, and PEFT itself, read.

    The folder is written beside `directory`, read back and compared, and only then put in its place: whatever fails,
    the adapter that was there stays. Files of others in it are kept.

    Args:
        model: a PeftModel, compiled or not.
        directory: becomes the adapter folder.
        run_config: the run's configuration, for petune.yaml and the card.
        tokenizer: saved beside, so that nothing has to be looked up on the hub.
        card: what the model card says beyond what the model knows.

    Raises:
        FileExistsError: `directory` holds something, and no adapter.
        OSError: a full disk, or no right to write.
        TypeError: not a PeftModel.
        ValueError: a tensor of the adapter is not finite, or not what was read back.
    """
    wrapped = unwrap(model)
    if not isinstance(wrapped, PeftModel):
        raise TypeError(
            f"save_adapter was asked to save a {type(wrapped).__name__}, which has no adapter; wrap it with "
            "peft.get_peft_model, or save a fully trained model with save_pretrained."
        )
    directory, card = Path(directory), card or CardInfo()
    check_target(directory, ADAPTER_CONFIG)
    with _told(f"the adapter was not saved to {directory}"), replacing_folder(directory) as folder:
        expected = _write_weights(wrapped, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
        _check_written(folder / ADAPTER_WEIGHTS, expected)
        dead, parameters = _dead_parts(wrapped, expected), _count(wrapped, expected)
        run = describe_run(wrapped, run_config, card, parameters)
        (folder / "README.md").write_text(render_card(card, run), encoding="utf-8")
        run["files"] = {path.name: file_digest(path) for path in sorted(folder.iterdir()) if path.is_file()}
        (folder / RUN_FILE).write_text(yaml.safe_dump(run, sort_keys=False, allow_unicode=True), encoding="utf-8")
        _carry_over(directory, folder, _ours(directory))
    if dead:
        warnings.warn(
            f"{directory}: {', '.join(dead)} is zero in every layer, so the adapter does nothing; it was not trained, "
            "or its gradients did not reach it.",
            stacklevel=2,
        )
    return ExportReport(directory, _sizes(directory), len(expected), parameters, dead)


def export_merged(source: nn.Module | str | Path, directory: str | Path, *, tokenizer: Any = None) -> ExportReport:
    """Write the base with the adapter folded in: a plain Hugging Face folder that needs neither PEFT nor PETune.

    An adapter that prunes leaves a smaller model; where its config cannot say how narrow that is, `load_pruned` reads
    the folder, and the report says `compact`.

    Args:
        source: a PeftModel (left as it is: a copy is merged), or an adapter folder.
        directory: becomes the model folder.
        tokenizer: saved beside.

    Raises:
        FileExistsError: `directory` holds something, and no model.
        OSError: a full disk, or no right to write.
        RuntimeError: the adapter prunes, and has not decided yet what.
        TypeError: the method has nothing to fold in.
        ValueError: the merged weights are not finite, or the method refuses to merge.
    """
    model = _as_model(source, copied=True)
    check_target(Path(directory), "config.json")
    if not isinstance(model.base_model, BaseTuner):
        kind = peft_config(model).peft_type
        raise TypeError(f"{kind} adds tokens, not weights, so it cannot be merged; save the adapter instead.")
    dense: dict[str, Tensor] = {name.removeprefix(_ROOT): tensor for name, _, tensor in base_parameters(model)}
    merged: Any = unwrap_heads(model).merge_and_unload(safe_merge=True)
    report = save_model(merged, directory, tokenizer=tokenizer)
    if all(name not in dense or tensor.shape == dense[name].shape for name, tensor in merged.named_parameters()):
        return report
    return replace(
        report,
        dense_bytes=sum(tensor.nbytes for tensor in dense.values()),
        dense_parameters=sum(tensor.numel() for tensor in dense.values()),
        compact=(report.directory / MARK).exists(),
    )


def save_model(model: nn.Module, directory: str | Path, *, tokenizer: Any = None) -> ExportReport:
    """Write a Hugging Face model as a plain folder, replaced whole or not at all.

    Raises:
        FileExistsError: `directory` holds something, and no model.
        OSError: a full disk, or no right to write.
        TypeError: not a Hugging Face model.
        ValueError: a tensor is not finite.
    """
    plain, directory = unwrap(model), Path(directory)
    check_target(directory, "config.json")
    if not isinstance(plain, PreTrainedModel):
        raise TypeError(f"{type(plain).__name__} is no Hugging Face model; save it with torch.save(state_dict()).")
    tensors = dict(plain.named_parameters())
    broken = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
    if broken:
        raise ValueError(f"{broken[0]} is not finite (NaN or infinite), so the model was not saved; train it again.")
    with _told(f"the model was not saved to {directory}"), replacing_folder(directory) as folder:
        plain.save_pretrained(str(folder))
        write_mark(plain, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
        _carry_over(directory, folder, {MARK, *(path.name for path in directory.glob("*model*"))})
    elements = sum(tensor.numel() for tensor in tensors.values())
    return ExportReport(directory, _sizes(directory), len(tensors), elements)


def export_lora(
    source: nn.Module | str | Path,
    directory: str | Path,
    *,
    rank: int | float | None = None,
    run_config: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    card: CardInfo | None = None,
) -> ExportReport:
    """Write the adapter as a plain LoRA, which every tool reads.

    LoRA adapters, fused ones among them, are written as they are, and so are the factors of a low-rank method, such as
    Bi-LoRA's quantised ones. Other methods that add ΔW to a weight are approximated by the leading singular vectors of
    ΔW, with `relative_error` in the report. A quantised head becomes a plain one.

    Args:
        source: a PeftModel (left as it is), or an adapter folder.
        directory: becomes the adapter folder.
        rank: of the approximation; a fraction asks for the smallest rank that keeps this share of ‖ΔW‖² in a layer.
            None takes factors as they are, and approximates other methods with 0.999.
        run_config, tokenizer, card: as in `save_adapter`.

    Raises:
        TypeError: the method's change is not a ΔW.
        ValueError: rank is not within 1..min(in_features, out_features), or not within (0, 1].
    """
    model = _as_model(source)
    options: dict[str, Any] = {"run_config": run_config, "tokenizer": tokenizer, "card": card}
    if peft_config(model).peft_type == PeftType.LORA:
        return save_adapter(model, directory, **options)
    lora, error = plain_lora(model, rank)
    report = save_adapter(lora, directory, **options)
    return replace(report, relative_error=error)


def check_target(directory: Path, mark: str = ADAPTER_CONFIG) -> None:
    """Refuse to replace a folder that holds something else than an earlier export.

    Raises:
        FileExistsError: it is a file, or a folder that is not empty and has no `mark`.
    """
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir()) and not (directory / mark).exists()):
        raise FileExistsError(f"{directory} exists and holds no {mark}; name a new folder, or an earlier export.")


def _write_weights(model: PeftModel, folder: Path) -> dict[str, Tensor]:
    """Save weights and config as PEFT does; returns what the file must hold."""
    name = active_adapter(model)
    embeddings: Any = True if _embeddings_were_resized(model) else "auto"
    with _without_hub(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Could not find a config file")  # answered just above
        model.save_pretrained(str(folder), selected_adapters=[name], save_embedding_layers=embeddings)
        state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=embeddings)
    if name != "default":  # PEFT puts those one folder down
        for path in (folder / name).iterdir():
            path.rename(folder / path.name)
        (folder / name).rmdir()
    expected = {plain_name(key): tensor for key, tensor in state.items()}
    if expected.keys() != state.keys():
        written = load_file(folder / ADAPTER_WEIGHTS)
        renamed = {plain_name(key): tensor for key, tensor in written.items()}
        save_file(renamed, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    return expected


def _check_written(path: Path, expected: Mapping[str, Tensor]) -> None:
    """Compare the file with the model."""
    written = load_file(path)
    if written.keys() != expected.keys() or not expected:
        different = sorted(written.keys() ^ expected.keys())[:5]
        raise ValueError(
            f"{path.name} does not hold the adapter's tensors (different: {different}); nothing was saved."
        )
    for key, tensor in written.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{key} is not finite (NaN or infinite), so the adapter was not saved; train it again.")
        if not torch.equal(tensor, expected[key].detach().cpu()):
            raise ValueError(f"{key} was read back with other values than it has in the model; nothing was saved.")


def _dead_parts(model: PeftModel, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The parts of the adapter that are zero in every layer."""
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(PeftType(peft_config(model).peft_type))
    # a packed weight is zero where its mean and scale are: none of its bits says so
    packed = {entry.name: stats for entry, stats in packed_weights(model, active_adapter(model), tensors)}
    alive: dict[str, bool] = {}
    for key, tensor in {**_without_blobs(model, tensors), **packed}.items():
        part = next((part for part in key.split(".") if prefix and part.startswith(prefix)), None)
        if part is not None:
            alive[part] = alive.get(part, False) or bool(tensor.any())
    return tuple(sorted(part for part, lives in alive.items() if not lives))


def _count(model: PeftModel, tensors: Mapping[str, Tensor]) -> int:
    """Weights of the adapter; packed ones one by one, and without what is kept of their statistics."""
    plain = {key: tensor for key, tensor in _without_blobs(model, tensors).items() if not key.endswith(".anchor")}
    packed = packed_weights(model, active_adapter(model), tensors)
    return sum(tensor.numel() for tensor in plain.values()) + sum(entry.shape.numel() for entry, _ in packed)


def _without_blobs(model: PeftModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    config = peft_config(model)
    blobs = packed_names(config) if isinstance(config, QuantizedConfig) else ()
    return {key: tensor for key, tensor in tensors.items() if key not in blobs}


def _is_finite(tensor: Tensor) -> bool:
    # torchao's tensors have no isfinite
    plain = tensor.dequantize() if type(tensor).__module__.startswith("torchao.") else tensor
    return bool(plain.isfinite().all())


def _ours(directory: Path) -> set[str]:
    """The files of an earlier export."""
    names = {ADAPTER_CONFIG, ADAPTER_WEIGHTS, RUN_FILE, "README.md", "adapter_model.bin"}
    if (directory / RUN_FILE).exists():
        try:
            content: Any = yaml.safe_load((directory / RUN_FILE).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            return names  # damaged: keep everything that might be somebody's
        names |= set(content.get("files", {})) if isinstance(content, dict) else set()
    return names


def _carry_over(old: Path, new: Path, ours: set[str]) -> None:
    if not old.is_dir():
        return
    for path in old.iterdir():
        if path.name not in ours and not (new / path.name).exists():
            copy_over(path, new / path.name)


def _sizes(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(directory.iterdir()) if path.is_file()}


def _as_model(source: nn.Module | str | Path, *, copied: bool = False) -> PeftModel:
    if isinstance(source, str | Path):
        return load_adapter(source)
    model = unwrap(source)
    if not isinstance(model, PeftModel):
        raise TypeError(f"{type(model).__name__} has no adapter to export; pass a PeftModel or an adapter folder.")
    return copy.deepcopy(model) if copied else model


def _embeddings_were_resized(model: PeftModel) -> bool:
    """PEFT's own question, answered from the disk: it would ask the hub, and wait for it where there is none."""
    base = model.get_base_model()
    name = getattr(base, "name_or_path", "")
    cached = Path(name) / "config.json" if name and Path(name).is_dir() else None
    if name and cached is None:
        found = try_to_load_from_cache(name, "config.json")
        cached = Path(found) if isinstance(found, str) else None
    if cached is None or not cached.exists() or not isinstance(base, PreTrainedModel):
        return False
    original = type(base.config).from_pretrained(str(cached.parent))
    return getattr(original, "vocab_size", None) != getattr(base.config, "vocab_size", None)


@contextmanager
def _without_hub() -> Generator[None]:
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before


@contextmanager
def _told(what: str) -> Generator[None]:
    """Say of an error in writing what became of the old folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(
            getattr(error, "errno", None) or 0, f"{what} ({reason}); what was there before is untouched."
        ) from error
