"""`SideTuner`: what tuners of side networks share."""

import re
from abc import abstractmethod
from typing import Any

from peft import PeftConfig
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from petune.config import PetuneConfig
from petune.frozen_block import Backbone, FrozenBlock
from petune.layer import AdapterLayer
from petune.quantized.tuner import PackedTuner
from petune.topology import Topology, find_topology


class SideTuner(PackedTuner):
    """Wraps the blocks of a model; one adapter is active at a time, and the trunk stays in eval mode."""

    default_roles = ("blocks",)
    supported_modules = (nn.Module,)
    uses_shared_state = True

    backbone: Backbone
    topology: Topology
    """Of the model; set before an adapter is added."""

    @property
    @abstractmethod
    def read_blocks(self) -> frozenset[int]:
        """Indices of the blocks whose output the active adapter reads, or gives on: what a feature cache keeps."""

    @property
    def why_not_cached(self) -> str | None:
        """Why a feature cache cannot stand in for the blocks; None where it can."""
        return None

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        super()._pre_injection_hook(model, config, adapter_name)
        if "backbone" not in self.__dict__:
            self.backbone = Backbone()

    def check_targets(self, config: PetuneConfig, model: nn.Module, targets: list[tuple[str, nn.Module]]) -> None:
        """Also refuses targets that are not all of the blocks."""
        super().check_targets(config, model, targets)
        self.topology = find_topology(model)
        if {name for name, _ in targets} != set(self.topology.blocks):
            config.refuse("target_modules", "is not for a side network, which stands beside all blocks; leave it out")

    def prepare_layer(self, layer: AdapterLayer, name: str, adapter_name: str, config: PetuneConfig) -> None:
        """Tells a block its name and number."""
        super().prepare_layer(layer, name, adapter_name, config)
        if isinstance(layer, FrozenBlock):
            layer.backbone, layer.index, layer.path = self.backbone, self.topology.blocks.index(name), name

    def _post_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        super()._post_injection_hook(model, config, adapter_name)
        self.train(self.training)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate an adapter.

        Raises:
            ValueError: several, and the model's last hidden states take one side network.
        """
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            raise ValueError(
                f"{adapter_name} cannot be active together: exactly one active adapter is possible beside a model."
            )
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """PEFT looks for the name in the last two parts of a key; here whole networks stand below it."""
        return re.sub(rf"(\.{cls.prefix}\w+)\.{re.escape(adapter_name)}\.", r"\1.", key, count=1)

    def train(self, mode: bool = True) -> Any:
        """Training for the side network and what stands behind the blocks; the frozen trunk stays in eval mode."""
        super().train(mode)
        trunk = getattr(self.model, "base_model", self.model)
        for module in self.model.children() if trunk is self.model else [trunk]:
            _freeze_mode(module)
        return self


def _freeze_mode(module: nn.Module) -> None:
    """Eval mode for a trunk, without what adapters and modules_to_save have in it."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        return
    if isinstance(module, FrozenBlock):
        module.base_layer.eval()
        return
    module.training = False
    for child in module.children():
        _freeze_mode(child)
