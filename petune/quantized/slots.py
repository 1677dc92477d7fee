"""A model whose adapter is packed weights alone: the slots it has for a task's tensors, and how they are filled."""

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils.peft_types import PeftType
from torch import Tensor, nn

from petune.quantized.linear import PackedLinear
from petune.quantized.packing import Entry, decode, packed_bytes
from petune.quantized.tuner import QuantizedConfig, layout_digest, quantized_weights
from petune.state import adapter_keys, plain_name

_ROOT = "base_model.model."  # of every name in a PEFT checkpoint
_HEAD = "modules_to_save"


def packed_names(config: QuantizedConfig) -> tuple[str, str]:
    """What the blob and the table of a method are called in a checkpoint."""
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[PeftType(config.peft_type)]
    return f"{_ROOT}{prefix}bits", f"{_ROOT}{prefix}stats"


def packed_weights(model: PeftModel, adapter: str, tensors: Mapping[str, Tensor]) -> list[tuple[Entry, Tensor]]:
    """The weights that a checkpoint of the adapter has packed, each with its statistics; none of one without."""
    config = model.peft_config[adapter]
    blob, table = packed_names(config) if isinstance(config, QuantizedConfig) else ("", "")
    if blob not in tensors:
        return []
    entries = [entry for entry, _ in quantized_weights(model, adapter)]
    parts = decode(entries, tensors[blob], tensors[table])
    return [(entry, stats) for entry, (_, stats) in zip(entries, parts, strict=True)]


@torch.no_grad()
def fill(model: PeftModel, adapter: str, tensors: Mapping[str, Tensor], layout: str | None) -> None:
    """Make the adapter that of a checkpoint: bits and statistics in the place of latents, everything else copied.

    What has the same shape is written in place. Nothing is written unless everything fits.

    Args:
        tensors: a packed checkpoint of the adapter's config; heads may have another number of labels than the model's.
        layout: `QuantizedConfig.layout` of the checkpoint.

    Raises:
        ValueError: the checkpoint lacks tensors, or has others or of other sizes than the model has a place for.
    """
    config: Any = model.peft_config[adapter]
    slots = quantized_weights(model, adapter)
    others = plain_tensors(model, adapter, slots)
    blob, table = packed_names(config)
    different = sorted(tensors.keys() ^ {*others, *((blob, table) if slots else ())})
    if different:
        what = "has no place for" if different[0] in tensors else "needs, beside what is stored,"
        raise ValueError(
            f"the model {what} {different[0]}{_and_more(different)}; pass the base that it was trained on."
        )
    for key, path in others.items():
        check_shape(key, tensors[key].shape, _tensor(model, path).shape, is_head=_HEAD in path.split("."))
    entries = _with_stored_head(slots, tensors[blob]) if slots else []
    parts = decode(entries, tensors[blob], tensors[table]) if slots else []
    if layout not in (None, layout_digest(entries)):
        raise ValueError(
            "it was made for modules of other names or shapes than this model's; pass the base that it was trained on."
        )
    for (_, path), entry, (bits, stats) in zip(slots, entries, parts, strict=True):
        _put_packed(model, path, entry, bits, stats)
    for key, path in others.items():
        _put(model, path, tensors[key])
    config.layout = layout


def plain_tensors(model: nn.Module, adapter: str, slots: list[tuple[Entry, str]]) -> dict[str, str]:
    """Name in a checkpoint to name in the model, of an adapter's tensors that are stored as they are."""
    packed = {path for _, path in slots}
    names = [name for name in adapter_keys(model) if adapter in name.split(".")]
    kept = [name for name in names if name.rpartition(".")[0] not in packed]
    return {_without(_without(name, adapter), _HEAD): name for name in kept}


def _without(path: str, part: str) -> str:
    """A name without the last of its parts that is `part`."""
    parts = plain_name(path).split(".")
    at = len(parts) - 1 - parts[::-1].index(part) if part in parts else len(parts)
    return ".".join(parts[:at] + parts[at + 1 :])


def _with_stored_head(slots: list[tuple[Entry, str]], blob: Tensor) -> list[Entry]:
    """The entries, a head's with as many rows as the blob has for it: tasks differ in their labels."""
    entries = [entry for entry, _ in slots]
    heads = [index for index, (_, path) in enumerate(slots) if _HEAD in path.split(".")]
    if len(heads) != 1:
        return entries
    head = entries[heads[0]]
    rest = blob.numel() - sum(entry.size for entry in entries) + head.size
    shape = torch.Size((max(rest, 0) * 8 // (head.shape[1] * head.quantization.bits), head.shape[1]))
    if packed_bytes(shape.numel(), head.quantization.bits) == rest > 0:
        entries[heads[0]] = head._replace(shape=shape)
    return entries


def check_shape(key: str, stored: torch.Size, found: torch.Size, is_head: bool) -> None:
    """Raises ValueError where a tensor of a checkpoint does not fit the model's; a head's may have other rows."""
    if stored != found and not (is_head and len(stored) == len(found) and stored[1:] == found[1:]):
        raise ValueError(
            f"{key} is stored with the shape {list(stored)}, and the model's has {list(found)}; pass the base that it "
            "was trained on."
        )


def _put_packed(model: nn.Module, path: str, entry: Entry, bits: Tensor, stats: Tensor) -> None:
    out_features, in_features = entry.shape
    module: Any = model.get_submodule(path)
    fits = (module.out_features, module.in_features, module.quantization) == (*entry.shape, entry.quantization)
    if not (isinstance(module, PackedLinear) and fits):
        module = PackedLinear(in_features, out_features, entry.quantization).to(_device(model, path)).eval()
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
    module.bits.copy_(bits)
    module.stats.copy_(stats)


def _put(model: nn.Module, path: str, stored: Tensor) -> None:
    owner, _, name = path.rpartition(".")
    module: Any = model.get_submodule(owner)
    found = _tensor(model, path)
    if found.shape == stored.shape and not found.is_meta:
        found.copy_(stored)
        return
    new = stored.to(_device(model, path), found.dtype, copy=True)
    setattr(module, name, nn.Parameter(new, requires_grad=False) if isinstance(found, nn.Parameter) else new)
    if isinstance(module, nn.Linear) and name == "weight":
        module.out_features = len(new)


def _tensor(model: nn.Module, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    return getattr(model.get_submodule(owner), name)


def _device(model: nn.Module, path: str) -> torch.device:
    """Where the base has the module that holds this one."""
    while path:
        path = path.rpartition(".")[0]
        holder: Any = model.get_submodule(path)
        base = getattr(holder, "base_layer", None) or getattr(holder, "original_module", None)
        if base is not None:
            return next((tensor.device for tensor in base.parameters()), torch.device("cpu"))
    return torch.device("cpu")


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
