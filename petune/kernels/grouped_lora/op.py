"""`grouped_lora`: checks, the two registered ops, and the autograd.Function around them."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from petune.kernels.autograd import first_order_only, product_dtype
from petune.kernels.checks import check_dropout, described
from petune.kernels.dispatch import Dispatcher
from petune.kernels.grouped_lora import reference
from petune.kernels.grouped_lora.groups import RowGroups, check_base, check_lengths

_DISPATCHER = Dispatcher("grouped_lora", reference)
_LIBRARY = torch.library.Library("petune", "FRAGMENT")
_LIBRARY.define(
    "grouped_lora_forward(Tensor x, Tensor weight, Tensor? bias, Tensor[] a, Tensor[] b, float[] scales, "
    "Tensor order, Tensor offsets, float[] dropout_p, Tensor? seeds, Tensor? token_index, Tensor? rank_mask, "
    "ScalarType dtype, bool keeps_s) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "grouped_lora_backward(Tensor dy, Tensor? x, Tensor? s, Tensor weight, Tensor[] a, Tensor[] b, float[] scales, "
    "Tensor order, Tensor offsets, float[] dropout_p, Tensor? seeds, Tensor? token_index, Tensor? rank_mask, "
    "bool needs_dx, bool[] needs_a, bool[] needs_b) -> (Tensor, Tensor, Tensor)"
)


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
    dtype, cast = product_dtype(x)
    check_base("grouped_lora", x, weight, bias, groups, cast)
    dropout = [float(dropout_p)] * len(a) if isinstance(dropout_p, (float, int)) else list(dropout_p)
    check_lengths("grouped_lora", groups, a=a, b=b, scales=scales, dropout_p=dropout, seeds=seeds)
    for p in dropout:
        check_dropout("grouped_lora", p)
    _check_factors(x, weight, a, b)
    drawn = _seeds(dropout, seeds, x.device)
    if token_index is not None:
        _check_token_index(token_index, x)
        token_index = None if drawn is None else token_index
    if rank_mask is not None:
        _check_rank_mask(rank_mask, x, a)
    order, offsets = groups.sorted_on(x.device)
    layout = order, offsets, dropout, drawn, token_index, rank_mask
    scales = list(scales)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, *a, *b)):
        present = groups.present() or (True,) * len(a)
        return _GroupedLora.apply(*layout, present, scales, dtype, x, weight, bias, *a, *b)  # pyright: ignore[reportReturnType]
    return _FORWARD(x, weight, bias, a, b, scales, *layout, dtype, False)[0]


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
    """Two opaque ops with a gradient; the factors come flat, because a list hides its tensors from autograd."""

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
        weight: Tensor,
        bias: Tensor | None,
        *factors: Tensor,
    ) -> Tensor:
        a, b = _halves(factors)
        needs_a, needs_b = _halves(ctx.needs_input_grad[_CONSTANTS + 3 :])
        layout = order, offsets, dropout, seeds, token_index, rank_mask
        y, s = _FORWARD(x, weight, bias, a, b, scales, *layout, dtype, any(needs_b))
        kept_x = x if any(needs_a) or ctx.needs_input_grad[_CONSTANTS + 1] else None
        ctx.save_for_backward(kept_x, s, weight, order, offsets, seeds, token_index, rank_mask, *factors)
        ctx.dropout, ctx.scales, ctx.present = dropout, scales, present
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return _gradients(ctx, dy)
        with torch.no_grad():
            gradients = _gradients(ctx, dy)
        return first_order_only("grouped_lora", gradients, (dy, *ctx.saved_tensors))


def _halves(flat: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """What belongs to a and to b."""
    size = len(flat) // 2
    return list(flat[:size]), list(flat[size:])


def _gradients(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * len(ctx.needs_input_grad)
    x, s, weight, order, offsets, seeds, token_index, rank_mask, *factors = ctx.saved_tensors
    a, b = _halves(factors)
    needs_dx, needs_weight, needs_bias, *needs = ctx.needs_input_grad[_CONSTANTS:]
    needs_a, needs_b = (
        [need and here for need, here in zip(half, ctx.present, strict=True)] for half in _halves(needs)
    )
    layout = order, offsets, ctx.dropout, seeds, token_index, rank_mask
    dx, da, db = _BACKWARD(dy, x, s, weight, a, b, ctx.scales, *layout, needs_dx, needs_a, needs_b)
    ranks = [down.shape[0] for down in a]
    das, dbs = [None] * len(a), [None] * len(b)
    if any(needs_a):
        das = [t.to(like.dtype) if need else None for t, like, need in zip(da.split(ranks), a, needs_a, strict=True)]
    if any(needs_b):
        parts = db.split([weight.shape[0] * rank for rank in ranks])
        dbs = [
            part.view(like.shape).to(like.dtype) if need else None
            for part, like, need in zip(parts, b, needs_b, strict=True)
        ]
    dweight = dbias = None
    if needs_weight or needs_bias:  # a trainable base is not what LoRA is for: plain torch, outside of the op
        rows = dy.reshape(-1, dy.shape[-1])
        dweight = rows.T @ x.reshape(-1, x.shape[-1]).to(rows.dtype) if needs_weight else None
        dbias = rows.sum(0) if needs_bias else None
    return (*(None,) * _CONSTANTS, dx if needs_dx else None, dweight, dbias, *das, *dbs)


# --- the ops -------------------------------------------------------------------------------------------------------


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, a: Sequence[Tensor], *rest: Any) -> tuple[Tensor, ...]:
    rank = max(down.shape[0] for down in a)
    return _DISPATCHER.run("forward", (x, weight, bias, a, *rest), dtype=rest[-2], rank=rank)


def _backward(dy: Tensor, x: Any, s: Any, weight: Tensor, a: Sequence[Tensor], *rest: Any) -> tuple[Tensor, ...]:
    rank = max(down.shape[0] for down in a)
    return _DISPATCHER.run("backward", (dy, x, s, weight, a, *rest), dtype=dy.dtype, rank=rank)


def _fake_forward(x: Tensor, weight: Tensor, bias: Any, a: Sequence[Tensor], *rest: Any) -> tuple[Tensor, Tensor]:
    dtype, keeps_s = rest[-2:]
    y = x.new_empty(*x.shape[:-1], weight.shape[0], dtype=dtype)
    ranks = max(down.shape[0] for down in a) if keeps_s else 0
    return y, x.new_empty(prod(x.shape[:-1]), ranks, dtype=dtype)


def _fake_backward(
    dy: Tensor, x: Any, s: Any, weight: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    needs_dx, needs_a, needs_b = rest[-3:]
    ranks, (out_features, in_features) = sum(down.shape[0] for down in a), weight.shape
    return (
        dy.new_empty((*dy.shape[:-1], in_features) if needs_dx else 0),
        dy.new_empty(ranks if any(needs_a) else 0, in_features, dtype=reference.widest(a)),
        dy.new_empty(out_features * ranks if any(needs_b) else 0, dtype=reference.widest(b)),
    )


def rank_tokens(ranks: Sequence[int], order: Tensor, offsets: Tensor, tokens: int) -> int:
    """Σ over the tokens of the rank of their adapter; as if all had the largest, where the offsets have no values."""
    if type(offsets) is not Tensor or offsets.is_meta:
        return tokens * max(ranks)
    bounds = offsets.tolist()
    per_row = tokens // len(order) if len(order) else 0
    return per_row * sum(rank * (stop - first) for rank, first, stop in zip(ranks, bounds, bounds[1:], strict=False))


def _forward_flops(
    x: Tensor, weight: Tensor, bias: Any, a: Sequence[Tensor], b: Any, scales: Any, order: Tensor, offsets: Tensor,
    *_: Any, **__: Any,
) -> int:  # fmt: skip
    """x Wᵀ, and x A_lᵀ and s B_lᵀ of each token's adapter; multiply-adds counted as two."""
    tokens, (out_features, in_features) = prod(x.shape[:-1]), weight.shape
    skinny = rank_tokens([down.shape[0] for down in a], order, offsets, tokens) * (out_features + in_features)
    return 2 * (tokens * out_features * in_features + skinny)


