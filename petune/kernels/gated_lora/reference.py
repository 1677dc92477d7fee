"""The specification of `gated` and `gated_lora` in plain torch: every kernel is tested against these functions."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from petune.kernels.lora_linear import reference as lora_linear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
_BACKWARDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": partial(torch.ops.aten.gelu_backward, approximate="tanh"),
}


def gate_forward(gate: Tensor, up: Tensor, activation: str, dtype: torch.dtype) -> tuple[Tensor]:
    """h = act(gate) ⊙ up in `dtype`; computed in fp32 at least and rounded once."""
    return ((ACTIVATIONS[activation](_wide(gate)) * up).to(dtype),)


def gate_backward(dh: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """dgate = dh ⊙ up ⊙ act′(gate),  dup = dh ⊙ act(gate); both in the dtype of dh."""
    dgate = _BACKWARDS[activation](_wide(dh) * up, _wide(gate))
    return dgate.to(dh.dtype), (ACTIVATIONS[activation](_wide(gate)) * dh).to(dh.dtype)


def forward(
    gate: Tensor, up: Tensor, activation: str, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor,
    scale: float, dropout_p: float, seed: Tensor | None, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y and s of `lora_linear` for x = h = act(gate) ⊙ up."""
    (h,) = gate_forward(gate, up, activation, dtype)
    return lora_linear.forward(h, weight, bias, a, b, scale, dropout_p, seed, dtype)


def differentiable(
    gate: Tensor, up: Tensor, activation: str, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor,
    scale: float, dropout_p: float, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The same formula in operators that torch differentiates any number of times, forward or backward, or vmaps."""
    (h,) = gate_forward(gate, up, activation, dtype)
    return lora_linear.differentiable(h, weight, bias, a, b, scale, dropout_p, dtype)


def backward(
    dy: Tensor, gate: Tensor | None, up: Tensor | None, s: Tensor | None, activation: str, weight: Tensor, a: Tensor,
    b: Tensor, scale: float, dropout_p: float, seed: Tensor | None, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dh, dA and dB of `lora_linear` for an h that is made again, then dgate and dup from dh.

    `needs` says which of (dgate, dup), dA and dB to compute; the others are empty. dB takes s or makes it from h.
    """
    needs_dh, needs_da, needs_db = needs
    h = None
    if needs_da or (needs_db and s is None):
        assert gate is not None
        assert up is not None
        (h,) = gate_forward(gate, up, activation, dy.dtype)
    dh, da, db = lora_linear.backward(dy, h, s, weight, a, b, scale, dropout_p, seed, needs)
    if not needs_dh:
        return dh, dy.new_empty(0), da, db
    assert gate is not None
    assert up is not None
    return (*gate_backward(dh, gate, up, activation), da, db)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
