"""The LoRA linear layer with factors of a few bits an element, for inference; and the unpacking of one factor."""

from petune.kernels.packed_lora.op import packed_lora
from petune.kernels.packed_lora.reference import unpacked

__all__ = ["packed_lora", "unpacked"]
