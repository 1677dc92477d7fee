"""`gated` and `gated_lora`: shape checks, the registered ops, and the autograd.Functions around them."""

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from petune.kernels.autograd import first_order_only, product_dtype
from petune.kernels.checks import check_dropout, described, projection_fault
from petune.kernels.dispatch import Dispatcher
from petune.kernels.gated_lora import reference

_DISPATCHER = Dispatcher("gated_lora", reference)
_LIBRARY = torch.library.Library("petune", "FRAGMENT")
_LIBRARY.define("gated_forward(Tensor gate, Tensor up, str activation, ScalarType dtype) -> Tensor")
_LIBRARY.define("gated_backward(Tensor dh, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)")
_LIBRARY.define(
    "gated_lora_forward(Tensor gate, Tensor up, str activation, Tensor weight, Tensor? bias, Tensor a, Tensor b, "
    "float scale, float dropout_p, Tensor? seed, ScalarType dtype) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "gated_lora_backward(Tensor dy, Tensor? gate, Tensor? up, Tensor? s, str activation, Tensor weight, Tensor a, "
    "Tensor b, float scale, float dropout_p, Tensor? seed, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)"
)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """h = act(gate) ⊙ up    (Shazeer 2020, arXiv 2002.05202)

    Kept for backward: gate and up. Computed in fp32 and rounded once; autocast leaves it alone, as it does torch's own
    elementwise operators.

    Args:
        gate: [..., features].
        up: shape and dtype of gate.
        activation: silu, gelu (by the error function) or gelu_tanh (its approximation by tanh).

    Returns:
        h, shape and dtype of gate.

    Raises:
        ValueError: gate and up disagree in shape, dtype or device, or the activation is none of the three.
    """
    _check_gate("gated", gate, up, activation)
    if torch._C._are_functorch_transforms_active():  # torch.func differentiates no autograd.Function of this form
        return reference.gate_forward(gate, up, activation, gate.dtype)[0]
    return _Gated.apply(gate, up, activation)  # pyright: ignore[reportReturnType]


def gated_lora(
    gate: Tensor,
    up: Tensor,
    activation: str,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """y = h Wᵀ + bias + scale · (drop(h) Aᵀ) Bᵀ  with  h = act(gate) ⊙ up

    Kept for backward: gate and up, and on a GPU s = drop(h) Aᵀ, [tokens, rank]. h is made again for dA by the pass
    that makes dgate and dup. All else is as in `petune.kernels.lora_linear.lora_linear`.

    Args:
        gate: [..., in_features].
        up: shape and dtype of gate.
        activation: silu, gelu (by the error function) or gelu_tanh (its approximation by tanh).
        weight: base weight W, [out_features, in_features], any strides; dtype of gate.
        bias: [out_features] or None; dtype of gate.
        a: down projection A, [rank, in_features], any floating dtype.
        b: up projection B, [out_features, rank], any floating dtype.
        scale: alpha / rank, dimensionless.
        dropout_p: probability that an element of h is dropped on its way to A, 0 <= p < 1, in steps of 1/65536.

    Returns:
        y, [..., out_features], dtype of gate or of autocast. Products accumulate in fp32; dA, dB have the dtypes of
        A, B.

    Raises:
        ValueError: shapes, dtypes or devices disagree, the activation is unknown, or dropout_p is out of range.
    """
    dtype, cast = product_dtype(gate)
    _check_gate("gated_lora", gate, up, activation)
    check_dropout("gated_lora", dropout_p)
    if fault := projection_fault(gate, weight, bias, a, b, cast):
        named = {"gate": gate, "weight": weight, "bias": bias, "a": a, "b": b}
        raise ValueError(f"gated_lora: {described(named)} {fault}")
    if torch._C._are_functorch_transforms_active():
        return reference.differentiable(gate, up, activation, weight, bias, a, b, scale, dropout_p, dtype)
    seed = torch.randint(2**63 - 1, (1,), device=gate.device) if dropout_p > 0.0 else None
    return _GatedLora.apply(gate, up, activation, weight, bias, a, b, scale, dropout_p, seed, dtype)  # pyright: ignore[reportReturnType]


def _check_gate(operator: str, gate: Tensor, up: Tensor, activation: str) -> None:
    if activation not in reference.ACTIVATIONS:
        raise ValueError(
            f"{operator}: activation={activation!r} is not one of {', '.join(reference.ACTIVATIONS)}; apply any other "
            "by its torch function."
        )
    if gate.dim() == 0 or gate.shape != up.shape or gate.dtype != up.dtype or gate.device != up.device:
        raise ValueError(
            f"{operator}: {described({'gate': gate, 'up': up})} do not fit; pass two tensors [..., features] of one "
            "shape, dtype and device."
        )


# --- the gradients -------------------------------------------------------------------------------------------------


class _Gated(torch.autograd.Function):
    """Two opaque ops with a gradient: eager calls go through here, torch.library's own autograd costs more a call."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        _keep_gate(ctx, (gate, up, activation))
        return _GATED_FORWARD(gate, up, activation, gate.dtype)

    @staticmethod
    def backward(ctx: Any, dh: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if dh is None:
            return None, None, None
        with torch.no_grad():
            dgate, dup = _GATED_BACKWARD(dh, *ctx.saved_tensors, ctx.activation)
        needs_gate, needs_up = ctx.needs_input_grad[:2]
        gradients = (dgate if needs_gate else None, dup if needs_up else None, None)
        if not torch.is_grad_enabled():
            return gradients
        return first_order_only("gated", gradients, (dh, *ctx.saved_tensors))


def _keep_gate(ctx: Any, inputs: tuple[Any, ...]) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)
    ctx.set_materialize_grads(False)


class _GatedLora(torch.autograd.Function):
    """As `_Gated`, with the linear layer that follows."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        activation: str,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        dropout_p: float,
        seed: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:  # every argument by name: Dynamo cannot trace *inputs under no_grad
        inputs = (gate, up, activation, weight, bias, a, b, scale, dropout_p, seed, dtype)
        y, s = _LORA_FORWARD(*inputs)
        _keep_for_backward(ctx, inputs, s)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return _gradients(ctx, dy)
        with torch.no_grad():
            gradients = _gradients(ctx, dy)
        return first_order_only("gated_lora", gradients, (dy, *ctx.saved_tensors))


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], s: Tensor) -> None:
    gate, up, ctx.activation, weight, _, a, b, ctx.scale, ctx.dropout_p, seed, _ = inputs
    needs_gate, needs_up, _, needs_weight, _, needs_a, needs_b = ctx.needs_input_grad[:7]
    keeps_gate = needs_gate or needs_up or needs_weight or needs_a
    # s again costs one product of rank size on a CPU, and one more pass over h on a GPU
    keeps_s = needs_b and (gate.is_cuda or not keeps_gate)
    kept = (gate, up) if keeps_gate else (None, None)
    ctx.save_for_backward(*kept, s if keeps_s else None, weight, a, b, seed)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 11
    gate, up, s, weight, a, b, seed = ctx.saved_tensors
    needs_gate, needs_up, _, needs_weight, needs_bias, needs_a, needs_b = ctx.needs_input_grad[:7]
    needs = [needs_gate or needs_up, needs_a, needs_b]
    options = (ctx.scale, ctx.dropout_p, seed, needs)
    dgate, dup, da, db = _LORA_BACKWARD(dy, gate, up, s, ctx.activation, weight, a, b, *options)
    dweight = dbias = None
    if needs_weight or needs_bias:  # a trainable base is not what LoRA is for: outside of the op
        rows = dy.reshape(-1, dy.shape[-1])
        dbias = rows.sum(0) if needs_bias else None
        if needs_weight:
            dweight = rows.T @ _GATED_FORWARD(gate, up, ctx.activation, dy.dtype).view(-1, weight.shape[1])
    inputs = (dgate if needs_gate else None, dup if needs_up else None, None)
    return (*inputs, dweight, dbias, da if needs_a else None, db if needs_b else None, None, None, None, None)


