"""`packed_lora`: checks and the registered op."""

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from petune.kernels.autograd import product_dtype
from petune.kernels.checks import described, placement_fault
from petune.kernels.dispatch import Dispatcher
from petune.kernels.packed_lora import reference

_DISPATCHER = Dispatcher("packed_lora", reference)
_LIBRARY = torch.library.Library("petune", "FRAGMENT")
_LIBRARY.define(
    "packed_lora(Tensor x, Tensor weight, Tensor? bias, Tensor a_bits, Tensor a_levels, Tensor b_bits, "
    "Tensor b_levels, int rank, int bits, float scale, ScalarType dtype) -> Tensor"
)


def packed_lora(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a_bits: Tensor,
    a_levels: Tensor,
    b_bits: Tensor,
    b_levels: Tensor,
    rank: int,
    bits: int,
    scale: float,
) -> Tensor:
    """y = x Wᵀ + bias + scale · (x Âᵀ) B̂ᵀ,  Â[i, j] = a_levels[i, code(i · in_features + j)], B̂ alike

    For inference. On a GPU the factors are unpacked in registers, never in memory; elsewhere for the time of the call.
    Codes lie row by row, each byte filled from its lowest bits, and no row begins at a byte of its own.

    Args:
        x: activations, [..., in_features].
        weight: base weight W, [out_features, in_features], any strides; dtype of x.
        bias: [out_features] or None; dtype of x.
        a_bits: codes of Â [rank, in_features], uint8, [ceil(rank · in_features · bits / 8)].
        a_levels: what the codes of Â stand for, float32, [rank, 2**bits], or [1, 2**bits] for all rows.
        b_bits: codes of B̂ [out_features, rank], uint8, [ceil(out_features · rank · bits / 8)].
        b_levels: float32, [out_features, 2**bits] or [1, 2**bits].
        rank: 1 or more.
        bits: 1, 2, 4 or 8 bits a code.
        scale: dimensionless.

    Returns:
        y, [..., out_features], dtype of x or of autocast. Products accumulate in fp32.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or bits or rank is out of range.
        RuntimeError: an operand asks for a gradient.
    """
    dtype, cast = product_dtype(x)
    operands = {"x": x, "weight": weight, "bias": bias}
    if fault := _shape_fault(x, weight, bias) or placement_fault(x, weight, bias, a_bits, b_bits, cast):
        raise ValueError(f"packed_lora: {described({**operands, 'a_bits': a_bits, 'b_bits': b_bits})} {fault}")
    if rank < 1:
        raise ValueError(f"packed_lora: rank={rank} is not positive; leave out a factor of no rank.")
    for name, packed, levels, shape in (
        ("a", a_bits, a_levels, (rank, weight.shape[1])),
        ("b", b_bits, b_levels, (weight.shape[0], rank)),
    ):
        if fault := reference.packed_fault(packed, levels, shape, bits):
            raise ValueError(f"packed_lora: {name}: {fault}")
    if torch.is_grad_enabled():
        asking = {**operands, "a_levels": a_levels, "b_levels": b_levels}
        if names := [name for name, t in asking.items() if t is not None and t.requires_grad]:
            raise RuntimeError(
                f"packed_lora was asked for the gradient of {', '.join(names)} and is for inference alone; call it "
                "under torch.no_grad(), or train the latent weights by lora_linear."
            )
    return _FORWARD(x, weight, bias, a_bits, a_levels, b_bits, b_levels, rank, bits, scale, dtype)


def _shape_fault(x: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    if (
        x.dim() > 0
        and weight.dim() == 2
        and x.shape[-1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
    ):
        return ""
    return "do not fit; pass [..., in_features], [out_features, in_features] and [out_features]."


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, a_bits: Tensor, a_levels: Tensor, b_bits: Tensor, b_levels: Tensor,
    rank: int, bits: int, scale: float, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    args = (x, weight, bias, a_bits, a_levels, b_bits, b_levels, rank, bits, scale, dtype)
    return _DISPATCHER.run("forward", args, dtype=dtype, rank=rank)[0]


def _fake(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=rest[-1])


def _flops(
    x: Any,
    weight: Any,
    bias: Any,
    a_bits: Any,
    a_levels: Any,
    b_bits: Any,
    b_levels: Any,
    rank: int,
    *_: Any,
    **__: Any,
) -> int:
    """x Wᵀ, x Âᵀ and s B̂ᵀ; shapes in, multiply-adds counted as two."""
    return 2 * prod(x[:-1]) * (weight[0] * weight[1] + rank * (weight[0] + weight[1]))


_LIBRARY.impl("packed_lora", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("petune::packed_lora", _fake, lib=_LIBRARY)
_FORWARD = torch.ops.petune.packed_lora.default
register_flop_formula(torch.ops.petune.packed_lora)(_flops)
