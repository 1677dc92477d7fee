"""PetuneBlock: a frozen block, from hidden states to hidden states, and the adapters that live on it."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from petune.blocks import width_of
from petune.layer import AdapterLayer


class PetuneBlock(AdapterLayer):
    """y = block(x) + Σ_name delta(name, x, block(x)), x and y hidden states

    x is the block's first argument, or its `hidden_states`; y is its output, or the first of several. All other
    arguments go in and all other outputs come out as they are. Public attributes that the layer lacks are read from
    the block, for models that ask a block for its `attention_type` and the like. Forward hooks on the block see y with
    the updates: transformers records `hidden_states` by such hooks.
    """

    @property
    def hidden_size(self) -> int:
        """Size of the block's hidden states.

        Raises:
            ValueError: the block has neither linear layers nor norms to tell it by.
        """
        return width_of(self.get_base_layer())

    @abstractmethod
    def delta(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """What adapter `name` adds to the output, of the shape of y.

        Args:
            x: hidden states that go into the block, [batch, tokens, hidden_size].
            y: hidden states that the frozen block gives, [batch, tokens, hidden_size].
        """

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        x = self._hidden_in(args, kwargs)
        if adapter_names is not None:
            self._check_rows(x, adapter_names)
        return self._run(lambda output: self._updated(x, output, adapter_names), args, kwargs)

    def _run(self, update: Callable[[Any], Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The block's output, updated before forward hooks on the block see it."""
        if not self.base_layer._forward_hooks:
            return update(self.base_layer(*args, **kwargs))
        handle = self.base_layer.register_forward_hook(lambda _block, _args, output: update(output), prepend=True)
        try:
            return self.base_layer(*args, **kwargs)
        finally:
            handle.remove()

    def _updated(self, x: Tensor, output: Any, adapter_names: list[str] | None) -> Any:
        y = self._hidden_out(output)
        if adapter_names is not None:
            y = self._with_row_updates(y, adapter_names, x, y)
        else:
            y = self._with_updates(y, self.live_adapters(), x, y)
        return with_first(output, y)

    def _hidden_in(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        x = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(x, Tensor):
            raise TypeError(
                f"{type(self).__name__} got {_say(x)} as input of a {type(self.get_base_layer()).__name__}; pass its "
                "hidden states as first argument or as hidden_states=."
            )
        return x

    def _hidden_out(self, output: Any) -> Tensor:
        y = output[0] if isinstance(output, (tuple, list)) and output else output
        if not isinstance(y, Tensor):
            raise TypeError(
                f"{type(self).__name__} got {_say(y)} from a {type(self.get_base_layer()).__name__}; it wraps modules "
                "that give hidden states, alone or as the first of a tuple or list: narrow target_modules to those."
            )
        return y

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, Any]:
        """Of the block's first parameter of two bytes or more: narrower ones are quantised."""
        for parameter in base_layer.parameters():
            if parameter.is_floating_point() and parameter.element_size() > 1:
                return parameter.device, parameter.dtype
        return None, None

    def __getattr__(self, name: str) -> Any:
        # Private names stay out: copy and pickle ask for them before there is a block, and accelerate would take the
        # block's `_hf_hook` and `_old_forward` for the layer's.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "base_layer" not in self.__dict__.get("_modules", ()):
                raise
            return getattr(self.get_base_layer(), name)


def with_first(output: Any, y: Tensor) -> Any:
    """`output` with y in the place of its hidden states."""
    if isinstance(output, list):
        return [y, *output[1:]]
    if not isinstance(output, tuple):
        return y
    if hasattr(output, "_replace"):  # a named tuple
        return type(output)(y, *output[1:])
    return (y, *output[1:])


def _say(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
