"""The smallest method that a third party could write: ΔW itself is trained. The contract is tested on it."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petune.config import PetuneConfig
from petune.layer import PetuneLayer
from petune.registry import register_method
from petune.tuner import PetuneTuner


@dataclass
class DenseDeltaConfig(PetuneConfig):
    """y = Wx + b + scale · Dx, D of the shape of W and zero at the start."""

    method: ClassVar[str] = "densedelta"

    scale: float = 1.0
    delta_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_interval(0.0, 1.0, "delta_dropout")


class DenseDeltaLayer(PetuneLayer):
    adapter_layer_names = ("petune_densedelta_d",)
    other_param_names = ("scale", "delta_dropout")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.petune_densedelta_d = nn.ParameterDict()
        self.scale: dict[str, float] = {}
        self.delta_dropout = nn.ModuleDict()

    def create(self, name: str, config: DenseDeltaConfig) -> None:
        d = torch.zeros(self.out_features, self.in_features)
        if not config.init_weights:
            d = torch.randn_like(d)
        self.petune_densedelta_d[name] = nn.Parameter(d)
        self.scale[name] = config.scale
        self.delta_dropout[name] = nn.Dropout(config.delta_dropout)

    def delta(self, name: str, x: Tensor) -> Tensor:
        return F.linear(self.delta_dropout[name](x), self.petune_densedelta_d[name]) * self.scale[name]

    def get_delta_weight(self, name: str) -> Tensor:
        return self.petune_densedelta_d[name].detach() * self.scale[name]


class DenseDeltaModel(PetuneTuner):
    prefix = "petune_densedelta_"
    tuner_layer_cls = DenseDeltaLayer
    linear_in_parameters = True


register_method("densedelta", config_cls=DenseDeltaConfig, model_cls=DenseDeltaModel)
