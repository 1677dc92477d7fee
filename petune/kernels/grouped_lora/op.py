"""`grouped_lora` and `grouped_lora_projections`: checks, and the autograd.Function around the two ops.

Both are one operator, of one projection or of several that read one x.
"""

from collections.abc import Sequence
from itertools import chain
from math import prod
from typing import Any

import torch
from torch import Tensor

from petune.kernels.autograd import first_order_only, product_dtype
from petune.kernels.checks import check_dropout, described
from petune.kernels.grouped_lora.groups import RowGroups, check_base, check_lengths
from petune.kernels.grouped_lora.reference import by_projection
from petune.kernels.grouped_lora.registered import BACKWARD, FORWARD


def grouped_lora(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    groups: RowGroups,
    dropout_p: Sequence[float] | float = 0.0,
    seeds: Sequence[Tensor | int] | None = None,
    token_index: Tensor | None = None,
    rank_mask: Tensor | None = None,
) -> Tensor:
    """y[t] = x[t] Wᵀ + bias + scale_l · s[t] B_lᵀ,  s[t] = drop_l(x[t]) A_lᵀ ⊙ rank_mask[t]

    l is the adapter of the token's row.

    Tokens of a row that takes none get x[t] Wᵀ + bias. No token and no gradient sees another adapter's numbers, be
    they NaN. Kept for backward: x itself and s, [tokens, largest rank].

    The mask of adapter l is the one that `petune.kernels.lora_linear.lora_linear` draws from seed l for the tokens of
    its rows alone, in their order: a run that is trained among others drops what it drops alone.

    The gradient of an adapter that is in no row is None, as if it had not been in the batch, so that an optimizer
    leaves it as it is; it is zero where the host does not know: for ids on a GPU, and in a compiled function.

    Args:
        x: activations, [..., in_features]; the leading axes are the tokens, those of one row beside each other. A row
            is a token, a sequence, an image: tokens / rows of them.
        weight: base weight W, [out_features, in_features], any strides; dtype of x.
        bias: [out_features] or None; dtype of x.
        a: down projections A_l, [rank_l, in_features], any floating dtype.
        b: up projections B_l, [out_features, rank_l], any floating dtype.
        scales: alpha_l / rank_l, dimensionless.
        groups: which adapter each row takes.
        dropout_p: probability that an element of x is dropped on its way to A_l, 0 <= p < 1; one for all, or for each.
        seeds: of the adapters' masks, an int or an integer tensor of one element for each; what stands for an adapter
            without dropout is not used. None draws one for each adapter with dropout, in their order, from the
            device's default generator, which `torch.manual_seed` and activation checkpointing replay.
        token_index: the place of each token among those of its adapter as its mask counts them, 0 or more, int32 or
            int64, [tokens]. None counts them as they stand. It is for batches padded to another length than alone.
        rank_mask: dropout between A and B as the caller draws it, 0 or 1/keep, [tokens, largest rank], any floating
            dtype, its rows those of x; of an adapter of a smaller rank the first columns count. None for none.

    Returns:
        y, [..., out_features], dtype of x or of autocast. Products accumulate in fp32; dA_l, dB_l have the dtypes of
        A_l, B_l.

    Raises:
        ValueError: lists differ in length, tokens do not divide into rows, shapes, dtypes or devices disagree, a rank
            is 0, dropout_p is out of range, or rank_mask asks for a gradient.
    """
    dropped = dropout_p, seeds, token_index, rank_mask
    return grouped_lora_projections(x, [weight], [bias], [a], [b], [scales], groups, *dropped)[0]


