"""The LoRA linear layer as one operator."""

from petune.kernels.lora_linear.op import lora_linear

__all__ = ["lora_linear"]
