"""Emergent mixture of experts: routing inside dense feed-forwards (Qiu, Huang & Fu 2024, arXiv 2310.10908)."""

from petune.adapters.emoe.config import EmoeConfig
from petune.adapters.emoe.layer import EmoeLayer
from petune.adapters.emoe.model import EmoeModel
from petune.adapters.emoe.router import Router
from petune.registry import register_method

register_method("emoe", config_cls=EmoeConfig, model_cls=EmoeModel)

__all__ = ["EmoeConfig", "EmoeLayer", "EmoeModel", "Router"]
