"""`lora_group`: shape checks, the two registered ops, and their gradient."""

from collections.abc import Sequence
from itertools import chain
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from petune.kernels.autograd import first_order_only, product_dtype
from petune.kernels.checks import check_dropout, described, projection_fault
from petune.kernels.dispatch import Dispatcher
from petune.kernels.lora_group import reference

_DISPATCHER = Dispatcher("lora_group", reference)
_SIZES = range(2, 5)  # gate/up is 2, q/k/v is 3, and a fourth projection of one input is the most that models have

_LIBRARY = torch.library.Library("petune", "FRAGMENT")
_LIBRARY.define(
    "lora_group_forward(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor[] a, Tensor[] b, float[] scales, "
    "float dropout_p, Tensor? seed, ScalarType dtype) -> Tensor[]"
)
_LIBRARY.define(
    "lora_group_backward(Tensor a, Tensor? x, Tensor[] s, Tensor[] dys, Tensor[] weights, Tensor[] b, float[] scales, "
    "float dropout_p, Tensor? seed, bool[] needs) -> Tensor[]"
)


def lora_group(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    dropout_p: float = 0.0,
) -> tuple[Tensor, ...]:
    """y_i = x W_iᵀ + bias_i + scale_i · (drop(x) A_iᵀ) B_iᵀ    (Hu et al. 2021, eq. 3; all i from one read of x)

    One mask serves the whole group, where PEFT draws one for each projection: each y_i has the same distribution, and
    they are no longer independent of each other. Kept for backward: x itself, once, and on a GPU s = drop(x) Aᵀ,
    [tokens, Σ rank]; x is never overwritten. All else is as in `petune.kernels.lora_linear.lora_linear`.

    Args:
        x: activations, [..., in_features].
        weights: 2..4 base weights W_i, [out_features_i, in_features], any strides; dtype of x.
        biases: [out_features_i] or None for each; dtype of x.
        a: down projections A_i, [rank_i, in_features], any floating dtype.
        b: up projections B_i, [out_features_i, rank_i], any floating dtype.
        scales: alpha_i / rank_i, dimensionless.
        dropout_p: probability that an element of x is dropped on its way to all A_i, 0 <= p < 1.

    Returns:
        y_i, [..., out_features_i], dtype of x or of autocast. Products accumulate in fp32; dA_i, dB_i have the dtypes
        of A_i, B_i; an A_i, B_i whose y_i is not used gets no gradient.

    Raises:
        ValueError: the lists differ in length, shapes or dtypes disagree, or dropout_p is out of range.
    """
    dtype, cast = product_dtype(x)
    _check(x, weights, biases, a, b, scales, dropout_p, cast)
    if torch._C._are_functorch_transforms_active():  # torch.func differentiates no autograd.Function of this form
        return reference.differentiable(x, weights, biases, a, b, scales, dropout_p, dtype)
    seed = torch.randint(2**63 - 1, (1,), device=x.device) if dropout_p > 0.0 else None
    return _LoraGroup.apply(scales, dropout_p, seed, dtype, x, *weights, *biases, *a, *b)  # pyright: ignore[reportReturnType]


def _check(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], a: Sequence[Tensor], b: Sequence[Tensor],
    scales: Sequence[float], dropout_p: float, cast: bool,
) -> None:  # fmt: skip
    lengths = [len(column) for column in (weights, biases, a, b, scales)]
    if len(set(lengths)) > 1 or lengths[0] not in _SIZES:
        raise ValueError(
            f"lora_group: weights, biases, a, b and scales have {', '.join(map(str, lengths))} entries; pass equally "
            f"many of each, {_SIZES[0]} to {_SIZES[-1]}."
        )
    check_dropout("lora_group", dropout_p)
    for i, (weight, bias, down, up) in enumerate(zip(weights, biases, a, b, strict=True)):
        if fault := projection_fault(x, weight, bias, down, up, cast):
            named = {"x": x, f"weights[{i}]": weight, f"biases[{i}]": bias, f"a[{i}]": down, f"b[{i}]": up}
            raise ValueError(f"lora_group: {described(named)} {fault}")


