"""`lora_linear`: shape checks, the two registered ops, and the autograd.Function around them."""

import importlib
import logging
import os
from functools import cache
from importlib.util import find_spec
from inspect import signature
from math import prod
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from petune.kernels.lora_linear import reference

logger = logging.getLogger(__name__)

_KERNEL = "petune.kernels.lora_linear.kernel"
_MODES = ("auto", "reference", "triton")

_LIBRARY = torch.library.Library("petune", "FRAGMENT")
_LIBRARY.define(
    "lora_linear_forward(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, float scale, float dropout_p, "
    "Tensor? seed, ScalarType dtype) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "lora_linear_backward(Tensor dy, Tensor? x, Tensor? s, Tensor weight, Tensor a, Tensor b, float scale, "
    "float dropout_p, Tensor? seed, bool[] needs) -> (Tensor, Tensor, Tensor)"
)


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, dropout_p: float = 0.0
) -> Tensor:
    """y = x Wᵀ + bias + scale · (drop(x) Aᵀ) Bᵀ    (Hu et al. 2021, eq. 3)

    Kept for backward: x itself, no copy of it in another dtype, no dropped copy, no mask. Where A is frozen only
    s = drop(x) Aᵀ, [tokens, rank], is kept. The mask is made again from a seed that the device's default generator
    draws, so `torch.manual_seed` and activation checkpointing replay it. Under autocast the products run in its dtype.

    Args:
        x: activations, [..., in_features].
        weight: base weight W, [out_features, in_features], any strides (`conv1d.weight.T` is not copied); dtype of x.
        bias: [out_features] or None; dtype of x.
        a: down projection A, [rank, in_features], any floating dtype.
        b: up projection B, [out_features, rank], any floating dtype.
        scale: alpha / rank, dimensionless.
        dropout_p: probability that an element of x is dropped on its way to A, 0 <= p < 1, in steps of 1/65536.

    Returns:
        y, [..., out_features], dtype of x or of autocast. Products accumulate in fp32; dA, dB have the dtypes of A, B.

    Raises:
        ValueError: shapes or dtypes disagree, or dropout_p is out of range.
    """
    # autocast leaves float64 alone and does not know the meta device
    cast = x.dtype != torch.float64 and not x.is_meta and torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if cast else x.dtype
    _check(x, weight, bias, a, b, dropout_p, cast)
    seed = torch.randint(2**63 - 1, (1,), device=x.device) if dropout_p > 0.0 else None
    return _LoraLinear.apply(x, weight, bias, a, b, scale, dropout_p, seed, dtype)[0]  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, dropout_p: float, cast: bool) -> None:
    fits = (
        x.dim() > 0
        and weight.dim() == a.dim() == b.dim() == 2
        and x.shape[-1] == weight.shape[1] == a.shape[1]
        and b.shape[0] == weight.shape[0]
        and b.shape[1] == a.shape[0]
        and (bias is None or bias.shape == weight.shape[:1])
    )
    if not fits:
        raise ValueError(
            f"lora_linear: x {tuple(x.shape)}, weight {tuple(weight.shape)}, bias "
            f"{None if bias is None else tuple(bias.shape)}, a {tuple(a.shape)} and b {tuple(b.shape)} do not fit; "
            "pass [..., in_features], [out_features, in_features], [out_features], [rank, in_features] and "
            "[out_features, rank]."
        )
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"lora_linear: dropout_p={dropout_p} is not in [0, 1); use 0.0 for no dropout.")
    if not cast and (weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype)):
        raise ValueError(
            f"lora_linear: x is {x.dtype} and weight {weight.dtype}; cast x to the weight's dtype or use autocast."
        )