def grouped_lora_projections(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a: Sequence[Sequence[Tensor]],
    b: Sequence[Sequence[Tensor]],
    scales: Sequence[Sequence[float]],
    groups: RowGroups,
    dropout_p: Sequence[float] | float = 0.0,
    seeds: Sequence[Tensor | int] | None = None,
    token_index: Tensor | None = None,
    rank_mask: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """y_i[t] = x[t] W_iᵀ + bias_i + scale_il · s_i[t] B_ilᵀ,  s_i[t] = drop_l(x[t]) A_ilᵀ ⊙ rank_mask[t]

    `grouped_lora` for several projections of one x, such as those of attention: each has its W_i, and each adapter a
    pair A_il, B_il for it. An adapter's projections share one mask, as those of `petune.kernels.lora_group` do. The
    factors of a projection whose y_i is not used get no gradient.

    Args:
        x: activations, [..., in_features].
        weights: base weights W_i, [out_features_i, in_features]; dtype of x.
        biases: [out_features_i] or None for each; dtype of x.
        a: for each projection the down projections of all adapters, [rank_il, in_features].
        b: for each projection the up projections of all adapters, [out_features_i, rank_il].
        scales: for each projection alpha_il / rank_il of all adapters.
        groups: which adapter each row takes.
        dropout_p: of an adapter's tokens; one for all, or for each adapter.
        seeds: of the adapters' masks, as in `grouped_lora`.
        token_index: as in `grouped_lora`.
        rank_mask: of s_i, [tokens, largest rank]; the same for all projections.

    Returns:
        y_i, [..., out_features_i], dtype of x or of autocast.

    Raises:
        ValueError: as `grouped_lora`, or the projections differ in number.
    """
    dtype, cast = product_dtype(x)
    if not weights or len({len(column) for column in (weights, biases, a, b, scales)}) > 1:
        found = ", ".join(str(len(column)) for column in (weights, biases, a, b, scales))
        raise ValueError(
            f"grouped_lora: weights, biases, a, b and scales have {found} entries; pass one of each for every "
            "projection."
        )
    dropout = [float(dropout_p)] * groups.adapters if isinstance(dropout_p, (float, int)) else list(dropout_p)
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        check_base("grouped_lora", x, weight, bias, groups, cast)
        check_lengths("grouped_lora", groups, a=a[i], b=b[i], scales=scales[i], dropout_p=dropout, seeds=seeds)
        _check_factors(x, weight, a[i], b[i])
    for p in dropout:
        check_dropout("grouped_lora", p)
    drawn = _seeds(dropout, seeds, x.device)
    if token_index is not None:
        _check_token_index(token_index, x)
        token_index = None if drawn is None else token_index
    downs, ups, factors = list(chain(*a)), list(chain(*b)), list(chain(*scales))
    if rank_mask is not None:
        _check_rank_mask(rank_mask, x, downs)
    order, offsets = groups.sorted_on(x.device)
    layout = order, offsets, dropout, drawn, token_index, rank_mask
    trained = (x, *weights, *biases, *downs, *ups)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in trained):
        present = groups.present() or (True,) * groups.adapters
        return _GroupedLora.apply(*layout, present, factors, dtype, *trained)  # pyright: ignore[reportReturnType]
    return tuple(FORWARD(x, weights, biases, downs, ups, factors, *layout, dtype, False)[: len(weights)])


# --- checks --------------------------------------------------------------------------------------------------------


