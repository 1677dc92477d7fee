"""Models whose modules are smaller than their config says: cut, saved and loaded again."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

MARK = "petune_prune.json"
"""The file in a model folder that says that its modules are smaller than its config."""


def mark_pruned(model: nn.Module, *, width: int, kept: int) -> nn.Module:
    """Let `model` know that it was cut from `width` residual channels to `kept`, for whoever saves it."""
    about = {"format": 1, "class": type(model).__name__, "width": width, "kept": kept}
    model.petune_pruned = about  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    return model


def write_mark(model: nn.Module, folder: Path) -> None:
    """Write `petune_prune.json` beside a saved model, if it was cut."""
    about = getattr(model, "petune_pruned", None)
    if about is not None:
        (folder / MARK).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def load_pruned(directory: str | Path) -> nn.Module:
    """Load a pruned model that its config cannot express, in eval mode, as `petune.export_merged` wrote it.

    Raises:
        FileNotFoundError: the folder has no petune_prune.json.
        ValueError: its class is none of transformers', or the weights lack something.
    """
    folder = Path(directory)
    if not (folder / MARK).is_file():
        raise FileNotFoundError(f"{folder} has no {MARK}, so it is no pruned model; load it with from_pretrained.")
    about = json.loads((folder / MARK).read_text(encoding="utf-8"))
    cls = getattr(transformers, about["class"], None)
    if cls is None:
        raise ValueError(f"{folder} holds a {about['class']}, which this version of transformers does not have.")
    tensors = {key: tensor for path in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(path).items()}
    config = cls.config_class.from_pretrained(str(folder))
    model = cls._from_config(
        config, dtype=next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.float32)
    )
    missing = [name for name, _ in model.named_parameters() if name not in tensors]
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} weights, {missing[0]} first; export the model again.")
    return mark_pruned(resize(model, tensors), width=about["width"], kept=about["kept"]).eval()


def resize(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Give parameters and buffers the values and shapes of `tensors`, and the modules their sizes, in place.

    Parameters that were tied get tensors of their own.

    Raises:
        KeyError: a tensor for which the model has no place.
    """
    modules = dict(model.named_modules())
    for key, tensor in tensors.items():
        path, _, name = key.rpartition(".")
        module = modules[path]
        if name in module._parameters:
            old = module._parameters[name]
            module._parameters[name] = nn.Parameter(tensor, requires_grad=old is not None and old.requires_grad)
        elif name in module._buffers:
            module._buffers[name] = tensor
        else:
            raise KeyError(f"the model has no parameter or buffer {key!r}; load it with the class it was saved from.")
    for path in {key.rpartition(".")[0] for key in tensors}:
        _set_sizes(modules[path])
    return model


def _set_sizes(module: Any) -> None:
    """Let the sizes that a module states follow its weight."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, Conv1D):
        module.nx, module.nf = weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * module.groups
