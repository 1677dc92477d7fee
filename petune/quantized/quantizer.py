"""Weights of a few bits: the codebooks, the quantiser, its gradient (Jie et al. 2023, arXiv 2307.16867, section 4).

A latent W, float32, is kept and trained; the layer computes with its quantised value Ŵ:

    μ, σ = mean(W), std(W)        σ unbiased, over the tensor or over each row
    z = (W − μ) / (σ + 1e-5)
    Ŵ = Q(z) · σ + μ              Q: the codebook's value of the cell that z lies in
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.special import ndtr, ndtri

BITS = (1, 2, 4, 8, 32)
"""What a weight may take; 32 leaves it as it is."""
CODEBOOKS = ("l1", "l2")
GRANULARITIES = ("tensor", "row")
EPSILON = 1e-5  # added to σ in z, but not in Ŵ
_ROUNDS = 500  # of both fixed points; at 8 bits l1 is still moving, and the paper's codebook is that of round 500


@dataclass(frozen=True)
class Quantization:
    """How a weight is quantised."""

    bits: int = 1
    """1, 2, 4, 8, or 32 for not at all."""
    codebook: Literal["l1", "l2"] = "l1"
    """Which error on a normal distribution is least: the absolute one, which is the paper's, or the squared one."""
    granularity: Literal["tensor", "row"] = "tensor"
    """What has a mean and a scale of its own."""

    @property
    def active(self) -> bool:
        """Whether weights are quantised at all."""
        return self.bits < 32

    def rows(self, shape: torch.Size | tuple[int, ...]) -> int:
        """How many parts of a weight of this shape have statistics of their own."""
        return shape[0] if self.granularity == "row" else 1

    def values(self, device: torch.device | str = "cpu") -> Tensor:
        """The codebook's values in ascending order, float32, [2**bits]."""
        return _on(self.bits, self.codebook, str(device))[0]

    def levels(self, stats: Tensor) -> Tensor:
        """value · σ + μ, [rows, 2**bits], of stats (μ, σ), [rows, 2]."""
        mean, std = stats.split(1, dim=1)
        return self.values(stats.device) * std + mean

    def codes(self, latent: Tensor, stats: Tensor) -> Tensor:
        """Index of the cell of each weight, int64, [rows, weights of a row]."""
        mean, std = stats.split(1, dim=1)
        z = (_in_rows(latent, len(stats)) - mean) / (std + EPSILON)
        return torch.bucketize(z, _on(self.bits, self.codebook, str(latent.device))[1], right=True)

    def quantized(self, latent: Tensor, stats: Tensor) -> Tensor:
        """Ŵ of the latent's shape, float32, without a gradient."""
        levels = self.levels(stats)
        if self.bits == 1:  # z >= 0 is W >= μ: the same numbers, without z
            above = _in_rows(latent, len(stats)) >= stats[:, :1]
            return torch.where(above, levels[:, 1:], levels[:, :1]).view_as(latent)
        return levels.gather(1, self.codes(latent, stats)).view_as(latent)


def statistics(latent: Tensor, rows: int, anchor: Tensor | None = None) -> Tensor:
    """(μ, σ) of each row, float32, [rows, 2].

    Args:
        latent: W, any shape whose elements divide into `rows`.
        rows: 1, or the size of the first axis.
        anchor: (μ₀, σ₀, m₀, s₀), float32, [rows, 4]; the statistics are then μ₀ + (mean − m₀) and σ₀ + (std − s₀), so
            that those of a latent rebuilt from its codes are μ₀ and σ₀ to the bit. Zeros change nothing.
    """
    spread = _in_rows(latent, rows)
    found = torch.cat([spread.mean(1, keepdim=True), spread.std(1, keepdim=True)], dim=1)
    if anchor is None:
        return found
    mean, std = (anchor[:, :2] + (found - anchor[:, 2:])).split(1, dim=1)
    return torch.cat([mean, std.clamp_min(0.0)], dim=1)