def _backward_flops(
    dy: Tensor, x: Any, s: Any, weight: Tensor, a: Sequence[Tensor], b: Any, scales: Any, order: Tensor,
    offsets: Tensor, dropout_p: Any, seeds: Any, token_index: Any, rank_mask: Any, needs_dx: bool,
    needs_a: Sequence[bool], needs_b: Sequence[bool], **_: Any,
) -> int:  # fmt: skip
    """dy W and, of each token's adapter, dy B_l, ds A_l, dsᵀ x and dyᵀ s as far as they are asked for."""
    tokens, (out_features, in_features) = prod(dy.shape[:-1]), weight.shape

    def of(asking: Sequence[bool]) -> int:
        ranks = [down.shape[0] if asks else 0 for down, asks in zip(a, asking, strict=True)]
        return rank_tokens(ranks, order, offsets, tokens)

    ds = of([needs_dx or need for need in needs_a])
    skinny = (ds + of(needs_b)) * out_features + (of([needs_dx] * len(a)) + of(needs_a)) * in_features
    return 2 * (needs_dx * tokens * out_features * in_features + skinny)


_LIBRARY.impl("grouped_lora_forward", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("grouped_lora_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("petune::grouped_lora_forward", _fake_forward, lib=_LIBRARY)
torch.library.register_fake("petune::grouped_lora_backward", _fake_backward, lib=_LIBRARY)
_FORWARD = torch.ops.petune.grouped_lora_forward.default
_BACKWARD = torch.ops.petune.grouped_lora_backward.default
register_flop_formula(torch.ops.petune.grouped_lora_forward, get_raw=True)(_forward_flops)
register_flop_formula(torch.ops.petune.grouped_lora_backward, get_raw=True)(_backward_flops)
