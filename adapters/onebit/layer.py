"""`BiLoraLayer`: a linear layer with a low-rank update of quantised factors."""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from petune.adapters.onebit.config import BiLoraConfig
from petune.kernels.grouped_lora import PackedFactors, grouped_packed_lora
from petune.kernels.packed_lora import packed_lora
from petune.low_rank import Factors, LowRankLayer, Operands
from petune.mixed_batch import Call, Mixed, mixed, row_groups
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

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        if adapter_names is not None and not args and not kwargs:
            y = self._mixed(x, adapter_names)
            if y is not None:
                return y
        return super().forward(x, *args, adapter_names=adapter_names, **kwargs)

    def _mixed(self, x: Tensor, names: Sequence[str]) -> Tensor | None:
        """The output for rows that take these adapters, or None where each of them must compute its own."""
        if self.disable_adapters or self.merged or len(names) != len(x) or not self._is_covered(x):
            return None
        found = mixed(self, names, lambda: self._make_mixed(tuple(names)))
        return None if found is None else found(x)

    def _make_mixed(self, names: tuple[str, ...]) -> Call | None:
        present, groups = row_groups(names, frozenset(self.petune_bilora_a))
        if groups is None:
            return None
        packed = [self._packed(name) for name in present]
        if all(packed):
            base, factors = self._base(), cast("list[PackedFactors]", packed)
            return lambda x: grouped_packed_lora(x, *base, factors, groups)
        base = self._base()
        return Mixed([Operands(*base, *self.factors(name)) for name in present], groups)

    def operands(self, x: Tensor) -> Operands | None:
        """What the fused operator needs for this call; None where it does not cover it.

        Everything is looked at in every call.
        """
        live = self.live_adapters()
        if len(live) != 1 or not self._is_covered(x):
            return None
        return Operands(*self._base(), *self.factors(live[0]))

    def _fused(self, name: str, x: Tensor) -> Tensor:
        packed = self._packed(name)
        return super()._fused(name, x) if packed is None else packed_lora(x, *self._base(), *packed)

    def _packed(self, name: str) -> PackedFactors | None:
        """The codes of an adapter that has no latents, None for one that has, or that leaves rows of B out."""
        a, b = self.petune_bilora_a[name], self.petune_bilora_b[name]
        if not (isinstance(a, PackedLinear) and isinstance(b, PackedLinear)) or self.parts[name]:
            return None
        bits = a.quantization.bits
        return PackedFactors(a.bits, a.levels(), b.bits, b.levels(), a.out_features, bits, self.scale[name])


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
