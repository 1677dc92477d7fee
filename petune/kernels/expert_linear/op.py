"""`expert_in` and `expert_out`: checks and the registered ops."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from petune.kernels.autograd import product_dtype
from petune.kernels.checks import described, placement_fault
from petune.kernels.dispatch import Dispatcher
from petune.kernels.expert_linear import reference
from petune.kernels.expert_linear.reference import Assignment

_DISPATCHER = Dispatcher("expert_linear", reference)
_LIBRARY = torch.library.Library("petune", "FRAGMENT")
_LIBRARY.define(
    "expert_in(Tensor x, Tensor weight, Tensor? bias, Tensor tokens, Tensor offsets, ScalarType dtype) -> Tensor"
)
_LIBRARY.define(
    "expert_out(Tensor h, Tensor weight, Tensor? bias, Tensor tokens, Tensor offsets, Tensor places, "
    "ScalarType dtype) -> Tensor"
)


def expert_in(x: Tensor, weight: Tensor, bias: Tensor | None, assignment: Assignment) -> Tensor:
    """h[p] = x[token of p] weight[expert of p]ᵀ + bias[expert of p]    for every pair p of a token and its expert

    For inference. Only the chosen rows are computed: k of every `experts`.

    Args:
        x: activations, [tokens, in_features].
        weight: [experts, size, in_features], any strides; dtype of x.
        bias: [experts, size] or None; dtype of x.
        assignment: by `assign`, of these tokens to these experts.

    Returns:
        h, [tokens · k, size], the pairs in the order of the assignment; dtype of x or of autocast. Products accumulate
        in fp32.

    Raises:
        ValueError: shapes, dtypes or devices disagree.
        RuntimeError: an operand asks for a gradient.
    """
    fits = (
        x.dim() == 2
        and weight.dim() == 3
        and x.shape[1] == weight.shape[2]
        and (bias is None or bias.shape == weight.shape[:2])
        and len(x) == len(assignment.places)
    )
    shapes = "[tokens, in_features], [experts, size, in_features], [experts, size]"
    dtype = _checked("expert_in", {"x": x, "weight": weight, "bias": bias}, assignment, fits, shapes)
    return _EXPERT_IN(x, weight, bias, assignment.tokens, assignment.offsets, dtype)


def expert_out(h: Tensor, weight: Tensor, bias: Tensor | None, assignment: Assignment) -> Tensor:
    """y[t] = bias + Σ_{p of t} h[p] weight[expert of p]    over the k pairs p of token t

    For inference. The products are rounded to their dtype and added in fp32, in the same order in every batch. On a
    GPU they take a buffer of [tokens · k, out_features] for the time of the call.

    Args:
        h: activations of the pairs, [tokens · k, size], in the order of the assignment.
        weight: [experts, size, out_features], any strides; dtype of h.
        bias: [out_features] or None; dtype of h.
        assignment: by `assign`, the one that h was made with.

    Returns:
        y, [tokens, out_features]; dtype of h or of autocast.

    Raises:
        ValueError: shapes, dtypes or devices disagree.
        RuntimeError: an operand asks for a gradient.
    """
    fits = (
        h.dim() == 2
        and weight.dim() == 3
        and h.shape[1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[2:])
        and len(h) == len(assignment.tokens)
    )
    shapes = "[tokens · k, size], [experts, size, out_features], [out_features]"
    dtype = _checked("expert_out", {"h": h, "weight": weight, "bias": bias}, assignment, fits, shapes)
    return _EXPERT_OUT(h, weight, bias, *assignment, dtype)


def _checked(
    operator: str, operands: dict[str, Tensor | None], assignment: Assignment, fits: bool, shapes: str
) -> torch.dtype:
    """The dtype of the products, where nothing is wrong with the operands."""
    x, weight, bias = operands.values()
    assert x is not None
    assert weight is not None
    dtype, cast = product_dtype(x)
    tokens, offsets, places = assignment
    if not fits or len(offsets) != len(weight) + 1 or len(tokens) != places.numel():
        fault = f"do not fit; pass {shapes} and the assignment of these tokens to these experts."
    else:
        fault = placement_fault(x, weight, bias, tokens, offsets, cast)
    if fault:
        raise ValueError(f"{operator}: {described({**operands, **assignment._asdict()})} {fault}")
    if torch.is_grad_enabled() and (names := [n for n, t in operands.items() if t is not None and t.requires_grad]):
        raise RuntimeError(
            f"{operator} was asked for the gradient of {', '.join(names)} and is for inference alone; call it under "
            "torch.no_grad(), or train the masked dense layer."
        )
    return dtype


def _expert_in(
    x: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, offsets: Tensor, dtype: torch.dtype
) -> Tensor:
    args = (x, weight, bias, tokens, offsets, dtype)
    return _DISPATCHER.run("expert_in", args, dtype=dtype, rank=len(weight))[0]


def _expert_out(
    h: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, offsets: Tensor, places: Tensor,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    args = (h, weight, bias, tokens, offsets, places, dtype)
    return _DISPATCHER.run("expert_out", args, dtype=dtype, rank=len(weight))[0]


def _fake_in(x: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(tokens.shape[0], weight.shape[1], dtype=rest[-1])


def _fake_out(h: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    places, dtype = rest[-2:]
    return h.new_empty(places.shape[0], weight.shape[2], dtype=dtype)


def _flops_in(x: Any, weight: Any, bias: Any, tokens: Any, *_: Any, **__: Any) -> int:
    """Of the pairs; shapes in, multiply-adds counted as two."""
    return 2 * tokens[0] * weight[1] * weight[2]


def _flops_out(h: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * h[0] * weight[1] * weight[2]


_LIBRARY.impl("expert_in", _expert_in, "CompositeExplicitAutograd")
_LIBRARY.impl("expert_out", _expert_out, "CompositeExplicitAutograd")
torch.library.register_fake("petune::expert_in", _fake_in, lib=_LIBRARY)
torch.library.register_fake("petune::expert_out", _fake_out, lib=_LIBRARY)
_EXPERT_IN = torch.ops.petune.expert_in.default
_EXPERT_OUT = torch.ops.petune.expert_out.default
register_flop_formula(torch.ops.petune.expert_in)(_flops_in)
register_flop_formula(torch.ops.petune.expert_out)(_flops_out)