# --- the ops -------------------------------------------------------------------------------------------------------


def _gated_forward(gate: Tensor, up: Tensor, activation: str, dtype: torch.dtype) -> Tensor:
    return _DISPATCHER.run("gate_forward", (gate, up, activation, dtype), dtype=dtype, rank=0)[0]


def _gated_backward(dh: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, ...]:
    return _DISPATCHER.run("gate_backward", (dh, gate, up, activation), dtype=dh.dtype, rank=0)


def _lora_forward(gate: Tensor, up: Tensor, activation: str, weight: Any, bias: Any, a: Tensor, *rest: Any) -> Any:
    args = (gate, up, activation, weight, bias, a, *rest)
    return _DISPATCHER.run("forward", args, dtype=rest[-1], rank=a.shape[0])


def _lora_backward(dy: Tensor, gate: Any, up: Any, s: Any, activation: str, weight: Any, a: Tensor, *rest: Any) -> Any:
    args = (dy, gate, up, s, activation, weight, a, *rest)
    return _DISPATCHER.run("backward", args, dtype=dy.dtype, rank=a.shape[0])


def _fake_gated_forward(gate: Tensor, up: Tensor, activation: str, dtype: torch.dtype) -> Tensor:
    return gate.new_empty(gate.shape, dtype=dtype)


