"""What the operators' gradients share: the dtype of their products, and the refusal of a second derivative."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def product_dtype(x: Tensor) -> tuple[torch.dtype, bool]:
    """(the dtype in which products with x run, whether autocast chose it)."""
    # autocast leaves float64 alone and does not know the meta device
    cast = x.dtype != torch.float64 and not x.is_meta and torch.is_autocast_enabled(x.device.type)
    return (torch.get_autocast_dtype(x.device.type) if cast else x.dtype), cast


def in_shape_of(x: Tensor, y: Tensor) -> Tensor:
    """y [tokens, features] in the leading shape of x; not a view, for autograd lets nobody write into an output that
    is one."""
    return torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], y.shape[-1]])


def first_order_only(
    operator: str, gradients: Iterable[Tensor | None], origins: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The gradients, whose own derivative by the origins is an error: else it would be lost unseen."""
    return tuple(None if g is None else _FirstOrderOnly.apply(g, operator, *origins) for g in gradients)


class _FirstOrderOnly(torch.autograd.Function):
    """The identity on a gradient, with an error as its gradient."""

    @staticmethod
    def forward(gradient: Tensor, operator: str, *_: Tensor | None) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.operator = inputs[1]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            f"{ctx.operator} was asked for a second derivative and has only a first one; for gradient penalties and "
            "the like use peft.LoraConfig, whose layers are made of plain torch operators."
        )
