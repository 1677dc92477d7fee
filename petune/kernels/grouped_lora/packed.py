"""`grouped_packed_lora`: checks and the registered op."""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from petune.kernels.autograd import product_dtype
from petune.kernels.dispatch import Dispatcher
from petune.kernels.grouped_lora import reference
from petune.kernels.grouped_lora.groups import RowGroups, check_base, check_lengths
from petune.kernels.grouped_lora.registered import rank_tokens
from petune.kernels.packed_lora.reference import packed_fault

_DISPATCHER = Dispatcher("grouped_lora", reference)
_LIBRARY = torch.library.Library("petune", "FRAGMENT")
_LIBRARY.define(
    "grouped_packed_lora(Tensor x, Tensor weight, Tensor? bias, Tensor[] a_bits, Tensor[] a_levels, Tensor[] b_bits, "
    "Tensor[] b_levels, int[] ranks, int[] bits, float[] scales, Tensor order, Tensor offsets, ScalarType dtype) "
    "-> Tensor"
)


class PackedFactors(NamedTuple):
    """The factors Â and B̂ of one adapter as `petune.kernels.packed_lora.packed_lora` takes them."""

    a_bits: Tensor
    """Codes of Â [rank, in_features], uint8, flat."""
    a_levels: Tensor
    """What they stand for, float32, [rank, 2**bits], or [1, 2**bits] for all rows."""
    b_bits: Tensor
    """Codes of B̂ [out_features, rank], uint8, flat."""
    b_levels: Tensor
    """float32, [out_features, 2**bits] or [1, 2**bits]."""
    rank: int
    """1 or more."""
    bits: int
    """1, 2, 4 or 8 bits a code."""
    scale: float
    """Dimensionless."""


def grouped_packed_lora(
    x: Tensor, weight: Tensor, bias: Tensor | None, factors: Sequence[PackedFactors], groups: RowGroups
) -> Tensor:
    """y[t] = x[t] Wᵀ + bias + scale_l · (x[t] Â_lᵀ) B̂_lᵀ    for the adapter l of the token's row

    For inference. On a GPU the factors are unpacked in registers; elsewhere those of the adapters that are in the
    batch, for the time of the call. Rows, and what a token sees, are as in `grouped_lora`.

    Args:
        x: activations, [..., in_features].
        weight: base weight W, [out_features, in_features], any strides; dtype of x.
        bias: [out_features] or None; dtype of x.
        factors: of each adapter; ranks and bits may differ.
        groups: which adapter each row takes.

    Returns:
        y, [..., out_features], dtype of x or of autocast. Products accumulate in fp32.

    Raises:
        ValueError: there is not one entry for each adapter, tokens do not divide into rows, shapes, dtypes or devices
            disagree, or bits or a rank is out of range.
        RuntimeError: an operand asks for a gradient.
    """
    dtype, cast = product_dtype(x)
    check_base("grouped_packed_lora", x, weight, bias, groups, cast)
    check_lengths("grouped_packed_lora", groups, factors=factors)
    for i, factor in enumerate(factors):
        _check_factor(i, factor, weight)
    if torch.is_grad_enabled():
        _check_no_gradient({"x": x, "weight": weight, "bias": bias}, factors)
    a_bits, a_levels, b_bits, b_levels, ranks, bits, scales = (list(column) for column in zip(*factors, strict=True))
    order, offsets = groups.sorted_on(x.device)
    return _FORWARD(x, weight, bias, a_bits, a_levels, b_bits, b_levels, ranks, bits, scales, order, offsets, dtype)


def _check_factor(i: int, factor: PackedFactors, weight: Tensor) -> None:
    a_bits, a_levels, b_bits, b_levels, rank, bits, _ = factor
    if rank < 1:
        raise ValueError(
            f"grouped_packed_lora: factors[{i}]: rank={rank} is not positive; leave out an adapter of no rank, and "
            "give its rows the id -1."
        )
    for name, packed, levels, shape in (
        ("a", a_bits, a_levels, (rank, weight.shape[1])),
        ("b", b_bits, b_levels, (weight.shape[0], rank)),
    ):
        if fault := packed_fault(packed, levels, shape, bits):
            raise ValueError(f"grouped_packed_lora: factors[{i}].{name}: {fault}")
        if packed.device != weight.device:
            raise ValueError(
                f"grouped_packed_lora: factors[{i}].{name}: codes on {packed.device} and the base on {weight.device}; "
                "move them to the same device."
            )


def _check_no_gradient(base: dict[str, Tensor | None], factors: Sequence[PackedFactors]) -> None:
    levels = {f"factors[{i}].{name}": getattr(f, name) for i, f in enumerate(factors) for name in _LEVELS}
    if asking := [name for name, t in (base | levels).items() if t is not None and t.requires_grad]:
        raise RuntimeError(
            f"grouped_packed_lora was asked for the gradient of {', '.join(asking)} and is for inference alone; call "
            "it under torch.no_grad(), or train the latent weights by grouped_lora."
        )


_LEVELS = ("a_levels", "b_levels")


# --- the op --------------------------------------------------------------------------------------------------------


def _forward(x: Tensor, *rest: Any) -> Tensor:
    *_, ranks, _, _, _, _, dtype = rest
    return _DISPATCHER.run("packed_forward", (x, *rest), dtype=dtype, rank=max(ranks))[0]


def _fake(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=rest[-1])


def _flops(
    x: Tensor, weight: Tensor, bias: Any, a_bits: Any, a_levels: Any, b_bits: Any, b_levels: Any, ranks: Sequence[int],
    bits: Any, scales: Any, order: Tensor, offsets: Tensor, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """x Wᵀ, and x Â_lᵀ and s B̂_lᵀ of each token's adapter; multiply-adds counted as two."""
    tokens, (out_features, in_features) = prod(x.shape[:-1]), weight.shape
    skinny = rank_tokens(ranks, order, offsets, tokens) * (out_features + in_features)
    return 2 * (tokens * out_features * in_features + skinny)


_LIBRARY.impl("grouped_packed_lora", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("petune::grouped_packed_lora", _fake, lib=_LIBRARY)
_FORWARD = torch.ops.petune.grouped_packed_lora.default
register_flop_formula(torch.ops.petune.grouped_packed_lora, get_raw=True)(_flops)