def _fake_gated_backward(dh: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return dh.new_empty(dh.shape), dh.new_empty(dh.shape)


def _fake_lora_forward(
    gate: Tensor, up: Any, activation: str, weight: Tensor, bias: Any, a: Tensor, *rest: Any
) -> Any:
    y = gate.new_empty(*gate.shape[:-1], weight.shape[0], dtype=rest[-1])
    return y, gate.new_empty(prod(gate.shape[:-1]), a.shape[0], dtype=rest[-1])


def _fake_lora_backward(
    dy: Tensor, gate: Any, up: Any, s: Any, activation: str, weight: Tensor, a: Tensor, b: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    needs_dh, needs_da, needs_db = rest[-1]
    shape = (*dy.shape[:-1], weight.shape[1]) if needs_dh else (0,)
    da, db = a.new_empty(a.shape if needs_da else 0), b.new_empty(b.shape if needs_db else 0)
    return dy.new_empty(shape), dy.new_empty(shape), da, db


def _forward_flops(gate: Any, up: Any, activation: Any, weight: Any, bias: Any, a: Any, *_: Any, **__: Any) -> int:
    """h Wᵀ, h Aᵀ and s Bᵀ; shapes in, multiply-adds counted as two."""
    return 2 * prod(gate[:-1]) * (weight[0] * weight[1] + a[0] * (weight[0] + weight[1]))


def _backward_flops(
    dy: Any, gate: Any, up: Any, s: Any, activation: Any, weight: Any, a: Any, *rest: Any, **__: Any
) -> int:
    """dy B and, where asked for, dy W + ds A, dsᵀ h, dyᵀ s and the s that was not kept."""
    (out_features, in_features), (needs_dh, needs_da, needs_db) = weight, rest[-1]
    skinny = out_features * (1 + needs_db) + in_features * (needs_dh + needs_da + (needs_db and s is None))
    return 2 * prod(dy[:-1]) * (a[0] * skinny + needs_dh * out_features * in_features)


for _name, _implementation, _fake in (
    ("gated_forward", _gated_forward, _fake_gated_forward),
    ("gated_backward", _gated_backward, _fake_gated_backward),
    ("gated_lora_forward", _lora_forward, _fake_lora_forward),
    ("gated_lora_backward", _lora_backward, _fake_lora_backward),
):
    _LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"petune::{_name}", _fake, lib=_LIBRARY)
torch.library.register_autograd(
    "petune::gated_forward",
    lambda ctx, dh: (*_Gated.backward(ctx, dh), None),
    setup_context=lambda ctx, inputs, output: _keep_gate(ctx, inputs[:3]),
    lib=_LIBRARY,
)
torch.library.register_autograd(
    "petune::gated_lora_forward",
    _GatedLora.backward,
    setup_context=lambda ctx, inputs, output: _keep_for_backward(ctx, inputs, output[1]),
    lib=_LIBRARY,
)
_GATED_FORWARD = torch.ops.petune.gated_forward.default
_GATED_BACKWARD = torch.ops.petune.gated_backward.default
_LORA_FORWARD = torch.ops.petune.gated_lora_forward.default
_LORA_BACKWARD = torch.ops.petune.gated_lora_backward.default
register_flop_formula(torch.ops.petune.gated_lora_forward)(_forward_flops)
register_flop_formula(torch.ops.petune.gated_lora_backward)(_backward_flops)
