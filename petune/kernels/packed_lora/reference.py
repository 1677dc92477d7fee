"""The specification of `packed_lora` in plain torch: every kernel is tested against these functions."""

import torch
from torch import Tensor

from petune.kernels.lora_linear import reference as lora_linear

BITS = (1, 2, 4, 8)
"""Bits of a code: they divide a byte, so that no code lies in two."""


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, a_bits: Tensor, a_levels: Tensor, b_bits: Tensor, b_levels: Tensor,
    rank: int, bits: int, scale: float, dtype: torch.dtype,
) -> tuple[Tensor]:  # fmt: skip
    """y = x Wᵀ + bias + scale · (x Âᵀ) B̂ᵀ in `dtype`."""
    a = unpacked(a_bits, a_levels, (rank, weight.shape[1]), bits)
    b = unpacked(b_bits, b_levels, (weight.shape[0], rank), bits)
    return (lora_linear.forward(x, weight, bias, a, b, scale, 0.0, None, dtype)[0],)


def unpacked(packed: Tensor, levels: Tensor, shape: tuple[int, int], bits: int) -> Tensor:
    """Ŵ[i, j] = levels[i, code(i · columns + j)], dense

    Args:
        packed: codes of `bits` bits, uint8, [ceil(rows · columns · bits / 8)]: row by row, each byte filled from its
            lowest bits, and no row begins at a byte of its own.
        levels: what the codes stand for, [rows, 2**bits], or [1, 2**bits] for all rows; on the device of `packed`.
        shape: (rows, columns).
        bits: 1, 2, 4 or 8.

    Returns:
        Ŵ, [rows, columns], dtype of levels.

    Raises:
        ValueError: packed or levels do not fit the shape.
    """
    if fault := packed_fault(packed, levels, shape, bits):
        raise ValueError(f"unpacked: {fault}")
    rows, columns = shape
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    codes = (packed.unsqueeze(1) >> shifts).bitwise_and_(2**bits - 1).flatten()[: rows * columns].view(shape)
    if bits == 1:
        return torch.where(codes.bool(), levels[:, 1:], levels[:, :1])
    index = codes.int()
    if len(levels) > 1:  # every row has a table of its own
        index += 2**bits * torch.arange(rows, dtype=torch.int32, device=packed.device).unsqueeze(1)
    return levels.flatten().index_select(0, index.flatten()).view(shape)


def packed_fault(packed: Tensor, levels: Tensor, shape: tuple[int, int], bits: int) -> str:
    """What is wrong with the codes or the levels of a matrix of this shape and what to do, or ""."""
    if bits not in BITS:
        return f"bits={bits} is not one of {', '.join(map(str, BITS))}; pack codes of a width that divides a byte."
    size = -(-shape[0] * shape[1] * bits // 8)
    if packed.dtype != torch.uint8 or packed.shape != (size,):
        return (
            f"codes {tuple(packed.shape)} {packed.dtype} do not fit a matrix {list(shape)} of {bits} bits an element; "
            f"pass uint8 [{size}], flat."
        )
    if levels.dtype != torch.float32 or levels.shape not in ((1, 2**bits), (shape[0], 2**bits)):
        return (
            f"levels {tuple(levels.shape)} {levels.dtype} do not fit codes of {bits} bits of a matrix {list(shape)}; "
            f"pass float32 [1, {2**bits}], or [{shape[0]}, {2**bits}] with one table for each row."
        )
    if packed.device != levels.device:
        return f"codes on {packed.device} and levels on {levels.device}; move them to the same device."
    return ""
