"""`lora_linear`: shape checks, the two registered ops, and the autograd.Function around them."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from petune.kernels.autograd import first_order_only, product_dtype
from petune.kernels.checks import check_dropout, described, projection_fault
from petune.kernels.dispatch import Dispatcher
from petune.kernels.lora_linear import reference

_DISPATCHER = Dispatcher("lora_linear", reference)
_LIBRARY = torch.library.Library("petune", "FRAGMENT")
_LIBRARY.define(
    "lora_linear_forward(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, float scale, float dropout_p, "
    "Tensor? seed, ScalarType dtype, Tensor? rank_mask=None) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "lora_linear_backward(Tensor dy, Tensor? x, Tensor? s, Tensor weight, Tensor a, Tensor b, float scale, "
    "float dropout_p, Tensor? seed, bool[] needs, Tensor? rank_mask=None) -> (Tensor, Tensor, Tensor)"
)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    dropout_p: float = 0.0,
    rank_mask: Tensor | None = None,
) -> Tensor:
    """y = x Wᵀ + bias + scale · s Bᵀ,  s = drop(x) Aᵀ ⊙ rank_mask    (Hu et al. 2021, eq. 3)

    Kept for backward: x itself, no copy of it in another dtype, no dropped copy, no mask of x. Where A is frozen, s
    alone, [tokens, rank]. The mask of x is made again from a seed that the device's default generator draws, so
    `torch.manual_seed` and activation checkpointing replay it. Under autocast the products run in its dtype.

    Args:
        x: activations, [..., in_features].
        weight: base weight W, [out_features, in_features], any strides (`conv1d.weight.T` is not copied); dtype of x.
        bias: [out_features] or None; dtype of x.
        a: down projection A, [rank, in_features], any floating dtype.
        b: up projection B, [out_features, rank], any floating dtype.
        scale: alpha / rank, dimensionless.
        dropout_p: probability that an element of x is dropped on its way to A, 0 <= p < 1, in steps of 1/65536.
        rank_mask: dropout between A and B as the caller draws it, 0 or 1/keep, [tokens, rank], any floating dtype;
            tokens are all leading axes of x. It is kept for backward, and has no gradient.

    Returns:
        y, [..., out_features], dtype of x or of autocast. Products accumulate in fp32; dA, dB have the dtypes of A, B.

    Raises:
        ValueError: shapes, dtypes or devices disagree, dropout_p is out of range, or rank_mask asks for a gradient.
    """
    dtype, cast = product_dtype(x)
    check_dropout("lora_linear", dropout_p)
    if fault := projection_fault(x, weight, bias, a, b, cast):
        named = {"x": x, "weight": weight, "bias": bias, "a": a, "b": b}
        raise ValueError(f"lora_linear: {described(named)} {fault}")
    if rank_mask is not None:
        _check_rank_mask(rank_mask, x, a)
    if torch._C._are_functorch_transforms_active():  # torch.func differentiates no autograd.Function of this form
        return reference.differentiable(x, weight, bias, a, b, scale, dropout_p, dtype, rank_mask)
    seed = torch.randint(2**63 - 1, (1,), device=x.device) if dropout_p > 0.0 else None
    return _LoraLinear.apply(x, weight, bias, a, b, scale, dropout_p, seed, dtype, rank_mask)  # pyright: ignore[reportReturnType]


def _check_rank_mask(rank_mask: Tensor, x: Tensor, a: Tensor) -> None:
    expected = (prod(x.shape[:-1]), a.shape[0])
    if rank_mask.shape != expected or not rank_mask.is_floating_point() or rank_mask.device != x.device:
        raise ValueError(
            f"lora_linear: {described({'x': x, 'a': a, 'rank_mask': rank_mask})} do not fit; pass a floating-point "
            f"rank_mask [tokens, rank] = {list(expected)} on the device of x."
        )
    if rank_mask.requires_grad:
        raise ValueError(
            "lora_linear: rank_mask asks for a gradient, and a mask has none here; pass rank_mask.detach(), or "
            "multiply A or B by what is learned."
        )


class _LoraLinear(torch.autograd.Function):
    """Two opaque ops with a gradient: eager calls go through here, torch.library's own autograd costs more a call."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        dropout_p: float,
        seed: Tensor | None,
        dtype: torch.dtype,
        rank_mask: Tensor | None,
    ) -> Tensor:  # every argument by name: Dynamo cannot trace *inputs under no_grad
        y, s = _FORWARD(x, weight, bias, a, b, scale, dropout_p, seed, dtype, rank_mask)
        _keep_for_backward(ctx, (x, weight, bias, a, b, scale, dropout_p, seed, dtype, rank_mask), s)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return _gradients(ctx, dy)
        with torch.no_grad():
            gradients = _gradients(ctx, dy)
        return first_order_only("lora_linear", gradients, (dy, *ctx.saved_tensors))


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], s: Tensor) -> None:
    x, weight, _, a, b, ctx.scale, ctx.dropout_p, seed, _, rank_mask = inputs
    _, needs_weight, _, needs_a, needs_b = ctx.needs_input_grad[:5]
    keeps_x = needs_a or needs_weight
    # s = drop(x) Aᵀ again costs a hundredth of the step on a CPU, and one more pass over x on a GPU
    keeps_s = needs_b and (x.is_cuda or not keeps_x)
    ctx.save_for_backward(x if keeps_x else None, s if keeps_s else None, weight, a, b, seed, rank_mask)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 10
    x, s, weight, a, b, seed, rank_mask = ctx.saved_tensors
    needs_dx, needs_weight, needs_bias, needs_a, needs_b = ctx.needs_input_grad[:5]
    needs = [needs_dx, needs_a, needs_b]
    dx, da, db = _BACKWARD(dy, x, s, weight, a, b, ctx.scale, ctx.dropout_p, seed, needs, rank_mask)
    dweight = dbias = None
    if needs_weight or needs_bias:  # a trainable base is not what LoRA is for: plain torch, outside of the op
        rows = dy.reshape(-1, dy.shape[-1])
        dweight = rows.T @ x.reshape(-1, x.shape[-1]).to(rows.dtype) if needs_weight else None
        dbias = rows.sum(0) if needs_bias else None
    adapters = (da if needs_a else None, db if needs_b else None)
    return (dx if needs_dx else None, dweight, dbias, *adapters, None, None, None, None, None)


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor,
    scale: float, dropout_p: float, seed: Tensor | None, dtype: torch.dtype, rank_mask: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    args = (x, weight, bias, a, b, scale, dropout_p, seed, dtype, rank_mask)
    return _DISPATCHER.run("forward", args, dtype=dtype, rank=a.shape[0])