def _check_factors(x: Tensor, weight: Tensor, a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    (out_features, in_features), device = weight.shape, x.device
    for i, (down, up) in enumerate(zip(a, b, strict=True)):
        if down.dim() == up.dim() == 2 and down.device == device == up.device:
            rank, width = down.shape
            if rank and width == in_features and up.shape == (out_features, rank):
                continue
        if not down.device == device == up.device:
            fault = "are not on one device; move the model and its input to the same one."
        elif 0 in (*down.shape[:1], *up.shape[1:]):
            fault = "have rank 0; leave out an adapter of no rank, and give its rows the id -1."
        else:
            fault = "do not fit; pass [..., in_features], [out_features, in_features], [rank, in_features] and "
            fault += "[out_features, rank]."
        named = {"x": x, "weight": weight, f"a[{i}]": down, f"b[{i}]": up}
        raise ValueError(f"grouped_lora: {described(named)} {fault}")


def _check_token_index(token_index: Tensor, x: Tensor) -> None:
    tokens = prod(x.shape[:-1])
    fits = token_index.shape == (tokens,) and token_index.dtype in (torch.int32, torch.int64)
    if not fits or token_index.device != x.device:
        raise ValueError(
            f"grouped_lora: {described({'x': x, 'token_index': token_index})} do not fit; pass int32 or int64 "
            f"[tokens] = [{tokens}] on the device of x."
        )
    if token_index.is_cpu and tokens and not torch.compiler.is_compiling() and int(token_index.min()) < 0:
        raise ValueError(
            f"grouped_lora: token_index has {int(token_index.min())}; count the tokens of every adapter from 0, and "
            "give padding any of them."
        )


def _check_rank_mask(rank_mask: Tensor, x: Tensor, a: Sequence[Tensor]) -> None:
    expected = (prod(x.shape[:-1]), max(down.shape[0] for down in a))
    if rank_mask.shape != expected or not rank_mask.is_floating_point() or rank_mask.device != x.device:
        raise ValueError(
            f"grouped_lora: {described({'x': x, 'rank_mask': rank_mask})} do not fit; pass a floating-point rank_mask "
            f"[tokens, largest rank] = {list(expected)} on the device of x."
        )
    if rank_mask.requires_grad:
        raise ValueError("grouped_lora: rank_mask asks for a gradient, and a mask has none; pass rank_mask.detach().")


def _seeds(dropout: Sequence[float], seeds: Sequence[Tensor | int] | None, device: torch.device) -> Tensor | None:
    """One seed for each adapter, int64 [adapters], 0 for those without dropout; None without any."""
    wanted = [i for i, p in enumerate(dropout) if p > 0.0]
    if not wanted:
        return None
    if seeds is None:
        drawn = torch.randint(2**63 - 1, (len(wanted),), device=device)
        if len(wanted) == len(dropout):
            return drawn
        found = dict(zip(wanted, drawn.split(1), strict=True))
    else:
        found = {i: _as_seed(i, seeds[i], device) for i in wanted}
    return torch.cat([found[i] if i in found else next(iter(found.values())) * 0 for i in range(len(dropout))])


def _as_seed(adapter: int, seed: Tensor | int, device: torch.device) -> Tensor:
    if not isinstance(seed, Tensor):
        return torch.full((1,), seed, dtype=torch.int64, device=device)
    if seed.numel() != 1 or seed.is_floating_point() or seed.device != device:
        raise ValueError(
            f"grouped_lora: {described({f'seeds[{adapter}]': seed})} is no integer of one element on {device}; pass "
            "an int, or what torch.randint draws there."
        )
    return seed.reshape(1).long()


# --- the gradient --------------------------------------------------------------------------------------------------


_CONSTANTS = 9  # arguments of the function before x


class _GroupedLora(torch.autograd.Function):
    """Two opaque ops with a gradient; the tensors come flat, because a list hides them from autograd."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        order: Tensor,
        offsets: Tensor,
        dropout: Sequence[float],
        seeds: Tensor | None,
        token_index: Tensor | None,
        rank_mask: Tensor | None,
        present: Sequence[bool],
        scales: Sequence[float],
        dtype: torch.dtype,
        x: Tensor,
        *flat: Any,
    ) -> tuple[Tensor, ...]:
        weights, biases, a, b = _columns(flat, len(scales))
        needs_weights, _, needs_a, needs_b = _columns(ctx.needs_input_grad[_CONSTANTS + 1 :], len(scales))
        layout = order, offsets, dropout, seeds, token_index, rank_mask
        found = FORWARD(x, weights, biases, a, b, scales, *layout, dtype, any(needs_b))
        ys, ss = by_projection(found, 2)
        kept_x = x if any(needs_a) or any(needs_weights) else None
        ctx.save_for_backward(kept_x, order, offsets, seeds, token_index, rank_mask, *ss, *weights, *a, *b)
        ctx.dropout, ctx.scales, ctx.present = dropout, scales, present
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return _gradients(ctx, dys)
        with torch.no_grad():
            gradients = _gradients(ctx, dys)
        return first_order_only("grouped_lora", gradients, (*dys, *ctx.saved_tensors))


def _columns(flat: Sequence[Any], factors: int) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
    """What belongs to the weights, the biases, a and b.

    Args:
        flat: one after the other.
        factors: length of a, and of b.
    """
    size = len(flat) // 2 - factors
    stops = size, 2 * size, 2 * size + factors
    first, second, third = stops
    return list(flat[:first]), list(flat[first:second]), list(flat[second:third]), list(flat[third:])


def _gradients(ctx: Any, dys: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    if all(dy is None for dy in dys):
        return (None,) * len(ctx.needs_input_grad)
    x, order, offsets, seeds, token_index, rank_mask, *kept = ctx.saved_tensors
    size, flat = len(dys), len(ctx.scales)
    ss, weights = kept[:size], kept[size : 2 * size]
    a, b = by_projection(kept[2 * size :], 2)
    needs_dx, *needs = ctx.needs_input_grad[_CONSTANTS:]
    needs_weights, needs_biases, needs_a, needs_b = _columns(needs, flat)
    used = [here and dy is not None for dy in dys for here in ctx.present]
    needs_a, needs_b = ([need and own for need, own in zip(half, used, strict=True)] for half in (needs_a, needs_b))
    rows = _rows(dys, weights)
    layout = order, offsets, ctx.dropout, seeds, token_index, rank_mask
    dx, *found = BACKWARD(rows, x, ss, weights, a, b, ctx.scales, *layout, needs_dx, needs_a, needs_b)
    das, dbs = [], []
    for i, (da, db) in enumerate(zip(*by_projection(found, 2), strict=True)):
        own = slice(i * len(ctx.present), (i + 1) * len(ctx.present))
        das += _parts(da, a[own], needs_a[own])
        dbs += _parts(db, b[own], needs_b[own])
    # a trainable base is not what LoRA is for: plain torch, outside of the op
    dweights = [
        _flat(dy).T @ _flat(x).to(dy.dtype) if need and given is not None else None
        for dy, given, need in zip(rows, dys, needs_weights, strict=True)
    ]
    dbiases = [
        _flat(dy).sum(0) if need and given is not None else None
        for dy, given, need in zip(rows, dys, needs_biases, strict=True)
    ]
    return *(None,) * _CONSTANTS, dx if needs_dx else None, *dweights, *dbiases, *das, *dbs


def _rows(dys: Sequence[Tensor | None], weights: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of all outputs, zero where an output was not used."""
    known = next(dy for dy in dys if dy is not None)
    return [
        known.new_zeros(*known.shape[:-1], len(weight)) if dy is None else dy
        for dy, weight in zip(dys, weights, strict=True)
    ]


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _parts(joint: Tensor, factors: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """The gradient of each factor from that of all of them, None where it has none."""
    if not any(needs):
        return [None] * len(needs)
    shapes = {factor.shape for factor in factors}
    if len(shapes) == 1:  # views of all in one call
        parts = joint.view(len(factors), *shapes.pop()).unbind()
    else:
        flat = joint.flatten().split([factor.numel() for factor in factors])
        parts = [part.view(like.shape) for part, like in zip(flat, factors, strict=True)]
    return [part.to(like.dtype) if need else None for part, like, need in zip(parts, factors, needs, strict=True)]
