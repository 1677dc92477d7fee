"""Our forward hooks: taking them off again, and what the one that adds a loss must know of the step it is in."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def remove_hooks(root: nn.Module, ours: Callable[[Any], bool]) -> None:
    """Remove the forward hooks and forward pre-hooks for which `ours` is true, at and below `root`.

    A `RemovableHandle` removes from the module it was made for alone, and a deep copy of that has hooks of its own.
    """
    for module in root.modules():
        for hooks, *marks in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called),
        ):
            for key in [key for key, hook in hooks.items() if ours(hook)]:
                del hooks[key]
                for mark in marks:
                    mark.pop(key, None)


def share_of_step(model: nn.Module, kwargs: dict[str, Any]) -> Tensor | float:
    """How much of an optimiser step this forward is, where transformers' Trainer gathers gradients over several.

    It has the model divide its loss by the labels of all of them, and divides by their number no more.
    """
    items, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
    if items is None or not isinstance(labels, Tensor):
        return 1.0
    if getattr(model, "loss_type", None) == "ForCausalLM":
        labels = labels[..., 1:]  # the first token is not predicted, and not counted
    return labels.ne(-100).sum() / items
