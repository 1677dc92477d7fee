"""A method that can do the least: not linear, looks at the whole batch, needs the float weight. It tests refusals."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from petune.config import PetuneConfig
from petune.layer import PetuneLayer
from petune.registry import register_method
from petune.tuner import PetuneTuner


@dataclass
class ReluDeltaConfig(PetuneConfig):
    """y = Wx + b + U relu(Dx), U zero at the start."""

    method: ClassVar[str] = "reludelta"

    width: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("width")


class ReluDeltaLayer(PetuneLayer):
    adapter_layer_names = ("petune_reludelta_d", "petune_reludelta_u")
    supports_mixed_batch = False

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.petune_reludelta_d = nn.ModuleDict()
        self.petune_reludelta_u = nn.ModuleDict()

    def create(self, name: str, config: ReluDeltaConfig) -> None:
        self.petune_reludelta_d[name] = nn.Linear(self.in_features, config.width, bias=False)
        self.petune_reludelta_u[name] = nn.Linear(config.width, self.out_features, bias=False)
        if config.init_weights:
            nn.init.zeros_(self.petune_reludelta_u[name].weight)

    def delta(self, name: str, x: Tensor) -> Tensor:
        return self.petune_reludelta_u[name](F.relu(self.petune_reludelta_d[name](x)))


class ReluDeltaModel(PetuneTuner):
    prefix = "petune_reludelta_"
    tuner_layer_cls = ReluDeltaLayer
    needs_float_base = True
    supported_modules = (nn.Linear,)


register_method("reludelta", config_cls=ReluDeltaConfig, model_cls=ReluDeltaModel)
