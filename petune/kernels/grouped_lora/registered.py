"""The two registered ops of `grouped_lora`: what runs them, what they give, and what they cost."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from petune.kernels.dispatch import Dispatcher
from petune.kernels.grouped_lora import reference
from petune.kernels.grouped_lora.reference import by_projection

_DISPATCHER = Dispatcher("grouped_lora", reference)
_LIBRARY = torch.library.Library("petune", "FRAGMENT")
_LIBRARY.define(
    "grouped_lora_forward(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor[] a, Tensor[] b, float[] scales, "
    "Tensor order, Tensor offsets, float[] dropout_p, Tensor? seeds, Tensor? token_index, Tensor? rank_mask, "
    "ScalarType dtype, bool keeps_s) -> Tensor[]"
)
_LIBRARY.define(
    "grouped_lora_backward(Tensor[] dys, Tensor? x, Tensor[] s, Tensor[] weights, Tensor[] a, Tensor[] b, "
    "float[] scales, Tensor order, Tensor offsets, float[] dropout_p, Tensor? seeds, Tensor? token_index, "
    "Tensor? rank_mask, bool needs_dx, bool[] needs_a, bool[] needs_b) -> Tensor[]"
)


def _forward(x: Tensor, weights: Any, biases: Any, a: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    rank = max(down.shape[0] for down in a)
    return list(_DISPATCHER.run("forward", (x, weights, biases, a, *rest), dtype=rest[-2], rank=rank))


def _backward(dys: Sequence[Tensor], x: Any, s: Any, weights: Any, a: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    rank = max(down.shape[0] for down in a)
    return list(_DISPATCHER.run("backward", (dys, x, s, weights, a, *rest), dtype=dys[0].dtype, rank=rank))


def _fake_forward(x: Tensor, weights: Sequence[Tensor], biases: Any, a: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    dtype, keeps_s = rest[-2:]
    ys = [x.new_empty(*x.shape[:-1], weight.shape[0], dtype=dtype) for weight in weights]
    ranks = [max(down.shape[0] for down in own) if keeps_s else 0 for own in by_projection(a, len(weights))]
    return [*ys, *(x.new_empty(prod(x.shape[:-1]), rank, dtype=dtype) for rank in ranks)]


def _fake_backward(
    dys: Sequence[Tensor], x: Any, s: Any, weights: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor],
    *rest: Any,
) -> list[Tensor]:  # fmt: skip
    needs_dx, needs_a, needs_b = rest[-3:]
    dy, in_features = dys[0], weights[0].shape[1]
    ranks = [sum(down.shape[0] for down in own) for own in by_projection(a, len(weights))]
    das = [dy.new_empty(rank if any(needs_a) else 0, in_features, dtype=reference.widest(a)) for rank in ranks]
    dbs = [
        dy.new_empty(weight.shape[0] * rank if any(needs_b) else 0, dtype=reference.widest(b))
        for weight, rank in zip(weights, ranks, strict=True)
    ]
    return [dy.new_empty((*dy.shape[:-1], in_features) if needs_dx else 0), *das, *dbs]


def rank_tokens(ranks: Sequence[int], order: Tensor, offsets: Tensor, tokens: int) -> int:
    """Σ over the tokens of the rank of their adapter; as if all had the largest, where the offsets have no values."""
    if type(offsets) is not Tensor or offsets.is_meta:
        return tokens * max(ranks)
    bounds = offsets.tolist()
    per_row = tokens // len(order) if len(order) else 0
    return per_row * sum(rank * (stop - first) for rank, first, stop in zip(ranks, bounds, bounds[1:], strict=False))


def _forward_flops(
    x: Tensor, weights: Sequence[Tensor], biases: Any, a: Sequence[Tensor], b: Any, scales: Any, order: Tensor,
    offsets: Tensor, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """x W_iᵀ, and x A_ilᵀ and s_i B_ilᵀ of each token's adapter; multiply-adds counted as two."""
    tokens, total = prod(x.shape[:-1]), 0
    for weight, own in zip(weights, by_projection(a, len(weights)), strict=True):
        out_features, in_features = weight.shape
        skinny = rank_tokens([down.shape[0] for down in own], order, offsets, tokens) * (out_features + in_features)
        total += 2 * (tokens * out_features * in_features + skinny)
    return total


def _backward_flops(
    dys: Sequence[Tensor], x: Any, s: Any, weights: Sequence[Tensor], a: Sequence[Tensor], b: Any, scales: Any,
    order: Tensor, offsets: Tensor, dropout_p: Any, seeds: Any, token_index: Any, rank_mask: Any, needs_dx: bool,
    needs_a: Sequence[bool], needs_b: Sequence[bool], **_: Any,
) -> int:  # fmt: skip
    """dy_i W_i and, of each token's adapter, dy_i B_il, ds_i A_il, ds_iᵀ x and dy_iᵀ s_i as far as they are asked
    for."""
    tokens, total = prod(dys[0].shape[:-1]), 0
    columns = (by_projection(one, len(weights)) for one in (a, needs_a, needs_b))
    for weight, own, own_a, own_b in zip(weights, *columns, strict=True):
        out_features, in_features = weight.shape

        def of(asking: Sequence[bool], own: Sequence[Tensor] = own) -> int:
            ranks = [down.shape[0] if asks else 0 for down, asks in zip(own, asking, strict=True)]
            return rank_tokens(ranks, order, offsets, tokens)

        ds = of([needs_dx or need for need in own_a])
        skinny = (ds + of(own_b)) * out_features + (of([needs_dx] * len(own)) + of(own_a)) * in_features
        total += 2 * (needs_dx * tokens * out_features * in_features + skinny)
    return total


_LIBRARY.impl("grouped_lora_forward", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("grouped_lora_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("petune::grouped_lora_forward", _fake_forward, lib=_LIBRARY)
torch.library.register_fake("petune::grouped_lora_backward", _fake_backward, lib=_LIBRARY)
FORWARD = torch.ops.petune.grouped_lora_forward.default
BACKWARD = torch.ops.petune.grouped_lora_backward.default
register_flop_formula(torch.ops.petune.grouped_lora_forward, get_raw=True)(_forward_flops)
register_flop_formula(torch.ops.petune.grouped_lora_backward, get_raw=True)(_backward_flops)
