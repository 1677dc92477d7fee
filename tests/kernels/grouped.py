"""What the tests of the grouped operators share: batches of rows of several adapters, and the loop over them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from petune.kernels.grouped_lora import RowGroups, grouped_lora

RANKS = (1, 3, 8, 24, 5)
SCALES = (0.5, 2.0, 1.5, -1.0, 0.75)
IN, OUT = 17, 23
ROWS = {
    "sorted": (-1, 0, 0, 1, 2, 3, 4),
    "beside each other": (3, 3, -1, 0, 4, 4, -1),
    "scattered": (4, 0, 3, -1, 0, 1, 4),
    "one adapter": (2, 2, 2, 2, 2, 2, 2),
    "the base alone": (-1, -1, -1, -1, -1, -1, -1),
}


class Batch(NamedTuple):
    """A frozen linear layer with five adapters, and rows for them."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    a: list[Tensor]
    b: list[Tensor]

    @property
    def trained(self) -> list[Tensor]:
        """What asks for a gradient."""
        return [t for t in (self.x, *self.a, *self.b) if t.requires_grad]


def batch(
    *lead: int, dtype: torch.dtype = torch.float32, adapter_dtype: torch.dtype | None = None, ranks=RANKS,
    in_features: int = IN, out_features: int = OUT, device: torch.device | None = None,
) -> Batch:  # fmt: skip
    """Each update about as large as the frozen output."""

    def draw(*shape: int, of: torch.dtype = dtype, scale: float = 1.0, trained: bool = False) -> Tensor:
        return (scale * torch.randn(*shape, device=device)).to(of).requires_grad_(trained)

    own = adapter_dtype or dtype
    a = [draw(rank, in_features, of=own, trained=True) for rank in ranks]
    b = [draw(out_features, rank, of=own, scale=rank**-0.5, trained=True) for rank in ranks]
    return Batch(
        draw(*lead, in_features, trained=True), draw(out_features, in_features), draw(out_features), a, b
    )  # fmt: skip


def grouped(tensors: Batch, ids, scales=SCALES, **dropout) -> Tensor:
    groups = ids if isinstance(ids, RowGroups) else RowGroups.of(ids, len(tensors.a))
    return grouped_lora(*tensors, scales, groups, **dropout)


def detached(tensors: Batch) -> Batch:
    x, weight, bias, a, b = tensors
    return Batch(x.detach(), weight, bias, [t.detach() for t in a], [t.detach() for t in b])


def in_double(tensors: Batch) -> Batch:
    """The same values as leaves of float64."""

    def wide(t: Tensor) -> Tensor:
        return t.detach().double().requires_grad_(t.requires_grad)

    x, weight, bias, a, b = tensors
    return Batch(wide(x), wide(weight), wide(bias), [wide(t) for t in a], [wide(t) for t in b])


def tokens_of(adapter: int, ids: Sequence[int], tokens: int) -> list[int]:
    """The tokens of an adapter's rows, in their order."""
    per_row = tokens // len(ids) if ids else 0
    return [row * per_row + i for row, own in enumerate(ids) if own == adapter for i in range(per_row)]


def loop(tensors: Batch, ids: Sequence[int], masks: dict[int, Tensor] | None = None, scales=SCALES) -> Tensor:
    """The formula, one adapter after the other; masks are those of an adapter's own tokens, with their 1/q."""
    x, weight, bias, a, b = tensors
    rows = x.reshape(-1, x.shape[-1])
    y = F.linear(rows, weight, bias)
    for adapter, (down, up, scale) in enumerate(zip(a, b, scales, strict=True)):
        if own := tokens_of(adapter, ids, len(rows)):
            index = torch.tensor(own, device=x.device)
            part = rows[index] if masks is None else rows[index] * masks[adapter]
            y = y.index_add(0, index, scale * (part @ down.T) @ up.T)
    return y.view(*x.shape[:-1], len(weight))


def gradients(y: Tensor, tensors: Batch, dy: Tensor | None = None) -> list[Tensor]:
    """y, then the gradient of everything that asks for one: zero where it is None."""
    if dy is None:
        dy = torch.linspace(-1, 1, y.numel(), device=y.device).bfloat16().to(y.dtype).view(y.shape)
    found = torch.autograd.grad(y, tensors.trained, dy, allow_unused=True)
    return [y, *(torch.zeros_like(t) if g is None else g for t, g in zip(tensors.trained, found, strict=True))]
