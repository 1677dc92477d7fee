"""LoRA by one fused operator per layer; saves and loads as PEFT's own LoRA."""

from petune.adapters.lora.config import FusedLoraConfig
from petune.adapters.lora.fuse import FuseReport, fuse, unfuse
from petune.adapters.lora.layer import FusedLoraLinear
from petune.registry import register_method

register_method("lora", config_cls=FusedLoraConfig)

__all__ = ["FuseReport", "FusedLoraConfig", "FusedLoraLinear", "fuse", "unfuse"]
