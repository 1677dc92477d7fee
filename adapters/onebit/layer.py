"""`BiLoraLayer`: a linear layer with a low-rank update of quantised factors."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from petune.adapters.onebit.config import BiLoraConfig
from petune.kernels.packed_lora import packed_lora
from petune.low_rank import Factors, LowRankLayer, tensor
from petune.quantized.linear import PackedLinear, QuantizedLinear


class BiLoraLayer(LowRankLayer):
    """y = x Wᵀ + bias + Σ scale · dropout(x Âᵀ) B̂ᵀ

    Of a fused query-key-value layer only the `parts` take the update: B̂ has their rows, and the other rows of B are
    zero.
    """

    adapter_layer_names = ("petune_bilora_a", "petune_bilora_b")
    other_param_names = ("scale", "dropout_p", "dropout_position", "parts")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.petune_bilora_a = nn.ModuleDict()
        self.petune_bilora_b = nn.ModuleDict()
        self.scale: dict[str, float] = {}
        self.dropout_p: dict[str, float] = {}
        self.dropout_position: dict[str, str] = {}
        self.parts: dict[str, tuple[tuple[int, int], ...]] = {}
        self.fused_parts: tuple[tuple[int, int], ...] = ()
        """Rows [start, stop) of queries and of values, where the base layer is a fused one; set by the tuner."""

    def create(self, name: str, config: BiLoraConfig) -> None:
        parts = self.fused_parts if config.fused_parts == "qv" else ()
        a = QuantizedLinear(self.in_features, config.r, config.quantization)
        b = QuantizedLinear(
            config.r, sum(stop - start for start, stop in parts) or self.out_features, config.quantization
        )
        nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
        config.start(b.weight)
        self.petune_bilora_a[name], self.petune_bilora_b[name] = a, b
        self.scale[name], self.parts[name] = config.scale, parts
        self.dropout_p[name], self.dropout_position[name] = config.dropout, config.dropout_position

    def factors(self, name: str) -> Factors:
        a, b = self.petune_bilora_a[name], self.petune_bilora_b[name]
        dropout_p = self.dropout_p[name] if self.training else 0.0
        early = dropout_p if self.dropout_position[name] == "input" else 0.0
        whole = with_zero_rows(b.quantized(), self.parts[name], self.out_features)  # pyright: ignore[reportCallIssue]
        return Factors(a.quantized(), whole, self.scale[name], early, dropout_p - early)  # pyright: ignore[reportCallIssue]

    def _fused(self, name: str, x: Tensor) -> Tensor:
        a, b = self.petune_bilora_a[name], self.petune_bilora_b[name]
        if not (isinstance(a, PackedLinear) and isinstance(b, PackedLinear)) or self.parts[name]:
            return super()._fused(name, x)
        weight, bias = tensor(self.base_layer, "weight"), tensor(self.base_layer, "bias")
        weight = weight.T if self.transposed else weight
        packed = (a.bits, a.levels(), b.bits, b.levels(), a.out_features, a.quantization.bits)
        return packed_lora(x, weight, bias, *packed, self.scale[name])


def with_zero_rows(b: Tensor, parts: Sequence[tuple[int, int]], out_features: int) -> Tensor:
    """B with its rows at the parts [start, stop) of the output, and zeros elsewhere: [out_features, rank]."""
    if not parts:
        return b
    pieces: list[Tensor] = []
    end = 0
    for (start, stop), rows in zip(parts, b.split([stop - start for start, stop in parts]), strict=True):
        pieces += [b.new_zeros(start - end, b.shape[1]), rows]
        end = stop
    return torch.cat([*pieces, b.new_zeros(out_features - end, b.shape[1])])