def straight_through(latent: Tensor, values: Tensor, stats: Tensor, anchor: Tensor) -> Tensor:
    """`values`, with the gradient of the quantiser: straight through in z, and through μ and σ.

    With G = ∂L/∂Ŵ, all sums over a row of n weights, and m, s the latent's own mean and std:

        g_z = G σ,   g_σ = Σ G q − Σ g_z (W − μ) / (σ + ε)²,   g_μ = Σ G − Σ g_z / (σ + ε)
        ∂L/∂W = g_z / (σ + ε) + g_μ / n + g_σ (W − m) / ((n − 1) s)

    A row whose weights are all equal takes the limit of small σ, ∂L/∂W = G: zeros can be trained.

    Args:
        latent: W, which takes the gradient.
        values: Ŵ as `Quantization.quantized` gives it.
        stats: the statistics that it was made with, [rows, 2].
        anchor: as in `statistics`.
    """
    return _StraightThrough.apply(latent, values, stats, anchor)  # pyright: ignore[reportReturnType]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, latent: Tensor, values: Tensor, stats: Tensor, anchor: Tensor
    ) -> Tensor:
        ctx.save_for_backward(latent, values, stats, anchor)
        return values.view_as(values)  # as it is, autograd would take `values` itself for the output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        latent, values, stats, anchor = ctx.saved_tensors
        rows = len(stats)
        g, w, quantized = (_in_rows(tensor, rows) for tensor in (gradient, latent, values))
        sums = g.sum(1, keepdim=True), (g * quantized).sum(1, keepdim=True), (g * w).sum(1, keepdim=True)
        if g.device.type != "cpu" or torch.compiler.is_compiling() or type(g) is not Tensor:
            ratio, slope, shift = _terms(torch.where, *sums, stats, anchor, w.shape[1])
        else:  # three dozen operations on a number or two each: NumPy takes a tenth of torch's time for them
            total, other, weighted = (tensor.numpy() for tensor in sums)
            terms = _terms(np.where, total, other, weighted, stats.numpy(), anchor.numpy(), w.shape[1])
            ratio, slope, shift = map(torch.from_numpy, terms)
        found = torch.addcmul(shift, slope, w).addcmul_(ratio, g)
        return found.view_as(latent).to(latent.dtype), None, None, None


def _terms(
    where: Any, total: Any, quantized: Any, weighted: Any, stats: Any, anchor: Any, size: int
) -> tuple[Any, Any, Any]:
    """a, b and c, [rows, 1], of ∂L/∂W = a G + b W + c, as `straight_through` has it; of tensors, or of arrays.

    Args:
        total, quantized, weighted: Σ G, Σ G Ŵ and Σ G W, [rows, 1].
        size: weights of a row.
    """
    mean, std = stats[:, :1], stats[:, 1:]
    own = stats - anchor[:, :2] + anchor[:, 2:]  # the anchor's formula the other way round
    flat = (std == 0) | (own[:, 1:] == 0)
    width = where(std == 0, 1.0, std + EPSILON)
    ratio = where(std == 0, 1.0, std / width)  # g_z / (σ + ε) = ratio · G
    # Σ G q from Ŵ = q σ + μ
    codes = (quantized - mean * total) / where(flat, 1.0, std)
    slope = (codes - ratio * (weighted - mean * total) / width) / ((size - 1) * where(flat, 1.0, own[:, 1:]))
    slope = where(flat, 0.0, slope)
    shift = (1.0 - ratio) * total / size - slope * own[:, :1]
    return ratio, slope, shift


def _in_rows(tensor: Tensor, rows: int) -> Tensor:
    return tensor.detach().reshape(rows, -1).float()


@torch.compiler.assume_constant_result  # else Dynamo traces the search for the codebook into every graph
def _on(bits: int, kind: str, device: str) -> tuple[Tensor, Tensor]:
    return _moved(bits, kind, device)


@cache
def _moved(bits: int, kind: str, device: str) -> tuple[Tensor, Tensor]:
    values, boundaries = _codebook(bits, kind)
    # outside of inference mode, whose tensors could not be used for training later
    with torch.inference_mode(False):
        return values.to(device, torch.float32), boundaries.to(device, torch.float32)


@cache
def _codebook(bits: int, kind: str) -> tuple[Tensor, Tensor]:
    """Values [2**bits] and the boundaries between their cells [2**bits − 1] for a standard normal z, float64.

    Both kinds are the fixed point of "a boundary is the midpoint of its values" with, for l1, "a value is the median
    of its cell", and for l2 (Lloyd 1982), "a value is the mean of its cell".
    """
    count = 2**bits
    values = torch.zeros(count, dtype=torch.float64)
    boundaries = values[1:]
    if kind == "l2":  # from zeros, empty cells would have no mean
        values = ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    for _ in range(_ROUNDS):
        boundaries = (values[1:] + values[:-1]) / 2
        edges = torch.cat([boundaries.new_full((1,), -torch.inf), boundaries, boundaries.new_full((1,), torch.inf)])
        mass = ndtr(edges)
        if kind == "l1":
            values = ndtri((mass[1:] + mass[:-1]) / 2)
        else:
            density = torch.exp(-edges.square() / 2) / (2 * torch.pi) ** 0.5
            values = (density[:-1] - density[1:]) / mass.diff()
    # the paper's boundaries are those of the round before its values
    return values, boundaries if kind == "l1" else (values[1:] + values[:-1]) / 2
