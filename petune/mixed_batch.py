"""`adapter_names`: batches whose rows take different adapters, by the grouped operator."""

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from functools import lru_cache, wraps
from typing import Any

import torch
from peft.tuners.lora import LoraLayer, LoraModel
from torch import Tensor, nn

from petune.kernels.grouped_lora import JoinedFactors, RowGroups, grouped_joined_lora, grouped_lora
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


class Mixed:
    """y = x Wᵀ + bias + each row's own update

    Args:
        operands: of one layer, an entry for each adapter.
        groups: which of them each row takes.
    """

    def __init__(self, operands: Sequence[Operands], groups: RowGroups) -> None:
        self.weight, self.bias = operands[0].weight, operands[0].bias
        self._a, self._b = [one.a for one in operands], [one.b for one in operands]
        self._scales, self._dropout_p = [one.scale for one in operands], [one.dropout_p for one in operands]
        self._rank_dropout_p = [one.rank_dropout_p for one in operands]
        self._groups = groups
        self._joined: JoinedFactors | None = None
        self._was_called = False

    def __call__(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or any(self._dropout_p) or any(self._rank_dropout_p):
            operands = self._a, self._b, self._scales, self._groups, self._dropout_p
            return grouped_lora(x, self.weight, self.bias, *operands, rank_mask=self._rank_mask(x))
        joined = self._joined or JoinedFactors.of(self._a, self._b, self._scales)
        if self._was_called:  # not before: a single pass would hold a second copy of all factors for nothing
            self._joined = joined
        self._was_called = True
        return grouped_joined_lora(x, self.weight, self.bias, joined, self._groups)

    def _rank_mask(self, x: Tensor) -> Tensor | None:
        """0 or 1 / (1 − p), [tokens, largest rank], with the p of each token's adapter."""
        if not any(self._rank_dropout_p):
            return None
        keep = 1.0 - x.new_tensor([*self._rank_dropout_p, 0.0])[self._groups.ids.to(x.device)]  # -1 is the last
        tokens, rank = x.numel() // x.shape[-1], max(len(down) for down in self._a)
        by_token = keep.repeat_interleave(tokens // len(keep)).unsqueeze(1).expand(-1, rank)
        return by_token.bernoulli().div(by_token)


Call = Callable[[Tensor], Tensor]
"""From a layer's input to its output."""

_known: ContextVar[dict[nn.Module, tuple[Sequence[str], Call | None]] | None] = ContextVar("_known", default=None)


@contextmanager
def one_call() -> Generator[None]:
    """Around one forward or `generate`, in which no adapter, hook or base changes: layers look at them once."""
    if torch.compiler.is_compiling():  # it knows no context variables
        yield
        return
    token = _known.set({})
    try:
        yield
    finally:
        _known.reset(token)


def mixed(layer: nn.Module, names: Sequence[str], make: Callable[[], Call | None]) -> Call | None:
    """What `make` gives, or has given before for this layer and this very list in the same `one_call`."""
    known = None if torch.compiler.is_compiling() else _known.get()
    if known is None:
        return make()
    if layer not in known or known[layer][0] is not names:
        known[layer] = names, make()
    return known[layer][1]


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
            is_mixed = kwargs.get("adapter_names") is not None
            if is_mixed:
                stack.enter_context(one_call())
            trains = is_mixed and self.training
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
