"""Side networks: ladder side-tuning (Sung et al. 2022, arXiv 2206.06522), and hierarchical (Lin et al. 2023,
arXiv 2310.05393)."""

from petune.adapters.side.config import LadderSideConfig
from petune.adapters.side.hierarchical_config import HierarchicalSideConfig
from petune.adapters.side.hierarchical_layer import HierarchicalBlock
from petune.adapters.side.hierarchical_model import HierarchicalModel
from petune.adapters.side.layer import LadderBlock
from petune.adapters.side.model import LadderModel
from petune.adapters.side.start import fisher_start
from petune.registry import register_method

register_method("ladder", config_cls=LadderSideConfig, model_cls=LadderModel)
register_method("hside", config_cls=HierarchicalSideConfig, model_cls=HierarchicalModel)

__all__ = [
    "HierarchicalBlock",
    "HierarchicalModel",
    "HierarchicalSideConfig",
    "LadderBlock",
    "LadderModel",
    "LadderSideConfig",
    "fisher_start",
]
