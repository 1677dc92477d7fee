"""What a model costs: parameters, and the bytes that a training step keeps for its backward."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from petune.state import adapter_keys


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters of `model`, each shared one once.

    Returns:
        total, trainable, adapter: numbers of elements (a 4-bit weight counts as stored, two to a byte);
        trainable_bytes, adapter_bytes, total_bytes: as they lie in memory; adapter includes persistent buffers.
    """
    parameters = list(model.parameters())
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    state = model.state_dict()
    adapter = [state[key] for key in adapter_keys(model)]
    return {
        "total": _elements(parameters),
        "trainable": _elements(trainable),
        "adapter": _elements(adapter),
        "total_bytes": _bytes(parameters),
        "trainable_bytes": _bytes(trainable),
        "adapter_bytes": _bytes(adapter),
    }


class SavedBytes:
    """Counts, while it is entered, the bytes that autograd keeps for backward.

    Every storage counts once, however many operations save a view of it. Storages of `exclude` (the parameters: they
    are there anyway) do not count. A storage freed before the end of the block still counts.
    """

    def __init__(self, exclude: Iterable[Tensor] = ()) -> None:
        self._excluded = {_storage_key(part) for tensor in exclude for part in _stored(tensor)}
        self._storages: dict[tuple[torch.device, int], int] = {}
        self._alive: list[Tensor] = []
        self._hooks: Any = None

    @property
    def total(self) -> int:
        """Bytes kept."""
        return sum(self._storages.values())

    def __enter__(self) -> "SavedBytes":
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        self._alive.clear()

    def _pack(self, tensor: Tensor) -> Tensor:
        for part in _stored(tensor):
            if part.layout is torch.strided and not part.is_meta:
                key = _storage_key(part)
                if key not in self._excluded and key not in self._storages:
                    self._storages[key] = part.untyped_storage().nbytes()
                    self._alive.append(part.detach())  # so that no later storage takes the same address
        return tensor


def saved_for_backward_bytes(run: Callable[[], Any], exclude: nn.Module | Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for backward while `run` computes a forward pass.

    Args:
        run: the forward pass, for example `lambda: model(**batch).loss`.
        exclude: tensors that do not count, or the module whose parameters and buffers do not.
    """
    kept = [*exclude.parameters(), *exclude.buffers()] if isinstance(exclude, nn.Module) else exclude
    with SavedBytes(kept) as saved:
        run()
    return saved.total


def _unpack(tensor: Tensor) -> Tensor:
    return tensor


def _storage_key(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def _elements(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(part.numel() * part.element_size() for tensor in tensors for part in _stored(tensor))


def _stored(tensor: Tensor) -> Iterator[Tensor]:
    """What lies in memory of a tensor: codes and scales of a quantised one of torchao; any other itself."""
    if not is_traceable_wrapper_subclass(tensor) or isinstance(tensor, DTensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from _stored(getattr(tensor, name))
