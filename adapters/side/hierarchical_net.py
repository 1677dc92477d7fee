"""The pyramid beside a ViT: four stages from the pixels down, and the two ways in which it ends."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from petune.adapters.side.hierarchical_config import HierarchicalSideConfig
from petune.quantized.linear import QuantizedLinear
from petune.quantized.quantizer import Quantization

_EPS = 1e-6  # of the norms in and after the side blocks, and of the head's (the authors' code)


@dataclass(frozen=True)
class Plan:
    """What a side network has to know of the model that it stands beside."""

    hidden_size: int
    channels: int
    """Of the image, as the patch convolution gets it."""
    blocks: int
    ends: tuple[int, ...]
    """How many blocks have been read at the end of each stage."""
    labels: int | None
    """Of the model's classifier; None where that keeps its place."""


class Linear(nn.Module):
    """y = x Ŵᵀ + b; the bias stands beside a map without one, since packed weights have none"""

    def __init__(self, in_features: int, out_features: int, quantization: Quantization) -> None:
        super().__init__()
        self.map = QuantizedLinear(in_features, out_features, quantization)
        self.bias = nn.Parameter(torch.zeros(out_features))
        nn.init.trunc_normal_(self.map.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.map.quantized().to(x.dtype), self.bias.to(x.dtype))


class Conv(nn.Module):
    """A convolution whose weight is a map of the patches it reads, [out_channels, in_channels · size²]."""

    def __init__(
        self, in_channels: int, out_channels: int, size: int, quantization: Quantization, *, bias: bool = True
    ) -> None:
        super().__init__()
        self.size = size
        self.map = QuantizedLinear(in_channels * size**2, out_channels, quantization)
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        nn.init.normal_(self.map.weight, std=(2.0 / (out_channels * size**2)) ** 0.5)

    def forward(self, image: Tensor) -> Tensor:
        """Half as high and wide: [batch, channels, height, width]."""
        weight = self.map.quantized().to(image.dtype).unflatten(1, (-1, self.size, self.size))
        bias = None if self.bias is None else self.bias.to(image.dtype)
        return F.conv2d(image, weight, bias, stride=2, padding=(self.size - 1) // 2)


class _WideStatistics(nn.Module):
    """A batch norm whose statistics stay in float32 where the model is cast to fewer bits: PEFT brings an adapter's
    parameters back to float32, but not its buffers (0.21.2)."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, now in self._buffers.items():
            then = before[name]
            if now is not None and then is not None and now.is_floating_point() and now.element_size() < 4:
                self._buffers[name] = then.to(now.device)
        return self


class BatchNorm1d(_WideStatistics, nn.BatchNorm1d):
    """Of vectors."""


class BatchNorm2d(_WideStatistics, nn.BatchNorm2d):
    """Of images."""


class Stem(nn.Module):
    """From pixels to a fourth of their height and width: [batch, channels, …] to [batch, height, width, dim]."""

    def __init__(self, channels: int, dim: int, quantization: Quantization) -> None:
        super().__init__()
        self.conv_in = Conv(channels, dim, 3, quantization, bias=False)
        self.batch_norm = BatchNorm2d(dim)
        self.conv_out = Conv(dim, dim, 2, quantization)
        self.norm = nn.LayerNorm(dim)

    def forward(self, image: Tensor) -> Tensor:
        image = self.conv_in(image.to(self.norm.weight.dtype))
        return self.norm(self.conv_out(F.relu(self.batch_norm(image))).permute(0, 2, 3, 1))


class Merge(nn.Module):
    """To half the height and width: [batch, channels, …] to [batch, height, width, dim]."""

    def __init__(self, channels: int, dim: int, quantization: Quantization) -> None:
        super().__init__()
        self.down = Conv(channels, dim, 3, quantization)
        self.norm = nn.LayerNorm(dim)

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(self.down(image).permute(0, 2, 3, 1))


class SideBlock(nn.Module):
    """x ← x + Attention(LN x, [meta; mean F]);  x ← x + F;  x ← x + MLP(LN x)    (Lin et al. 2023, section 3.3)"""

    def __init__(self, dim: int, heads: int, drop_path: float, quantization: Quantization) -> None:
        super().__init__()
        self.heads, self.drop_path = heads, drop_path
        self.meta_norm = nn.LayerNorm(dim)
        self.attention_norm = nn.LayerNorm(dim, eps=_EPS)
        self.query, self.key_value = Linear(dim, dim, quantization), Linear(dim, 2 * dim, quantization)
        self.out = Linear(dim, dim, quantization)
        self.mlp_norm = nn.LayerNorm(dim, eps=_EPS)
        self.mlp_in, self.mlp_out = Linear(dim, 4 * dim, quantization), Linear(4 * dim, dim, quantization)

    def forward(self, x: Tensor, meta: Tensor, patches: Tensor) -> Tensor:
        """Args: x and patches, [batch, height, width, dim]; meta, [batch, meta tokens, dim]."""
        few = torch.cat([self.meta_norm(meta), patches.flatten(1, 2).mean(1, keepdim=True)], dim=1)
        x = x + self._drop(self._attend(self.attention_norm(x), few))
        x = x + patches
        return x + self._drop(self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x)))))

    def _attend(self, x: Tensor, few: Tensor) -> Tensor:
        keys, values = self.key_value(few).chunk(2, dim=-1)
        query = self._split(self.query(x.flatten(1, 2)))
        y = F.scaled_dot_product_attention(query, self._split(keys), self._split(values))
        return self.out(y.transpose(1, 2).flatten(2)).view_as(x)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _drop(self, x: Tensor) -> Tensor:
        """A branch, without it for some rows of the batch in training."""
        if not (self.training and self.drop_path):
            return x
        return x * F.dropout(x.new_ones(len(x), 1, 1, 1), self.drop_path)


class Stage(nn.Module):
    """One scale: what enters it, the bridge from the backbone's width, and a side block for each block it reads."""

    def __init__(
        self, embed: nn.Module, hidden_size: int, dim: int, heads: int, rates: list[float], quantization: Quantization
    ) -> None:
        super().__init__()
        self.embed, self.drops_paths = embed, any(rates)
        self.bridge = Linear(hidden_size, dim, quantization) if rates else None
        self.blocks = nn.ModuleList(SideBlock(dim, heads, rate, quantization) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=_EPS)

    def read(self, block: int, x: Tensor, y: Tensor, meta: int, grid: tuple[int, int]) -> Tensor:
        """Take in what a block of the backbone gave. For backward x and y alone are kept, and the rest is computed
        again, which costs little beside the backbone: at the finest scale a side block keeps 14 times as much as x.

        Args:
            block: which of those that this stage reads.
            x: map of the stage, [batch, height, width, dim].
            y: hidden states, [batch, tokens, hidden_size]; the first `meta` are meta tokens, or the class token, the
                last are the patches of `grid`, height by width, row by row.
        """
        size, area = (x.shape[1], x.shape[2]), grid[0] * grid[1]
        # Resizing and the bridge are both linear, one over positions and one over channels, and commute; done in this
        # order where there are fewer positions after it, else in the other, both cost less and less is kept.
        if size[0] * size[1] < area:
            patches = _resized(y[:, -area:].unflatten(1, grid), size).flatten(1, 2)
            y, grid = torch.cat([y[:, :meta], patches], dim=1), size
        if not torch.is_grad_enabled():
            return self._pass(block, x, y, meta, grid)
        is_random = self.training and self.drops_paths
        again: Any = checkpoint(self._pass, block, x, y, meta, grid, use_reentrant=False, preserve_rng_state=is_random)
        return again

    def _pass(self, block: int, x: Tensor, y: Tensor, meta: int, grid: tuple[int, int]) -> Tensor:
        assert self.bridge is not None
        z = self.bridge(y).to(self.norm.weight.dtype)
        patches = _resized(z[:, -grid[0] * grid[1] :].unflatten(1, grid), (x.shape[1], x.shape[2]))
        return self.blocks[block](x, z[:, :meta], patches)


class HierarchicalNet(nn.Module):
    """Four stages, and what follows the last: an `Exit` into the model's hidden states, or a `Head`."""

    def __init__(self, config: HierarchicalSideConfig, plan: Plan) -> None:
        super().__init__()
        self.ends, quantization = plan.ends, config.quantization
        self.meta_tokens = config.meta_tokens
        rates = torch.linspace(0.0, config.drop_path, self.ends[-1], device="cpu").tolist()
        self.stages, before = nn.ModuleList(), plan.channels
        for dim, heads, (start, end) in zip(config.dims, config.heads, pairwise((0, *self.ends)), strict=True):
            embed = (Merge if self.stages else Stem)(before, dim, quantization)
            self.stages.append(Stage(embed, plan.hidden_size, dim, heads, rates[start:end], quantization))
            before = dim
        self.exit = Exit(config, config.dims[-1], plan.hidden_size) if plan.labels is None else None
        self.head = Head(config, config.dims[-1], plan.labels) if plan.labels is not None else None

    def stage(self, index: int) -> Stage:
        """One of the stages."""
        found = self.stages[index]
        assert isinstance(found, Stage)
        return found


class Through(nn.Module):
    """What is learned through a block: tokens before its own, [1, meta tokens, hidden_size], and copies of norms."""

    def __init__(self, meta_tokens: int, hidden_size: int, norms: Iterable[nn.Module]) -> None:
        super().__init__()
        self.meta = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, meta_tokens, hidden_size)))
        self.norms = nn.ModuleList(copy.deepcopy(norm) for norm in norms)