class _LoraGroup(torch.autograd.Function):
    """Two opaque ops with a gradient; the parameters come flat, because a list hides its tensors from autograd."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        scales: Sequence[float],
        dropout_p: float,
        seed: Tensor | None,
        dtype: torch.dtype,
        x: Tensor,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, ...]:
        weights, biases, a, b = _columns(parameters)
        *ys, s = _FORWARD(x, weights, biases, a, b, scales, dropout_p, seed, dtype)
        needs_weights, _, needs_a, needs_b = _columns(ctx.needs_input_grad[5:])
        keeps_x = any(needs_a) or any(needs_weights)
        # s = drop(x) Aᵀ again costs a hundredth of the step on a CPU, and one more pass over x on a GPU
        keeps_s = any(needs_b) and (x.is_cuda or not keeps_x)
        ctx.save_for_backward(x if keeps_x else None, s if keeps_s else None, seed, *weights, *a, *b)
        ctx.scales, ctx.dropout_p = scales, dropout_p
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return _gradients(ctx, dys)
        with torch.no_grad():
            gradients = _gradients(ctx, dys)
        return first_order_only("lora_group", gradients, (*dys, *ctx.saved_tensors))


def _columns(flat: Sequence[Any]) -> tuple[Sequence[Any], ...]:
    """What belongs to the weights, the biases, a and b."""
    size = len(flat) // 4
    return flat[:size], flat[size : 2 * size], flat[2 * size : 3 * size], flat[3 * size :]


def _gradients(ctx: Any, dys: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    live = {i: dy for i, dy in enumerate(dys) if dy is not None}  # an output that nothing used passes nothing back
    if not live:
        return (None,) * len(ctx.needs_input_grad)
    x, s, seed, *kept = ctx.saved_tensors
    size, (needs_dx, *needs) = len(dys), ctx.needs_input_grad[4:]
    needs_weights, needs_biases, needs_a, needs_b = _columns(needs)
    weights, a, b = ([kept[i + start] for i in live] for start in (0, size, 2 * size))
    ranks = [factor.shape[0] for factor in kept[size : 2 * size]]
    parts = [] if s is None else [s.split(ranks, dim=1)[i] for i in live]
    scales = [ctx.scales[i] for i in live]
    flags = [needs_dx, any(needs_a[i] for i in live), *(needs_b[i] for i in live)]
    stacked, dy = torch.cat(a), list(live.values())
    dx, da, *dbs = _BACKWARD(stacked, x, parts, dy, weights, b, scales, ctx.dropout_p, seed, flags)

    das = da.split([ranks[i] for i in live]) if flags[1] else (None,) * len(live)
    columns: list[list[Tensor | None]] = [[None] * size for _ in range(4)]
    for i, rows, da, db in zip(live, dy, das, dbs, strict=True):
        rows = rows.reshape(-1, rows.shape[-1])
        # a trainable base is not what LoRA is for: plain torch, outside of the op
        columns[0][i] = rows.T @ x.reshape(-1, x.shape[-1]).to(rows.dtype) if needs_weights[i] else None
        columns[1][i] = rows.sum(0) if needs_biases[i] else None
        columns[2][i] = da
        columns[3][i] = db if needs_b[i] else None
    return (None, None, None, None, dx if needs_dx else None, *chain(*columns))


# --- the ops -------------------------------------------------------------------------------------------------------


def _forward(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], a: Sequence[Tensor], b: Sequence[Tensor],
    scales: Sequence[float], dropout_p: float, seed: Tensor | None, dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    args = (x, weights, biases, a, b, scales, dropout_p, seed, dtype)
    return list(_DISPATCHER.run("forward", args, dtype=dtype, rank=sum(factor.shape[0] for factor in a)))


def _backward(a: Tensor, x: Any, s: Any, dys: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    return list(_DISPATCHER.run("backward", (a, x, s, dys, *rest), dtype=dys[0].dtype, rank=a.shape[0]))


def _fake_forward(x: Tensor, weights: Sequence[Tensor], biases: Any, a: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    ys = [x.new_empty(*x.shape[:-1], weight.shape[0], dtype=rest[-1]) for weight in weights]
    return [*ys, x.new_empty(prod(x.shape[:-1]), sum(factor.shape[0] for factor in a), dtype=rest[-1])]


def _fake_backward(
    a: Tensor, x: Any, s: Any, dys: Sequence[Tensor], weights: Any, b: Sequence[Tensor], *rest: Any
) -> list[Tensor]:
    shapes = ((*dys[0].shape[:-1], a.shape[1]), a.shape, *(factor.shape for factor in b))
    likes = (dys[0], a, *b)
    return [
        like.new_empty(shape if needed else 0) for like, shape, needed in zip(likes, shapes, rest[-1], strict=True)
    ]


def _forward_flops(x: Any, weights: Any, biases: Any, a: Any, *_: Any, **__: Any) -> int:
    """x W_iᵀ, x A_iᵀ and s_i B_iᵀ; shapes in, multiply-adds counted as two."""
    pairs = zip(weights, a, strict=True)
    return 2 * prod(x[:-1]) * sum(n * k + rank * (n + k) for (n, k), (rank, _) in pairs)


def _backward_flops(a: Any, x: Any, s: Any, dys: Any, weights: Any, b: Any, *rest: Any, **__: Any) -> int:
    """dy_i B_i and, where asked for, dy_i W_i and ds A, dsᵀ x, dy_iᵀ s_i and the s that was not kept."""
    needs_dx, needs_da, *needs_db = rest[-1]
    shared = a[0] * a[1] * (needs_dx + needs_da + (any(needs_db) and not s))
    ups = sum(n * rank * (1 + needed) for (n, rank), needed in zip(b, needs_db, strict=True))
    return 2 * prod(dys[0][:-1]) * (shared + ups + needs_dx * sum(n * k for n, k in weights))


_LIBRARY.impl("lora_group_forward", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("lora_group_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("petune::lora_group_forward", _fake_forward, lib=_LIBRARY)
torch.library.register_fake("petune::lora_group_backward", _fake_backward, lib=_LIBRARY)
_FORWARD = torch.ops.petune.lora_group_forward.default
_BACKWARD = torch.ops.petune.lora_group_backward.default
register_flop_formula(torch.ops.petune.lora_group_forward)(_forward_flops)
register_flop_formula(torch.ops.petune.lora_group_backward)(_backward_flops)