class _LoraLinear(torch.autograd.Function):
    """Two opaque ops with a gradient: eager calls go through here, torch.library's own autograd costs more a call."""

    @staticmethod
    def forward(  # every argument by name: Dynamo cannot trace *inputs under no_grad
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        dropout_p: float,
        seed: Tensor | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.petune.lora_linear_forward(x, weight, bias, a, b, scale, dropout_p, seed, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, _, a, b, ctx.scale, ctx.dropout_p, seed, _ = inputs
        _, needs_weight, _, needs_a, needs_b = ctx.needs_input_grad[:5]
        keeps_x = needs_a or needs_weight
        # s = drop(x) Aᵀ again costs a hundredth of the step on a CPU, and one more pass over x on a GPU
        keeps_s = needs_b and (x.is_cuda or not keeps_x)
        ctx.save_for_backward(x if keeps_x else None, output[1] if keeps_s else None, weight, a, b, seed)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return _gradients(ctx, dy)
        with torch.no_grad():
            gradients = _gradients(ctx, dy)
        origins = (dy, *ctx.saved_tensors)
        return tuple(None if g is None else _FirstOrderOnly.apply(g, *origins) for g in gradients)


# Function.apply binds the arguments to forward's signature: reading a ready one saves 5 µs of a call's 33
_LoraLinear.forward.__signature__ = signature(_LoraLinear.forward)  # pyright: ignore[reportFunctionMemberAccess]


def _gradients(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 9
    x, s, weight, a, b, seed = ctx.saved_tensors
    needs_dx, needs_weight, needs_bias, needs_a, needs_b = ctx.needs_input_grad[:5]
    needs = [needs_dx, needs_a, needs_b]
    dx, da, db = torch.ops.petune.lora_linear_backward(dy, x, s, weight, a, b, ctx.scale, ctx.dropout_p, seed, needs)
    dweight = dbias = None
    if needs_weight or needs_bias:  # a trainable base is not what LoRA is for: plain torch, outside of the op
        rows = dy.reshape(-1, dy.shape[-1])
        dweight = rows.T @ x.reshape(-1, x.shape[-1]).to(rows.dtype) if needs_weight else None
        dbias = rows.sum(0) if needs_bias else None
    adapters = (da if needs_a else None, db if needs_b else None)
    return (dx if needs_dx else None, dweight, dbias, *adapters, None, None, None, None)


class _FirstOrderOnly(torch.autograd.Function):
    """The identity on a gradient, with an error as its gradient: else a second derivative would be lost unseen."""

    @staticmethod
    def forward(gradient: Tensor, *_: Tensor | None) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            "lora_linear was asked for a second derivative and has only a first one; for gradient penalties and the "
            "like use peft.LoraConfig, whose layers are made of plain torch operators."
        )


def _implementation(x: Tensor, *args: Any) -> ModuleType:
    """The module whose forward and backward run: Triton's where it covers the case, else the reference."""
    mode = os.environ.get("PETUNE_KERNELS", "auto")
    if mode not in _MODES:
        raise ValueError(f"PETUNE_KERNELS={mode!r} is not one of {', '.join(_MODES)}; unset it for auto.")
    if mode == "reference" or (mode == "auto" and not x.is_cuda):
        return reference
    kernel = _kernel()
    reason = "petune has no Triton kernel for lora_linear yet" if kernel is None else kernel.unsupported(x, *args)
    if kernel is not None and reason is None:
        return kernel
    if mode == "triton":
        raise RuntimeError(f"PETUNE_KERNELS=triton, but {reason}; unset it or set it to reference.")
    _log_once(reason)
    return reference


@cache
def _kernel() -> ModuleType | None:
    # imported on the first CUDA call: a machine without a GPU never loads triton
    return importlib.import_module(_KERNEL) if find_spec(_KERNEL) and find_spec("triton") else None


@cache
def _log_once(reason: str) -> None:
    logger.warning("lora_linear runs its plain torch reference: %s", reason)


def _run(direction: str, *args: Any) -> tuple[Tensor, ...]:
    function = getattr(_implementation(*args), direction)
    device = args[0].device.type
    if not torch.is_autocast_enabled(device):
        return function(*args)
    with torch.autocast(device, enabled=False):  # the op has cast by `dtype` already, its fp32 sums stay fp32
        return function(*args)


def _forward(*args: Any) -> tuple[Tensor, ...]:
    return _run("forward", *args)


def _backward(*args: Any) -> tuple[Tensor, ...]:
    return _run("backward", *args)


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    y = x.new_empty(*x.shape[:-1], weight.shape[0], dtype=rest[-1])
    return y, x.new_empty(y.numel() // weight.shape[0], a.shape[0], dtype=rest[-1])


def _fake_backward(dy: Tensor, x: Any, s: Any, weight: Tensor, a: Tensor, b: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    shapes = ((*dy.shape[:-1], weight.shape[1]), a.shape, b.shape)
    return tuple(
        like.new_empty(shape if needed else 0)
        for like, shape, needed in zip((dy, a, b), shapes, rest[-1], strict=True)
    )


def _register() -> None:
    ops = torch.ops.petune
    _LIBRARY.impl("lora_linear_forward", _forward, "CompositeExplicitAutograd")
    _LIBRARY.impl("lora_linear_backward", _backward, "CompositeExplicitAutograd")
    torch.library.register_fake("petune::lora_linear_forward", _fake_forward, lib=_LIBRARY)
    torch.library.register_fake("petune::lora_linear_backward", _fake_backward, lib=_LIBRARY)
    torch.library.register_autograd(
        "petune::lora_linear_forward",
        _LoraLinear.backward,
        setup_context=lambda ctx, inputs, output: _LoraLinear.setup_context(ctx, inputs, output),
        lib=_LIBRARY,
    )
    register_flop_formula(ops.lora_linear_forward)(_forward_flops)
    register_flop_formula(ops.lora_linear_backward)(_backward_flops)


def _forward_flops(x: Any, weight: Any, bias: Any, a: Any, *_: Any, **__: Any) -> int:
    """x Wᵀ, x Aᵀ and s Bᵀ; shapes in, multiply-adds counted as two."""
    tokens = prod(x[:-1])
    return 2 * tokens * (weight[0] * weight[1] + a[0] * (weight[0] + weight[1]))


def _backward_flops(dy: Any, x: Any, s: Any, weight: Any, a: Any, b: Any, *rest: Any, **__: Any) -> int:
    """dy B and, where asked for, dy W + ds A, dsᵀ x, dyᵀ s and the s that was not kept."""
    (out_features, in_features), rank = weight, a[0]
    needs_dx, needs_da, needs_db = rest[-1]
    skinny = out_features * (1 + needs_db) + in_features * (needs_dx + needs_da + (needs_db and s is None))
    return 2 * prod(dy[:-1]) * (rank * skinny + needs_dx * out_features * in_features)


_register()
