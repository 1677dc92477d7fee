"""Taking our forward hooks off again, from modules that may be copies of those they were put on."""

from collections.abc import Callable
from typing import Any

from torch import nn


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
