"""The parts of a ladder: what enters it, the rungs that read the backbone, and what leaves it."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from petune.adapters.side.config import LadderSideConfig
from petune.quantized.linear import QuantizedLinear
from petune.quantized.quantizer import Quantization

_HEAD = 16  # least size of a generic block's heads, where the width allows it


class Context(Protocol):
    """What a side block gets beside its input, from the call of the block that it reads; see `flow.Step`."""

    def self_mask(self, queries: int, keys: int) -> tuple[Tensor | None, bool]:
        """(mask as scaled_dot_product_attention takes it, is_causal) of attention within the sequence."""
        ...

    def cached(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the whole sequence, [batch, heads, tokens, head], of those of this call."""
        ...

    @property
    def memory(self) -> Tensor | None:
        """What the side network of the encoder gave, [batch, encoder tokens, width]; None without an encoder."""
        ...

    @property
    def memory_mask(self) -> Tensor | None:
        """Mask of attention to `memory`."""
        ...


class Attention(nn.Module):
    """Multi-head attention, of a sequence to itself or to the encoder's side network."""

    def __init__(self, width: int, heads: int, quantization: Quantization) -> None:
        super().__init__()
        self.heads = heads
        self.query = QuantizedLinear(width, width, quantization)
        self.key_value = QuantizedLinear(width, 2 * width, quantization)
        self.out = QuantizedLinear(width, width, quantization)

    def forward(self, x: Tensor, context: Context, memory: Tensor | None = None) -> Tensor:
        """Args: x, [batch, tokens, width]; memory, [batch, encoder tokens, width], to attend to instead of x."""
        query = self._split(self.query(x))
        keys, values = (self._split(part) for part in self.key_value(x if memory is None else memory).chunk(2, dim=-1))
        if memory is None:
            keys, values = context.cached(keys, values)
            mask, is_causal = context.self_mask(query.shape[2], keys.shape[2])
        else:
            mask, is_causal = context.memory_mask, False
        if mask is not None and mask.is_floating_point():
            mask = mask.to(query.dtype)
        y = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, is_causal=is_causal)
        return self.out(y.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class SideBlock(nn.Module):
    """A pre-norm transformer block; it has no positions of its own, since what it reads carries them."""

    def __init__(self, config: LadderSideConfig, width: int, heads: int, *, reads_memory: bool) -> None:
        super().__init__()
        quantization, inner = config.quantization, config.ffn_ratio * width
        self.dropout_p = config.dropout
        self.attention_norm, self.attention = nn.LayerNorm(width), Attention(width, heads, quantization)
        if reads_memory:
            self.memory_norm, self.memory_attention = nn.LayerNorm(width), Attention(width, heads, quantization)
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn_in = QuantizedLinear(width, inner, quantization)
        self.ffn_out = QuantizedLinear(inner, width, quantization)

    def forward(self, s: Tensor, context: Context) -> Tensor:
        """Args: s, [batch, tokens, width]."""
        s = s + self._drop(self.attention(self.attention_norm(s), context))
        if "memory_norm" in self._modules:
            s = s + self._drop(self.memory_attention(self.memory_norm(s), context, context.memory))
        # ReLU, whose backward needs its output alone, which the product after it keeps anyway
        return s + self._drop(self.ffn_out(F.relu(self.ffn_in(self.ffn_norm(s)))))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout_p, self.training)


class Entry(nn.Module):
    """s₀ = W₀ dropout(h₀), h₀ what the embeddings give: [batch, tokens, hidden] to [batch, tokens, width]"""

    def __init__(self, config: LadderSideConfig, hidden_size: int, width: int) -> None:
        super().__init__()
        self.dropout_p = config.dropout
        self.down = QuantizedLinear(hidden_size, width, config.quantization)

    def forward(self, h: Tensor) -> Tensor:
        return self.down(F.dropout(_in_rows(h), self.dropout_p, self.training))


class Rung(nn.Module):
    """s ← SideBlock(g s + (1 − g) Wᵢ hᵢ), g = σ(α / T)    (Sung et al. 2022, section 3.2)"""

    def __init__(self, config: LadderSideConfig, hidden_size: int, width: int, block: nn.Module) -> None:
        super().__init__()
        self.temperature = config.gate_temperature
        self.down = QuantizedLinear(hidden_size, width, config.quantization)
        self.alpha = nn.Parameter(torch.zeros(1))
        self.block = block

    def forward(self, s: Tensor, h: Tensor, context: Any) -> Tensor:
        """Args: s, [batch, tokens, width]; h, what the frozen block gave, [batch, tokens, hidden]."""
        # the product runs in the dtype of h, which is kept for backward once and as it is
        new, gate = self.down(_in_rows(h)), torch.sigmoid(self.alpha / self.temperature)
        if not torch.is_autocast_enabled(h.device.type):
            s, new = s.to(gate.dtype), new.to(gate.dtype)
        return self.block(torch.lerp(new, s.to(new.dtype), gate.to(new.dtype)), context)


class Exit(nn.Module):
    """What leaves the ladder: norm(s), and of the last stack h + W_up norm(s) or as `fusion` says."""

    def __init__(self, config: LadderSideConfig, hidden_size: int, width: int, *, fuses: bool) -> None:
        super().__init__()
        self.fusion, self.temperature = config.fusion, config.gate_temperature
        self.norm = nn.LayerNorm(width)
        if fuses:
            self.up = QuantizedLinear(width, hidden_size, config.quantization)
            if config.init_weights and config.fusion == "residual":
                nn.init.zeros_(self.up.weight)
        if fuses and config.fusion == "merge_last":
            self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, s: Tensor, h: Tensor) -> Tensor:
        """Args: s, [batch, tokens, width]; h, the last block's hidden states, [batch, tokens, hidden]."""
        up = self.up(self.norm(s)).to(h.dtype)
        if self.fusion == "residual":
            return h + up
        if self.fusion == "replace":
            return up
        return torch.lerp(h, up, torch.sigmoid(self.alpha / self.temperature).to(h.dtype))


def _in_rows(h: Tensor) -> Tensor:
    # Whisper's hidden states are transposed views, whose products round differently with and without a gradient
    return h.contiguous()


def default_heads(config: LadderSideConfig, width: int) -> int:
    """Attention heads of a generic block.

    Raises:
        ValueError: num_heads does not divide the width.
    """
    if config.num_heads is None:
        return next(heads for heads in range(max(1, width // _HEAD), 0, -1) if width % heads == 0)
    if width % config.num_heads:
        usable = ", ".join(str(heads) for heads in range(1, width + 1) if width % heads == 0)
        config.refuse("num_heads", f"does not divide the side network's width {width}; use {usable}")
    return config.num_heads
