"""Pruning-aware tuning of the residual width (Liu et al. 2025, arXiv 2408.14721)."""

from petune.adapters.pat.config import PatConfig
from petune.adapters.pat.layer import PatLinear, PatNorm
from petune.adapters.pat.mask import ChannelMask
from petune.adapters.pat.model import PatModel
from petune.adapters.pat.trainer import PruningTrainerCallback
from petune.registry import register_method

register_method("pat", config_cls=PatConfig, model_cls=PatModel)

__all__ = ["ChannelMask", "PatConfig", "PatLinear", "PatModel", "PatNorm", "PruningTrainerCallback"]
