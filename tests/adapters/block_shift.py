"""The smallest method on whole blocks: a trained linear map of what goes in and of what comes out is added."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petune.block_layer import PetuneBlock
from petune.config import PetuneConfig
from petune.registry import register_method
from petune.tuner import PetuneTuner


@dataclass
class BlockShiftConfig(PetuneConfig):
    """y = block(x) + Dx + E block(x), D and E zero at the start."""

    method: ClassVar[str] = "blockshift"

    shift_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_interval(0.0, 1.0, "shift_dropout")


class BlockShiftLayer(PetuneBlock):
    adapter_layer_names = ("petune_blockshift_d", "petune_blockshift_e")
    other_param_names = ("shift_dropout",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.petune_blockshift_d = nn.ParameterDict()
        self.petune_blockshift_e = nn.ParameterDict()
        self.shift_dropout = nn.ModuleDict()

    def create(self, name: str, config: BlockShiftConfig) -> None:
        size = (self.hidden_size, self.hidden_size)
        for container in (self.petune_blockshift_d, self.petune_blockshift_e):
            container[name] = nn.Parameter(torch.zeros(size) if config.init_weights else torch.randn(size))
        self.shift_dropout[name] = nn.Dropout(config.shift_dropout)

    def delta(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        x = self.shift_dropout[name](x)
        return F.linear(x, self.petune_blockshift_d[name]) + F.linear(y, self.petune_blockshift_e[name])


class BlockShiftModel(PetuneTuner):
    prefix = "petune_blockshift_"
    tuner_layer_cls = BlockShiftLayer
    supported_modules = (nn.Module,)
    default_roles = ("blocks",)


register_method("blockshift", config_cls=BlockShiftConfig, model_cls=BlockShiftModel)
