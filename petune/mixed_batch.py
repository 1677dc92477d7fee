"""`adapter_names`: batches whose rows take different adapters, by the grouped operator."""

from collections.abc import Callable, Generator, Hashable, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from functools import lru_cache, partial, wraps
from typing import Any, TypeVar

import torch
from peft.tuners.lora import LoraLayer, LoraModel
from torch import Tensor, nn

from petune.kernels.grouped_lora import (
    JoinedFactors,
    RowGroups,
    grouped_joined_lora,
    grouped_lora,
    grouped_lora_projections,
)
from petune.kernels.lora_group import lora_group
from petune.kernels.lora_linear import lora_linear
from petune.low_rank import Operands, is_hooked

_T = TypeVar("_T")


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
        self.a, self.b = [one.a for one in operands], [one.b for one in operands]
        self.scales, self.dropout_p = [one.scale for one in operands], [one.dropout_p for one in operands]
        self.groups = groups
        self._rank_dropout_p = [one.rank_dropout_p for one in operands]
        self._joined: JoinedFactors | None = None
        self._was_called = False

    def __call__(self, x: Tensor) -> Tensor:
        lone = self.groups.lone
        if lone is not None:
            factors = self.a[lone], self.b[lone], self.scales[lone], self.dropout_p[lone]
            return lora_linear(x, self.weight, self.bias, *factors, self._rank_mask(x))
        if torch.is_grad_enabled() or any(self.dropout_p) or any(self._rank_dropout_p):
            operands = self.a, self.b, self.scales, self.groups, self.dropout_p
            return grouped_lora(x, self.weight, self.bias, *operands, rank_mask=self._rank_mask(x))
        joined = self._joined or JoinedFactors.of(self.a, self.b, self.scales)
        if self._was_called:  # not before: a single pass would hold a second copy of all factors for nothing
            self._joined = joined
        self._was_called = True
        return grouped_joined_lora(x, self.weight, self.bias, joined, self.groups)

    def _rank_mask(self, x: Tensor) -> Tensor | None:
        """0 or 1 / (1 − p), [tokens, largest rank], with the p of each token's adapter."""
        if not any(self._rank_dropout_p):
            return None
        keep = 1.0 - x.new_tensor([*self._rank_dropout_p, 0.0])[self.groups.ids.to(x.device)]  # -1 is the last
        tokens, rank = x.numel() // x.shape[-1], max(len(down) for down in self.a)
        by_token = keep.repeat_interleave(tokens // len(keep)).unsqueeze(1).expand(-1, rank)
        return by_token.bernoulli().div(by_token)


class MixedProjections:
    """Several projections of one x in training, each `Mixed`

    Args:
        parts: of each projection; of the same adapters for the same rows.
    """

    def __init__(self, parts: Sequence[Mixed]) -> None:
        self._parts = parts

    @classmethod
    def of(cls, parts: Sequence[Mixed]) -> "MixedProjections | None":
        """None where one operator cannot compute them all."""
        first = parts[0]
        alike = all(one.groups is first.groups and one.dropout_p == first.dropout_p for one in parts)
        by_adapter = zip(*(one.a + one.b for one in parts), strict=True) if alike else ()
        return cls(parts) if alike and all(len({t.dtype for t in own}) == 1 for own in by_adapter) else None

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        parts, groups, dropout_p = self._parts, self._parts[0].groups, self._parts[0].dropout_p
        weights, biases = [one.weight for one in parts], [one.bias for one in parts]
        a, b, scales = [one.a for one in parts], [one.b for one in parts], [one.scales for one in parts]
        lone = groups.lone
        if lone is not None:
            down, up, scale = [own[lone] for own in a], [own[lone] for own in b], [own[lone] for own in scales]
            return lora_group(x, weights, biases, down, up, scale, dropout_p[lone])
        return grouped_lora_projections(x, weights, biases, a, b, scales, groups, dropout_p)


Call = Callable[[Tensor], Tensor]
"""From a layer's input to its output."""

_known: ContextVar[dict[Hashable, tuple[Sequence[str], Any]] | None] = ContextVar("_known", default=None)


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


def mixed(owner: Hashable, names: Sequence[str], make: Callable[[], _T]) -> _T:
    """What `make` gives, or has given before for this owner and this very list in the same `one_call`."""
    known = None if torch.compiler.is_compiling() else _known.get()
    if known is None:
        return make()
    if owner not in known or known[owner][0] is not names:
        known[owner] = names, make()
    return known[owner][1]


def bring_names(
    root: nn.Module, names: Sequence[str], kinds: tuple[type[nn.Module], ...]
) -> list[torch.utils.hooks.RemovableHandle]:
    """Have the modules of these kinds below `root` called with `adapter_names`, until the handles are removed."""
    bring = partial(_bring, adapter_names=names)
    return [m.register_forward_pre_hook(bring, with_kwargs=True) for m in root.modules() if isinstance(m, kinds)]


def _bring(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, adapter_names: Sequence[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    kwargs["adapter_names"] = adapter_names
    return args, kwargs


def only_brings_names(layer: nn.Module, names: Sequence[str]) -> bool:
    """Whether calling the layer is its class's forward with `adapter_names`, and nothing else.

    The hook may be PEFT's, whose function has another name.
    """
    state = layer.__dict__
    before = list(state["_forward_pre_hooks"].values())
    is_it = [isinstance(hook, partial) and hook.keywords.get("adapter_names") is names for hook in before]
    return is_it == [True] and not is_hooked(layer, but_before=True)


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
