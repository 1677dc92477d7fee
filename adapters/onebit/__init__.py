"""1-bit adapters: LoRA and AdaptFormer with weights of a few bits (Jie et al. 2023, arXiv 2307.16867)."""

from petune.adapters.onebit.bottleneck import BiAdapterLayer, BiAdapterModel
from petune.adapters.onebit.config import BiAdapterConfig, BiLoraConfig
from petune.adapters.onebit.layer import BiLoraLayer
from petune.adapters.onebit.model import BiLoraModel
from petune.registry import register_method

register_method("bilora", config_cls=BiLoraConfig, model_cls=BiLoraModel)
register_method("biadapter", config_cls=BiAdapterConfig, model_cls=BiAdapterModel)

__all__ = ["BiAdapterConfig", "BiAdapterLayer", "BiAdapterModel", "BiLoraConfig", "BiLoraLayer", "BiLoraModel"]
