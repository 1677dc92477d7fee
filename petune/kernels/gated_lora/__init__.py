"""The gate of an MLP, and the LoRA linear layer that follows it, as operators that keep the gate's two inputs only."""

from petune.kernels.gated_lora.op import gated, gated_lora

__all__ = ["gated", "gated_lora"]