def _backward(dy: Tensor, x: Any, s: Any, weight: Tensor, a: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _DISPATCHER.run("backward", (dy, x, s, weight, a, *rest), dtype=dy.dtype, rank=a.shape[0])


def _fake_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor,
    scale: float, dropout_p: float, seed: Tensor | None, dtype: torch.dtype, *_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y = x.new_empty(*x.shape[:-1], weight.shape[0], dtype=dtype)
    return y, x.new_empty(y.numel() // weight.shape[0], a.shape[0], dtype=dtype)


def _fake_backward(
    dy: Tensor, x: Any, s: Any, weight: Tensor, a: Tensor, b: Tensor,
    scale: float, dropout_p: float, seed: Any, needs: Sequence[bool], *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    shapes = ((*dy.shape[:-1], weight.shape[1]), a.shape, b.shape)
    return tuple(
        like.new_empty(shape if needed else 0) for like, shape, needed in zip((dy, a, b), shapes, needs, strict=True)
    )


def _forward_flops(x: Any, weight: Any, bias: Any, a: Any, *_: Any, **__: Any) -> int:
    """x Wᵀ, x Aᵀ and s Bᵀ; shapes in, multiply-adds counted as two."""
    tokens = prod(x[:-1])
    return 2 * tokens * (weight[0] * weight[1] + a[0] * (weight[0] + weight[1]))


def _backward_flops(
    dy: Any, x: Any, s: Any, weight: Any, a: Any, b: Any,
    scale: float, dropout_p: float, seed: Any, needs: Sequence[bool], *_: Any, **__: Any,
) -> int:  # fmt: skip
    """dy B and, where asked for, dy W + ds A, dsᵀ x, dyᵀ s and the s that was not kept."""
    (out_features, in_features), rank = weight, a[0]
    needs_dx, needs_da, needs_db = needs
    skinny = out_features * (1 + needs_db) + in_features * (needs_dx + needs_da + (needs_db and s is None))
    return 2 * prod(dy[:-1]) * (rank * skinny + needs_dx * out_features * in_features)


_LIBRARY.impl("lora_linear_forward", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("lora_linear_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("petune::lora_linear_forward", _fake_forward, lib=_LIBRARY)
torch.library.register_fake("petune::lora_linear_backward", _fake_backward, lib=_LIBRARY)
torch.library.register_autograd(
    "petune::lora_linear_forward",
    _LoraLinear.backward,
    setup_context=lambda ctx, inputs, output: _keep_for_backward(ctx, inputs, output[1]),
    lib=_LIBRARY,
)
_FORWARD = torch.ops.petune.lora_linear_forward.default
_BACKWARD = torch.ops.petune.lora_linear_backward.default
register_flop_formula(torch.ops.petune.lora_linear_forward)(_forward_flops)
register_flop_formula(torch.ops.petune.lora_linear_backward)(_backward_flops)
