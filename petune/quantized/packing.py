"""Codes of a few bits as bytes, and latents rebuilt from them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from petune.quantized.quantizer import EPSILON, Quantization, statistics


class Entry(NamedTuple):
    """One packed weight."""

    name: str
    """Of the module, in the checkpoint."""
    shape: torch.Size
    quantization: Quantization

    @property
    def size(self) -> int:
        """Bytes of its codes."""
        return packed_bytes(self.shape.numel(), self.quantization.bits)

    @property
    def rows(self) -> int:
        """Rows of the table of statistics."""
        return self.quantization.rows(self.shape)

    @property
    def stored_bytes(self) -> int:
        """Of codes and statistics, (μ, σ) in float32 for each row, in a checkpoint."""
        return self.size + 8 * self.rows


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of `count` codes: the last byte is filled up with zeros."""
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes in 0..2**bits − 1, flat, as uint8 [packed_bytes]: the first code in the lowest bits of the first byte."""
    table = codes.to("cpu", torch.uint8).numpy()[:, None] >> np.arange(bits, dtype=np.uint8)
    return torch.from_numpy(np.packbits(table & 1, bitorder="little"))


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: `count` codes, uint8."""
    table = np.unpackbits(packed.cpu().numpy(), count=count * bits, bitorder="little").reshape(count, bits)
    return torch.from_numpy((table << np.arange(bits, dtype=np.uint8)).sum(1, dtype=np.uint8))


def encode(entries: Sequence[Entry], latents: Sequence[Tensor], anchors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """All weights as one blob of codes, uint8, and one table of (μ, σ), float32, [rows of all, 2].

    Raises:
        ValueError: a latent is not finite, or a row of it has no variance without being zero.
    """
    blobs: list[Tensor] = []
    tables: list[Tensor] = []
    for entry, latent, anchor in zip(entries, latents, anchors, strict=True):
        latent, anchor = latent.detach().cpu(), anchor.cpu()
        if not torch.isfinite(latent).all():
            raise ValueError(
                f"{entry.name} contains non-finite values (NaN or infinity), which have no code; train it again."
            )
        stats = statistics(latent, entry.rows, anchor)
        constant = (stats[:, 1] == 0) & (stats[:, 0] != 0)
        if constant.any():
            raise ValueError(
                f"the weight of {entry.name} has zero variance in {int(constant.sum())} of {len(stats)} rows and is "
                "not zero; it cannot be quantised: start it from random values, or train it."
            )
        blobs.append(pack(entry.quantization.codes(latent, stats).flatten(), entry.quantization.bits))
        tables.append(stats)
    return torch.cat(blobs), torch.cat(tables)


def decode(entries: Sequence[Entry], blob: Tensor, table: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The codes, uint8 and packed, and the statistics of each entry: slices of blob and table.

    Raises:
        ValueError: blob or table has another size than the entries have together.
    """
    size, rows = sum(entry.size for entry in entries), sum(entry.rows for entry in entries)
    if blob.numel() != size or table.numel() != 2 * rows:
        bits = sorted({entry.quantization.bits for entry in entries})
        raise ValueError(
            f"packed tensor has {blob.numel()} bytes and {table.numel() // 2} rows of statistics, expected {size} and "
            f"{rows} (bits={', '.join(map(str, bits))}, {len(entries)} tensors); it is cut short, or was trained on "
            "another base or with another config."
        )
    if not torch.isfinite(table).all():
        raise ValueError("the packed adapter's statistics are not finite; it was damaged: export it again.")
    blobs = blob.flatten().split([entry.size for entry in entries])
    tables = table.reshape(-1, 2).split([entry.rows for entry in entries])
    return list(zip(blobs, tables, strict=True))


def rebuild(entry: Entry, packed: Tensor, stats: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A latent with these codes, and the anchor that gives it exactly these statistics.

    W = μ + σ (q − mean(q)) / std(q) has mean μ and std σ but for rounding, so that training goes on with the quantiser
    as it was. Where that would move a weight into another cell (8 bits and heavy tails: the outer cells are short) the
    weights stand in the middle of their cells instead, W = μ + (σ + ε) q.

    Raises:
        ValueError: `dtype` has too few digits to hold the codes.
    """
    quantization, stats = entry.quantization, stats.detach().cpu().float()
    codes = unpack(packed, quantization.bits, entry.shape.numel()).view(entry.rows, -1).long()
    q = quantization.values()[codes]
    mean, std = stats.split(1, dim=1)
    spread = q.std(1, keepdim=True)
    standard = mean + std * (q - q.mean(1, keepdim=True)) / torch.where(spread == 0, 1.0, spread)
    for latent in (standard, mean + (std + EPSILON) * q * (std != 0)):
        latent = latent.to(dtype).view(entry.shape)
        same = quantization.codes(latent, stats) == codes
        if (same | (std == 0)).all():
            return latent, torch.cat([stats, statistics(latent, entry.rows)], dim=1)
    raise ValueError(
        f"{entry.name}: its {quantization.bits}-bit codes cannot be held by a latent of {dtype}; load the adapter "
        "with autocast_adapter_dtype=True."
    )
