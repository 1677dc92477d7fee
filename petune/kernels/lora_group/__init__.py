"""Several LoRA linear layers of one input as one operator: q/k/v, gate/up."""

from petune.kernels.lora_group.op import lora_group

__all__ = ["lora_group"]
