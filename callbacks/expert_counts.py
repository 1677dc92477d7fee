"""What the routers of a model choose, counted where it is chosen."""

import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from petune.adapters.emoe.router import Router
from petune.state import plain_name

Counts = dict[str, Tensor]
"""By layer, the (token, expert) pairs of each expert, int64 [num_experts]."""

_IGNORED = -100  # the label of a position without one, in torch and transformers


class RouterHooks:
    """Add every choice of a model's routers to `counts`, without padding and without waiting for the device.

    Padding is where the attention mask is 0 that the innermost Hugging Face model around the router was called with:
    the encoder and the decoder of a model have one each. A decoder without a mask counts where there is a label.

    Args:
        model: with routers in it, in adapters or left there by `merge_and_unload(keep_routing=True)`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.counts: Counts | None = None
        """Where to count; None for nowhere. A layer is in it from its first choice on."""
        self.paused = False
        self._masks: dict[nn.Module, Any] = {}
        self._label_masks: dict[nn.Module, Tensor | None] = {}
        self._unfit: set[str] = set()
        self._handles: list[RemovableHandle] = []
        routers = find_routers(model)
        modules = dict(model.named_modules())
        owners = {path: _innermost_model(path, modules) for path in routers}
        for path, layer in routers.items():
            hook = partial(self._add, layer, owners[path])
            self._handles.append(modules[path].register_forward_hook(hook))
        for owner in dict.fromkeys(owners.values()):
            self._before(owner, partial(self._take_mask, owner))
        for one in modules.values():
            if isinstance(one, PreTrainedModel) and one.config.is_encoder_decoder and "labels" in _arguments(one):
                self._before(one, partial(self._take_labels, one.get_decoder()))

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # --- which tokens count ---

    def _before(self, model: nn.Module, take: Callable[[dict[str, Any]], None]) -> None:
        """Call `take` with the arguments of each forward of `model`, by name."""
        names = _arguments(model)

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            take({**dict(zip(names, args, strict=False)), **kwargs})

        self._handles.append(model.register_forward_pre_hook(hook, with_kwargs=True))

    def _take_labels(self, decoder: nn.Module, given: dict[str, Any]) -> None:
        labels = given.get("labels")  # of tokens, or of whole texts
        self._label_masks[decoder] = labels != _IGNORED if isinstance(labels, Tensor) and labels.dim() == 2 else None

    def _take_mask(self, owner: nn.Module, given: dict[str, Any]) -> None:
        mask, tokens = given.get("attention_mask"), given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        if isinstance(mask, Tensor) and mask.dim() == 2 and isinstance(tokens, Tensor):
            mask = mask[:, -tokens.shape[1] :]  # with a cache it covers the tokens of earlier calls too
        self._masks[owner] = self._label_masks.get(owner) if mask is None else mask

    def _is_real(self, layer: str, owner: nn.Module, chosen: Tensor) -> Tensor | None:
        """Whether each token is no padding, [..., 1]; None where all count."""
        mask, tokens = self._masks.get(owner), chosen.shape[:-1]
        if mask is None:
            return None
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        if isinstance(mask, Tensor) and mask.dim() == 2 and tokens in (mask.shape, (mask.numel(),)):
            return mask.reshape(*tokens, 1) != 0
        if layer not in self._unfit:
            self._unfit.add(layer)
            warnings.warn(
                f"ExpertUsage cannot lay the attention mask, {shape}, over the tokens that {layer!r} routes, "
                f"{tuple(tokens)}, so padding counts there; give batches without padding where that matters.",
                stacklevel=2,
            )
        return None

    # --- counting ---

    def _add(self, layer: str, owner: nn.Module, router: Router, _: Any, chosen: Tensor) -> None:
        if self.counts is None or self.paused:
            return
        if layer not in self.counts:
            with torch.inference_mode(False):  # what is made in that mode could not be added to outside of it
                self.counts[layer] = torch.zeros(router.num_experts, dtype=torch.int64, device=chosen.device)
        real = self._is_real(layer, owner, chosen)
        pairs = torch.ones_like(chosen) if real is None else real.expand_as(chosen).long()
        # Not bincount: on CUDA it waits for the device, to learn how long its result is.
        self.counts[layer].scatter_add_(0, chosen.flatten(), pairs.flatten())


def find_routers(model: nn.Module) -> dict[str, str]:
    """By path of each router its name: its layer's in the base model, and the adapter's where a layer has several."""
    layers = {path: _layer(path) for path, module in model.named_modules() if isinstance(module, Router)}
    adapters = Counter(layer for layer, _ in layers.values())
    return {
        path: f"{layer} ({adapter})" if adapters[layer] > 1 else layer for path, (layer, adapter) in layers.items()
    }


def total(parts: Iterable[Counts]) -> Counts:
    """The sum, on the CPU."""
    result: Counts = {}
    for counts in parts:
        for layer, pairs in counts.items():
            result[layer] = result[layer] + pairs.cpu() if layer in result else pairs.cpu()
    return result


def sum_over_processes(counts: dict[str, Counts]) -> dict[str, Counts]:
    """The sum over all processes, whatever tasks each of them had, on the CPU."""
    own = {task: total([by_layer]) for task, by_layer in counts.items()}
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return own
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, own)
    tasks = dict.fromkeys(task for part in parts for task in part)  # in the same order on every process
    return {task: total(part.get(task, {}) for part in parts) for task in tasks}


def _layer(path: str) -> tuple[str, str]:
    name = plain_name(path).removeprefix("base_model.model.")
    layer, _, adapter = name.partition(".petune_emoe_router.")
    return layer.removesuffix(".router"), adapter


def _arguments(model: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(model.forward).parameters)


def _innermost_model(path: str, modules: dict[str, nn.Module]) -> nn.Module:
    """The innermost Hugging Face model around the module, or what is outermost."""
    while path and not isinstance(modules[path], PreTrainedModel):
        path = path.rpartition(".")[0]
    return modules[path]
