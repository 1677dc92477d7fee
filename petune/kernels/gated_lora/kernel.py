"""`gated` and `gated_lora` on Triton: the gate in one pass each way, around the launches of `lora_linear`.

h is written once forward and once more backward, by the pass that makes dgate and dup from dh; dup takes dh's buffer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from petune.kernels.dropout import mask_of
from petune.kernels.gated_lora import gate as gates
from petune.kernels.lora_linear import kernel as lora_linear
from petune.kernels.lora_linear.kernel import dual, outer, project_back, shrink, unsupported

__all__ = ["backward", "forward", "gate_backward", "gate_forward", "unsupported"]


def gate_forward(gate: Tensor, up: Tensor, activation: str, dtype: torch.dtype) -> tuple[Tensor]:
    """h = act(gate) ⊙ up in `dtype`; computed in fp32 and rounded once."""
    return (gates.gate_forward(gate, up, activation, dtype),)


def gate_backward(dh: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """dgate = dh ⊙ up ⊙ act′(gate),  dup = dh ⊙ act(gate); both in the dtype of dh."""
    return gates.gate_backward(dh, gate, up, activation)[:2]


def forward(
    gate: Tensor, up: Tensor, activation: str, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor,
    scale: float, dropout_p: float, seed: Tensor | None, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y and s of `lora_linear` for x = h = act(gate) ⊙ up."""
    h = gates.gate_forward(gate, up, activation, dtype)
    return lora_linear.forward(h, weight, bias, a, b, scale, dropout_p, seed, dtype)


def backward(
    dy: Tensor, gate: Tensor | None, up: Tensor | None, s: Tensor | None, activation: str, weight: Tensor, a: Tensor,
    b: Tensor, scale: float, dropout_p: float, seed: Tensor | None, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """ds = scale/q · dy B,  dB = scale/q · dyᵀ s,  dh = dy W + m ⊙ (ds A),  dA = dsᵀ (h ⊙ m), then dgate and dup.

    `needs` says which of (dgate, dup), dA and dB to compute; the others are empty. dB takes s or makes it from h.
    """
    needs_dh, needs_da, needs_db = needs
    mask = mask_of(dropout_p, seed)
    if mask:
        scale = scale / mask.keep_probability
    rows, h = dy.reshape(-1, dy.shape[-1]), None
    if (needs_db and s is None) or (needs_da and not needs_dh):  # else the pass over dh makes h as well
        assert gate is not None
        assert up is not None
        h = gates.gate_forward(gate, up, activation, dy.dtype).view(-1, a.shape[1])
    dgate, dup, da, db = dy.new_empty(0), dy.new_empty(0), a.new_empty(0), b.new_empty(0)
    if needs_db:
        if s is None:
            assert h is not None
            s = shrink(h, a, mask=mask)
        ds, db = dual(rows, s, b, scale=scale)
    else:
        ds = shrink(rows, b.T, scale=scale)
    if needs_dh:
        assert gate is not None
        assert up is not None
        dh = project_back(rows, weight.to(dy.dtype), ds, a, mask).view(*dy.shape[:-1], a.shape[1])
        with_h = needs_da and h is None
        dgate, dup, made = gates.gate_backward(dh, gate, up, activation, in_place=True, with_h=with_h)
        h = h if made is None else made.view(-1, a.shape[1])
    if needs_da:
        assert h is not None
        da = outer(h, ds, dtype=a.dtype, mask=mask)
    return dgate, dup, da, db