class Exit(nn.Module):
    """u = W_up LN(m), which joins the class token: [batch, dim] to [batch, hidden_size]"""

    def __init__(self, config: HierarchicalSideConfig, dim: int, hidden_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=_EPS)
        self.up = QuantizedLinear(dim, hidden_size, config.quantization)
        if config.init_weights:
            nn.init.zeros_(self.up.weight)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.up(self.norm(pooled))


class Head(nn.Module):
    """logits = W norm(m) + b: [batch, dim] to [batch, labels]"""

    def __init__(self, config: HierarchicalSideConfig, dim: int, labels: int) -> None:
        super().__init__()
        batch = config.head_norm == "batch"
        self.norm = BatchNorm1d(dim, affine=False, eps=_EPS) if batch else nn.LayerNorm(dim, eps=_EPS)
        self.linear = nn.Linear(dim, labels)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        """Raises ValueError: a batch norm in training has a batch of one, of which there is no variance."""
        if self.training and len(pooled) == 1 and isinstance(self.norm, nn.BatchNorm1d):
            raise ValueError(
                "HierarchicalSideConfig.head_norm='batch' got a batch of size 1 in training; use batches of 2 or "
                "more, with drop_last=True in the loader, or head_norm='layer'."
            )
        return self.linear(self.norm(pooled))


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """A map in another size, bilinearly: [batch, height, width, channels]."""
    if (x.shape[1], x.shape[2]) == size:
        return x
    image = F.interpolate(x.permute(0, 3, 1, 2), size, mode="bilinear", align_corners=False)
    return image.permute(0, 2, 3, 1)
