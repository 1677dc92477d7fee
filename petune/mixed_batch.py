"""`adapter_names`: batches whose rows take different adapters, by the grouped operator."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import lru_cache, wraps
from typing import Any

from peft.tuners.lora import LoraLayer, LoraModel
from torch import Tensor

from petune.kernels.grouped_lora import RowGroups, grouped_lora
from petune.low_rank import Operands


@lru_cache(maxsize=64)
def row_groups(names: tuple[str, ...], available: frozenset[str]) -> tuple[tuple[str, ...], RowGroups | None]:
    """The adapters of a layer that rows take, and which row takes which; the layers of a model share the result.

    Args:
        names: of each row's adapter; what is not available takes the base alone.
        available: adapters of the layer.
    """
    present = tuple(dict.fromkeys(name for name in names if name in available))
    if not present:
        return (), None
    index = {name: number for number, name in enumerate(present)}
    return present, RowGroups.of([index.get(name, -1) for name in names], len(present))


def grouped(x: Tensor, operands: Sequence[Operands], groups: RowGroups) -> Tensor:
    """y = x Wᵀ + bias + each row's own update; the operands of one layer, an entry for each adapter."""
    weight, bias = operands[0].weight, operands[0].bias
    a, b = [one.a for one in operands], [one.b for one in operands]
    scales, dropout_p = [one.scale for one in operands], [one.dropout_p for one in operands]
    return grouped_lora(x, weight, bias, a, b, scales, groups, dropout_p)


def allow_training(fused: type[LoraLayer]) -> None:
    """Let a LoRA model whose layers are all of class `fused` take `adapter_names` in training too.

    PEFT refuses mixed batches in training for all its layers (0.21.2, `LoraModel._enable_peft_forward_hooks`); what it
    does apart from that holds in training as well. A second call changes nothing.
    """
    original: Callable[..., AbstractContextManager[None]] = LoraModel._enable_peft_forward_hooks
    if hasattr(original, "__petune__"):
        return

    @wraps(original)
    @contextmanager
    def hooks(self: LoraModel, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            trains = kwargs.get("adapter_names") is not None and self.training
            if trains and all(isinstance(m, fused) for m in self.modules() if isinstance(m, LoraLayer)):
                self.training = False  # of this one module, which PEFT looks at; none below it changes
                try:
                    stack.enter_context(original(self, *args, **kwargs))
                finally:
                    self.training = True
            else:
                stack.enter_context(original(self, *args, **kwargs))
            yield

    hooks.__petune__ = True  # pyright: ignore[reportAttributeAccessIssue]
    LoraModel._enable_peft_forward_hooks = hooks  # pyright: ignore[reportAttributeAccessIssue]
