"""`residual_low_rank`: shape checks, the two registered ops, and the autograd.Function around them."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from petune.kernels.autograd import first_order_only, product_dtype
from petune.kernels.checks import described
from petune.kernels.dispatch import Dispatcher
from petune.kernels.residual_low_rank import reference

_DISPATCHER = Dispatcher("residual_low_rank", reference)
_LIBRARY = torch.library.Library("petune", "FRAGMENT")
_LIBRARY.define(
    "residual_low_rank_forward(Tensor u, Tensor down, Tensor up, Tensor gate, ScalarType dtype) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "residual_low_rank_backward(Tensor dz, Tensor? u, Tensor? s, Tensor down, Tensor up, Tensor gate, "
    "ScalarType dtype, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)"
)


def residual_low_rank(u: Tensor, down: Tensor, up: Tensor, gate: Tensor) -> Tensor:
    """z = gate ⊙ (u + (u downᵀ) upᵀ)    (Liu et al. 2024, arXiv 2408.14721, section 3.2)

    Kept for backward: u itself and s = u downᵀ, [tokens, rank]; not the sum that the gate multiplies. Under autocast
    the products run in its dtype, and z keeps that of u, as a residual stream does.

    Args:
        u: activations, [..., features]; fp32, bf16 or fp16.
        down: [rank, features], any floating dtype.
        up: [features, rank], any floating dtype.
        gate: factor of each channel, scale times mask, [features], any floating dtype; 0 for a pruned channel.

    Returns:
        z, shape and dtype of u. Products accumulate in fp32; the gradients have the dtypes of what they belong to.

    Raises:
        ValueError: shapes or devices disagree.
    """
    dtype, _ = product_dtype(u)
    if fault := _fault(u, down, up, gate):
        named = {"u": u, "down": down, "up": up, "gate": gate}
        raise ValueError(f"residual_low_rank: {described(named)} {fault}")
    if torch._C._are_functorch_transforms_active():  # torch.func differentiates no autograd.Function of this form
        return reference.differentiable(u, down, up, gate, dtype)
    return _ResidualLowRank.apply(u, down, up, gate, dtype)  # pyright: ignore[reportReturnType]


def _fault(u: Tensor, down: Tensor, up: Tensor, gate: Tensor) -> str:
    """What is wrong with these operands and what to do, or ""."""
    if not (
        u.dim() > 0
        and down.dim() == up.dim() == 2
        and gate.shape == u.shape[-1:] == down.shape[1:] == up.shape[:1]
        and down.shape[0] == up.shape[1]
    ):
        return "do not fit; pass [..., features], [rank, features], [features, rank] and [features]."
    if not u.device == down.device == up.device == gate.device:
        return "are not on one device; move the model and its input to the same one."
    return ""


class _ResidualLowRank(torch.autograd.Function):
    """Two opaque ops with a gradient: eager calls go through here, torch.library's own autograd costs more a call."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, u: Tensor, down: Tensor, up: Tensor, gate: Tensor, dtype: torch.dtype
    ) -> Tensor:  # every argument by name: Dynamo cannot trace *inputs under no_grad
        z, s = _FORWARD(u, down, up, gate, dtype)
        _keep_for_backward(ctx, (u, down, up, gate, dtype), s)
        return z

    @staticmethod
    def backward(ctx: Any, dz: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return _gradients(ctx, dz)
        with torch.no_grad():
            gradients = _gradients(ctx, dz)
        return first_order_only("residual_low_rank", gradients, (dz, *ctx.saved_tensors))


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], s: Tensor) -> None:
    u, down, up, gate, ctx.dtype = inputs
    _, needs_down, needs_up, needs_gate = ctx.needs_input_grad[:4]
    kept = (u if needs_down or needs_gate else None, s if needs_up or needs_gate else None)
    ctx.save_for_backward(*kept, down, up, gate)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dz: Tensor | None) -> tuple[Tensor | None, ...]:
    if dz is None:
        return (None,) * 5
    needs = list(ctx.needs_input_grad[:4])
    gradients = _BACKWARD(dz, *ctx.saved_tensors, ctx.dtype, needs)
    return (*(gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)), None)


def _forward(u: Tensor, down: Tensor, up: Tensor, gate: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return _DISPATCHER.run("forward", (u, down, up, gate, dtype), dtype=dtype, rank=down.shape[0])


def _backward(
    dz: Tensor, u: Any, s: Any, down: Tensor, up: Any, gate: Any, dtype: torch.dtype, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    return _DISPATCHER.run("backward", (dz, u, s, down, up, gate, dtype, needs), dtype=dtype, rank=down.shape[0])


def _fake_forward(u: Tensor, down: Tensor, up: Any, gate: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), u.new_empty(prod(u.shape[:-1]), down.shape[0], dtype=dtype)


def _fake_backward(
    dz: Tensor, u: Any, s: Any, down: Tensor, up: Tensor, gate: Tensor, dtype: Any, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    likes = zip((dz, down, up, gate), needs, strict=True)
    return tuple(like.new_empty(like.shape if needed else 0) for like, needed in likes)


def _forward_flops(u: Any, down: Any, *_: Any, **__: Any) -> int:
    """u downᵀ and s upᵀ; shapes in, multiply-adds counted as two."""
    return 2 * prod(u) * 2 * down[0]


def _backward_flops(
    dz: Any, u: Any, s: Any, down: Any, up: Any, gate: Any, dtype: Any, needs: Sequence[bool], *_: Any, **__: Any
) -> int:
    """dz (gate ⊙ up), ds down, dsᵀ u and dzᵀ s, where asked for."""
    needs_du, needs_ddown, needs_dup, needs_dgate = needs
    products = (needs_du or needs_ddown) + needs_du + needs_ddown + (needs_dup or needs_dgate)
    return 2 * prod(dz) * down[0] * products


_LIBRARY.impl("residual_low_rank_forward", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("residual_low_rank_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("petune::residual_low_rank_forward", _fake_forward, lib=_LIBRARY)
torch.library.register_fake("petune::residual_low_rank_backward", _fake_backward, lib=_LIBRARY)
torch.library.register_autograd(
    "petune::residual_low_rank_forward",
    _ResidualLowRank.backward,
    setup_context=lambda ctx, inputs, output: _keep_for_backward(ctx, inputs, output[1]),
    lib=_LIBRARY,
)
_FORWARD = torch.ops.petune.residual_low_rank_forward.default
_BACKWARD = torch.ops.petune.residual_low_rank_backward.default
register_flop_formula(torch.ops.petune.residual_low_rank_forward)(_forward_flops)
register_flop_formula(torch.ops.petune.residual_low_rank_backward)(_backward_flops)
