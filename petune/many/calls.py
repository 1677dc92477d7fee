"""Calls of one model by several runs as one call: rows put together, sequences padded, outputs taken apart."""

import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_SEQUENCES = {"input_ids": 2, "inputs_embeds": 3, "attention_mask": 2, "token_type_ids": 2, "position_ids": 2}
"""Inputs whose second axis is the sequence, with the number of their axes."""


class Call(NamedTuple):
    """What one run asks the model for."""

    arguments: dict[str, Any]
    """By name; those that are None left out."""
    autocast: torch.dtype | None
    """Dtype of autocast around the call."""
    can_pad: bool
    """Whether padding its sequences changes nothing: they are all there is, and a mask can hide it."""

    @property
    def rows(self) -> int:
        return len(_first(self.arguments))

    @property
    def device(self) -> torch.device:
        return _first(self.arguments).device

    @property
    def length(self) -> int:
        """Of its sequences; 1 where there are none."""
        first = _first(self.arguments)
        return first.shape[1] if self.can_pad else 1

    @property
    def tokens(self) -> int:
        """Rows times length."""
        first = _first(self.arguments)
        return first.shape[0] * (first.shape[1] if first.dim() in (2, 3) else 1)


class Span(NamedTuple):
    """Where one call is in a joint one."""

    start: int
    stop: int
    length: int
    """Of its own sequences."""
    padded: int
    """Of the joint ones."""

    @classmethod
    def of(cls, call: Call) -> "Span":
        """A call by itself."""
        return cls(0, call.rows, call.length, call.length)


def read_call(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    """A call of `forward`, a plain function, with these arguments."""
    signature = inspect.signature(forward)
    bound = signature.bind(*args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound |= bound.pop(name, {})
    arguments = {name: value for name, value in bound.items() if value is not None}
    if "use_cache" in signature.parameters:
        arguments["use_cache"] = False  # keys and values of other runs' rows are of no use in training
    first = _first(arguments)
    kind = first.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    can_pad = "attention_mask" in signature.parameters and all(
        _SEQUENCES.get(name) == one.dim() and one.shape[:2] == first.shape[:2] for name, one in tensors.items()
    )
    # without a mask, positions that begin anew tell transformers where one packed text ends
    can_pad = can_pad and ("position_ids" not in tensors or "attention_mask" in tensors)
    return Call(arguments, autocast, can_pad)


def kind_of(call: Call) -> Hashable:
    """Calls of one kind can be put together; a call of a kind of its own cannot be put with any."""
    described: list[Hashable] = [call.autocast, call.can_pad]
    for name, value in sorted(call.arguments.items()):
        if isinstance(value, Tensor):
            if name == "labels" or value.dim() == 0 or len(value) != call.rows:
                return object()  # a loss over all rows, or a tensor that is not made of rows
            if not (call.can_pad and name == "attention_mask"):
                described.append((name, value.dtype, value.shape[2:] if call.can_pad else value.shape[1:]))
        elif isinstance(value, bool | int | float | str):
            described.append((name, value))
        else:
            return object()
    return tuple(described)


def merge(calls: Sequence[Call]) -> tuple[dict[str, Any], list[Span]]:
    """The arguments of one call with the rows of all, and where each call is in it.

    Sequences are padded on the right with zeros, and an attention mask hides what is padded.
    """
    if len(calls) == 1:
        return calls[0].arguments, [Span.of(calls[0])]
    longest = max(call.length for call in calls)
    names = dict.fromkeys(name for call in calls for name in call.arguments)
    if calls[0].can_pad and len({call.length for call in calls}) > 1:
        names["attention_mask"] = None
    merged: dict[str, Any] = {}
    for name in names:
        values = [_argument(call, name) for call in calls]
        if not isinstance(values[0], Tensor):
            merged[name] = values[0]
        elif calls[0].can_pad:
            merged[name] = torch.cat([_padded(value, longest) for value in values])
        else:
            merged[name] = torch.cat(values)
    spans: list[Span] = []
    for call in calls:
        start = spans[-1].stop if spans else 0
        spans.append(Span(start, start + call.rows, call.length, longest))
    return merged, spans


class JointOutput:
    """The output of a joint call, and the part of it that each run goes on with.

    Every floating-point tensor of a part is a leaf: a run's backward ends there, and `backward` goes on from all of
    them through the joint graph.

    Args:
        output: of the model.
        spans: of the calls in it.
    """

    def __init__(self, output: Any, spans: Sequence[Span]) -> None:
        self.spans = spans
        self._joint: list[Tensor] = []
        self._leaves: list[list[Tensor]] = [[] for _ in spans]
        parts = [self._part(output, index) for index in range(len(spans))]
        self.parts: list[Any] = parts
        """Like the output, of each run's rows."""

    def backward(self, wanted: Sequence[bool]) -> None:
        """Go on from the gradients of the runs' leaves.

        Args:
            wanted: of each run, whether its gradients count; those of one that failed do not.
        """
        roots: list[Tensor] = []
        gradients: list[Tensor] = []
        for index, joint in enumerate(self._joint):
            parts = [leaves[index].grad if want else None for leaves, want in zip(self._leaves, wanted, strict=True)]
            if all(part is None for part in parts):
                continue
            gradient = torch.zeros_like(joint)
            for span, part in zip(self.spans, parts, strict=True):
                if part is not None:
                    self._of_span(gradient, span).copy_(part)
            roots.append(joint)
            gradients.append(gradient)
        if roots:
            torch.autograd.backward(roots, gradients)

    def _part(self, value: Any, index: int) -> Any:
        if isinstance(value, Tensor):
            part = self._of_span(value, self.spans[index])
            if not value.requires_grad:
                return part
            if index == 0:
                self._joint.append(value)
            self._leaves[index].append(part.detach().requires_grad_())
            return self._leaves[index][-1]
        if isinstance(value, Mapping):
            fields = {name: self._part(one, index) for name, one in value.items()}
            return type(value)(**fields)
        if isinstance(value, tuple | list):
            return type(value)(self._part(one, index) for one in value)
        return value

    def _of_span(self, value: Tensor, span: Span) -> Tensor:
        total = self.spans[-1].stop
        if len(self.spans) == 1 or value.dim() == 0 or len(value) != total:
            return value
        return part_of(value[span.start : span.stop], span)


def part_of(rows: Tensor, span: Span) -> Tensor:
    """A run's rows without the padding of the joint sequences: of hidden states, and of attention weights."""
    if span.length == span.padded:
        return rows
    if rows.dim() == 3 and rows.shape[1] == span.padded:
        return rows[:, : span.length]
    if rows.dim() == 4 and rows.shape[2:] == (span.padded, span.padded):
        return rows[..., : span.length, : span.length]
    return rows


def _first(arguments: Mapping[str, Any]) -> Tensor:
    for value in arguments.values():
        if isinstance(value, Tensor):
            return value
    raise ValueError(f"the model was called without a tensor ({', '.join(arguments) or 'no argument at all'}).")


def _argument(call: Call, name: str) -> Any:
    if name == "attention_mask" and name not in call.arguments:
        first = _first(call.arguments)
        return torch.ones(first.shape[:2], dtype=torch.long, device=first.device)
    return call.arguments[name]


def _padded(value: Tensor, length: int) -> Tensor:
    missing = length - value.shape[1]
    return F.pad(value, (0, 0) * (value.dim() - 2) + (0, missing)) if missing else value


def forward_of(module: nn.Module) -> Callable[..., Any]:
    """The plain function behind a module's forward, whose signature names its arguments."""
    return inspect.unwrap(type(module).forward).__get__(module)
