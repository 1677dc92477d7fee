"""`grouped_joined_lora`: the factors of all adapters in two tensors, for batches that take them again and again."""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from petune.kernels.autograd import product_dtype
from petune.kernels.checks import described
from petune.kernels.dispatch import Dispatcher
from petune.kernels.grouped_lora import reference
from petune.kernels.grouped_lora.groups import RowGroups, check_base, check_lengths
from petune.kernels.grouped_lora.registered import rank_tokens

_DISPATCHER = Dispatcher("grouped_lora", reference)
_LIBRARY = torch.library.Library("petune", "FRAGMENT")
_LIBRARY.define(
    "grouped_joined_lora(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, int[] ranks, float[] scales, "
    "Tensor order, Tensor offsets, ScalarType dtype) -> Tensor"
)


class JoinedFactors(NamedTuple):
    """The factors of all adapters of one layer."""

    a: Tensor
    """A_l one below the other, [Σ rank, in_features]."""
    b: Tensor
    """B_l beside each other, [out_features, Σ rank]."""
    ranks: tuple[int, ...]
    """Of each adapter, 1 or more."""
    scales: tuple[float, ...]
    """Dimensionless."""

    @classmethod
    @torch.no_grad()
    def of(cls, a: Sequence[Tensor], b: Sequence[Tensor], scales: Sequence[float]) -> "JoinedFactors":
        """A copy of what `grouped_lora` takes one by one."""
        return cls(torch.cat(tuple(a)), torch.cat(tuple(b), dim=1), tuple(len(down) for down in a), tuple(scales))


def grouped_joined_lora(
    x: Tensor, weight: Tensor, bias: Tensor | None, factors: JoinedFactors, groups: RowGroups
) -> Tensor:
    """y[t] = x[t] Wᵀ + bias + scale_l · (x[t] A_lᵀ) B_lᵀ    for the adapter l of the token's row

    For inference: `grouped_lora` joins the factors in every call, which takes longer than the rest where each row has
    one token. Rows, and what a token sees, are as there.

    Args:
        x: activations, [..., in_features].
        weight: base weight W, [out_features, in_features], any strides; dtype of x.
        bias: [out_features] or None; dtype of x.
        factors: of all adapters; ranks may differ.
        groups: which adapter each row takes.

    Returns:
        y, [..., out_features], dtype of x or of autocast. Products accumulate in fp32.

    Raises:
        ValueError: there is not one rank and one scale for each adapter, tokens do not divide into rows, or shapes,
            dtypes or devices disagree.
        RuntimeError: an operand asks for a gradient.
    """
    dtype, cast = product_dtype(x)
    check_base("grouped_joined_lora", x, weight, bias, groups, cast)
    a, b, ranks, scales = factors
    check_lengths("grouped_joined_lora", groups, ranks=ranks, scales=scales)
    out_features, in_features = weight.shape
    fits = a.shape == (sum(ranks), in_features) and b.shape == (out_features, sum(ranks)) and min(ranks) > 0
    if not fits or not a.device == b.device == x.device:
        raise ValueError(
            f"grouped_joined_lora: {described({'x': x, 'weight': weight, 'a': a, 'b': b})} and the ranks {ranks} do "
            "not fit; pass [Σ rank, in_features] and [out_features, Σ rank] on the device of x, ranks of 1 or more."
        )
    named = {"x": x, "weight": weight, "bias": bias, "a": a, "b": b}
    if torch.is_grad_enabled() and (
        asking := [name for name, t in named.items() if t is not None and t.requires_grad]
    ):
        raise RuntimeError(
            f"grouped_joined_lora was asked for the gradient of {', '.join(asking)} and is for inference alone; call "
            "it under torch.no_grad(), or train by grouped_lora."
        )
    return _FORWARD(x, weight, bias, a, b, ranks, scales, *groups.sorted_on(x.device), dtype)


# --- the op --------------------------------------------------------------------------------------------------------


def _forward(x: Tensor, *rest: Any) -> Tensor:
    *_, ranks, _, _, _, dtype = rest
    return _DISPATCHER.run("joined_forward", (x, *rest), dtype=dtype, rank=max(ranks))[0]


def _fake(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=rest[-1])


def _flops(
    x: Tensor, weight: Tensor, bias: Any, a: Any, b: Any, ranks: Sequence[int], scales: Any, order: Tensor,
    offsets: Tensor, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """x Wᵀ, and x A_lᵀ and s B_lᵀ of each token's adapter; multiply-adds counted as two."""
    tokens, (out_features, in_features) = prod(x.shape[:-1]), weight.shape
    skinny = rank_tokens(ranks, order, offsets, tokens) * (out_features + in_features)
    return 2 * (tokens * out_features * in_features + skinny)


_LIBRARY.impl("grouped_joined_lora", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("petune::grouped_joined_lora", _fake, lib=_LIBRARY)
_FORWARD = torch.ops.petune.grouped_joined_lora.default
register_flop_formula(torch.ops.petune.grouped_joined_lora, get_raw=True)(_flops)
