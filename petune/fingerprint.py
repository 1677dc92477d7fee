"""Tell one base model from another, so that an adapter is never put on the wrong one in silence."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from petune.state import backbone, base_parameters

_TENSORS = 8
_ELEMENTS = 16_384  # a tensor: enough to tell two models apart, milliseconds for one of 70 B parameters
_COMPARED = ("model_type", "hidden_size", "num_layers", "num_parameters")
_ROUND_TO_BF16 = {"bfloat16", "float32", "float64"}


def base_fingerprint(model: nn.Module, *, tensors: bool = True) -> dict[str, Any]:
    """What identifies the base of `model`; the same before and after wrapping, training an adapter, or casting.

    Only the backbone counts: a task head, and a pooler, may be freshly initialised. Matrices are hashed in bfloat16,
    because a float32 and a bfloat16 load of one checkpoint agree there bit for bit.

    Args:
        model: a PeftModel or a plain model.
        tensors: hash matrices too; to be False where training changes the base's own matrices.

    Returns:
        JSON-able: name, model_type, hidden_size, num_layers, num_parameters, dtype, sha256. A field is None where it
        cannot be compared: sizes of a quantised base, the hash of a merged, sharded or meta-device one.
    """
    base = backbone(model)
    config: Any = getattr(base, "config", None)
    text_config: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    parameters = {name: (owner, tensor) for name, owner, tensor in base_parameters(base) if "pooler" not in name}
    quantised = getattr(config, "quantization_config", None) is not None or not all(
        tensor.is_floating_point() for _, tensor in parameters.values()
    )
    matrices = {name: tensor for name, (_, tensor) in sorted(parameters.items()) if tensor.dim() >= 2}
    dtype = next((str(tensor.dtype).removeprefix("torch.") for tensor in matrices.values()), None)
    hashed = tensors and not quantised and not _merged(model)
    return {
        "name": getattr(config, "_name_or_path", None) or None,
        "model_type": getattr(config, "model_type", None) or type(base).__name__,
        "hidden_size": getattr(text_config, "hidden_size", None),
        "num_layers": getattr(text_config, "num_hidden_layers", None),
        "num_parameters": None if quantised else sum(tensor.numel() for _, tensor in parameters.values()),
        "dtype": dtype,
        "sha256": _hash(matrices) if hashed else None,
    }


def check_fingerprint(saved: Mapping[str, Any], model: nn.Module, *, where: str) -> None:
    """Refuse a model whose base is not the one that `saved` describes.

    Args:
        saved: from `base_fingerprint`.
        model: the model about to receive the adapter.
        where: what holds `saved`, for the message: a folder or a checkpoint.

    Raises:
        ValueError: naming both bases and the first field that differs.
    """
    compare_fingerprints(saved, base_fingerprint(model), where=where)


def compare_fingerprints(saved: Mapping[str, Any], found: Mapping[str, Any], *, where: str) -> None:
    """`check_fingerprint` for a model whose fingerprint is already taken."""
    fields = [*_COMPARED, "sha256"] if _comparable(saved.get("dtype"), found["dtype"]) else _COMPARED
    for field in fields:
        wanted = saved.get(field)
        if wanted is None or found[field] is None or wanted == found[field]:
            continue
        what = "weights" if field == "sha256" else field
        raise ValueError(
            f"{where}: the adapter was made for {_describe(saved)}, this model has {_describe(found)} (different "
            f"{what}); load the base that it was made for."
        )


def _merged(model: nn.Module) -> bool:
    return any(getattr(module, "merged_adapters", None) for module in model.modules())


def _hash(matrices: Mapping[str, Tensor]) -> str | None:
    """sha256 over at most `_TENSORS` matrices, evenly chosen, and `_ELEMENTS` elements of each, evenly chosen."""
    names = list(matrices)
    digest = hashlib.sha256()
    for name in names[:: max(1, -(-len(names) // _TENSORS))]:
        tensor = matrices[name].detach()
        if tensor.is_meta or not tensor.is_floating_point() or hasattr(tensor, "placements"):
            return None
        sample = tensor.reshape(-1)[:: max(1, -(-tensor.numel() // _ELEMENTS))]
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(sample.to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest() if names else None


def _comparable(one: str | None, other: str | None) -> bool:
    return one == other or {one, other} <= _ROUND_TO_BF16


def _describe(fingerprint: Mapping[str, Any]) -> str:
    name = fingerprint.get("name") or "an unnamed model"
    sizes = ", ".join(f"{field} {fingerprint[field]}" for field in _COMPARED if fingerprint.get(field) is not None)
    return f"{name} ({sizes})"
