"""`Group`: the projections of one input of one parent module, computed by one operator."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Together = Callable[[Sequence[Any], Tensor], Sequence[Tensor] | None]
"""From sibling layers and their input to the output of each, or to None where each must compute its own."""


class _Pending(NamedTuple):
    """What was computed in advance, and for which input under which circumstances it holds."""

    x: Tensor
    key: object
    circumstances: tuple[object, ...]
    outputs: dict[int, Tensor]
    """id of a layer to its output; the parent keeps the layers alive while its forward runs."""


class Group:
    """Lets the first of some sibling layers that is called in a forward of their parent compute the outputs of all.

    Each of the others takes its output if it is called with the very same tensor, unchanged, under the same autograd
    and autocast modes; everything else goes the way of a layer of its own. What is not taken is dropped when the
    parent's forward ends, by an exception too.

    Between two calls a group holds neither modules nor tensors: a copy of the parent, or of one layer, is independent.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        """The layers' names in the parent."""
        self.off = ""
        """Why the group was given up for good, or ""."""
        self._parent: nn.Module | None = None
        self._pending: _Pending | None = None

    def attach(self, parent: nn.Module) -> None:
        """Group the layers and watch the parent's forward."""
        for name in self.names:
            parent.get_submodule(name).__dict__["group"] = self
        parent.register_forward_pre_hook(self._open)
        parent.register_forward_hook(self._close, always_call=True)

    def take(self, layer: nn.Module, x: Tensor, together: Together, key: object = None) -> Tensor | None:
        """The layer's output for x; None where the layer must compute it alone.

        Args:
            layer: which of them is called.
            x: its input.
            together: computes the outputs of all.
            key: what else they depend on; each of them must be called with the very same one.
        """
        parent, pending = self._parent, self._pending
        if parent is None or self.off or torch.compiler.is_compiling():
            return None
        if pending is None:
            outputs = self._outputs(parent, layer, x, together)
            if outputs is None:
                self._parent = None  # the others need not look again in this call of the parent
                return None
            self._pending = pending = _Pending(x, key, _circumstances(x), outputs)
        elif not (x is pending.x and key is pending.key and id(layer) in pending.outputs) or (
            _circumstances(x) != pending.circumstances
        ):
            self.off, self._pending = "its projections were not called once each with one input", None
            return None
        y = pending.outputs.pop(id(layer))
        if not pending.outputs:
            self._pending = None
        return y

    def _outputs(self, parent: nn.Module, layer: nn.Module, x: Tensor, together: Together) -> dict[int, Tensor] | None:
        layers: list[Any] = [parent._modules.get(name) for name in self.names]
        # DataParallel runs replicas of the parent and its children in threads that share this object
        if layer not in layers or torch._C._are_functorch_transforms_active():
            return None
        if any(sibling is None or sibling.__dict__.get("group") is not self for sibling in layers):
            return None
        ys = together(layers, x)
        return None if ys is None else {id(sibling): y for sibling, y in zip(layers, ys, strict=True)}

    def _open(self, parent: nn.Module, args: tuple[Any, ...]) -> None:
        if not torch.compiler.is_compiling():
            self._parent, self._pending = parent, None

    def _close(self, parent: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling():
            if self._pending is not None and output is not None:  # no output: an exception ended the forward
                self.off = "its forward ended before all projections were called"
            self._parent = self._pending = None


def detach(parent: nn.Module) -> list[Group]:
    """Remove the groups among a module's children, as if they had never been there, and return them."""
    groups: list[Group] = []
    for hooks in (parent._forward_pre_hooks, parent._forward_hooks):
        for key, hook in list(hooks.items()):
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, Group):
                del hooks[key]
                parent._forward_hooks_always_called.pop(key, None)
                groups.append(owner)
    for child in parent.children():
        if isinstance(child.__dict__.get("group"), Group):
            del child.__dict__["group"]
    return groups


def _circumstances(x: Tensor) -> tuple[object, ...]:
    """All that the output of a layer depends on besides its own state and the identity of x."""
    autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    return (
        0 if x.is_inference() else x._version,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_autocast_dtype(x.device.type) if autocast else None,
    )
