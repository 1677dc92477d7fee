"""One base layer with another LoRA adapter for every row of a batch, in training and packed for inference."""

from petune.kernels.grouped_lora.groups import RowGroups
from petune.kernels.grouped_lora.joined import JoinedFactors, grouped_joined_lora
from petune.kernels.grouped_lora.op import grouped_lora, grouped_lora_projections
from petune.kernels.grouped_lora.packed import PackedFactors, grouped_packed_lora

__all__ = [
    "JoinedFactors",
    "PackedFactors",
    "RowGroups",
    "grouped_joined_lora",
    "grouped_lora",
    "grouped_lora_projections",
    "grouped_packed_lora",
]
