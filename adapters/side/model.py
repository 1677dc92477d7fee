"""`LadderModel`: puts a ladder beside the blocks of a model."""

import re
from collections.abc import Iterator
from typing import Any

from peft import PeftConfig
from torch import nn

from petune.adapters.side.config import LadderSideConfig
from petune.adapters.side.flow import Flow, Place
from petune.adapters.side.layer import LadderBlock
from petune.adapters.side.rung import default_heads
from petune.adapters.side.start import check_mirror
from petune.adapters.side.tuner import SideTuner
from petune.config import PetuneConfig
from petune.hooks import remove_hooks
from petune.layer import AdapterLayer
from petune.topology import Topology


class LadderModel(SideTuner):
    """A side network beside all blocks of a model."""

    prefix = "petune_ladder_"
    tuner_layer_cls = LadderBlock

    flow: Flow

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        super()._pre_injection_hook(model, config, adapter_name)
        if "flow" not in self.__dict__:
            self.flow = Flow()

    @property
    def why_not_cached(self) -> str | None:
        """Says so of slim T5 blocks: the position bias that they share with the model's is no hidden state."""
        config = self.peft_config[self.active_adapters[0]]
        if getattr(config, "block", None) == "mirror" and getattr(self.model.config, "model_type", None) == "t5":
            return "its side blocks take the position bias of the frozen ones, which is not kept; use block='generic'."
        return None

    # --- before anything changes ---

    def check_targets(self, config: PetuneConfig, model: nn.Module, targets: list[tuple[str, nn.Module]]) -> None:
        """Also refuses a ladder that does not fit the model's width, blocks or stacks."""
        super().check_targets(config, model, targets)
        assert isinstance(config, LadderSideConfig)
        self._places = dict(find_places(model, self.topology, config))
        self._width = config.side_width(self.topology.hidden_size)
        if config.block == "generic":
            default_heads(config, self._width)
            return
        for name, place in self._places.items():
            if place.rung == 0:  # one of each stack
                check_mirror(config, model.get_submodule(name))

    # --- injection ---

    def prepare_layer(self, layer: AdapterLayer, name: str, adapter_name: str, config: PetuneConfig) -> None:
        """Tells the block where it stands."""
        assert isinstance(layer, LadderBlock)
        assert isinstance(config, LadderSideConfig)
        super().prepare_layer(layer, name, adapter_name, config)
        layer.flow = self.flow
        layer.place, layer.side_width = self._places[name], self._width

    def _post_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        super()._post_injection_hook(model, config, adapter_name)
        if not any(isinstance(hook, FlowHook) for hook in model._forward_hooks.values()):
            model.register_forward_pre_hook(FlowHook(self.flow, "begin"))
            model.register_forward_hook(FlowHook(self.flow, "finished"))
            encoder = _encoder(model) if any(place.chain for place in self._places.values()) else None
            if encoder is not None:
                encoder.register_forward_hook(FlowHook(self.flow, "encoded"))

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate an adapter, to which nothing that the last one left is handed on."""
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        if "flow" in self.__dict__:
            self.flow.reset()

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        unloaded = super()._unload_and_optionally_merge(*args, **kwargs)
        remove_hooks(self.model, lambda hook: isinstance(hook, FlowHook))
        return unloaded

    @property
    def read_blocks(self) -> frozenset[int]:
        """Indices of the blocks whose output the active adapter reads, or gives on."""
        name = self.active_adapters[0]
        layers = [module for module in self.model.modules() if isinstance(module, LadderBlock)]
        return frozenset(
            layer.index for layer in layers if layer.names[name].rung is not None or layer.names[name].is_last
        )


class FlowHook:
    """Hook that tells the flow that the model begins, or that its encoder, or itself, has come to its end."""

    def __init__(self, flow: Flow, what: str) -> None:
        self.flow, self.what = flow, what

    def __call__(self, _: nn.Module, __: Any, output: Any = None) -> None:
        if self.what == "begin":
            self.flow.begin()
        elif self.what == "finished":
            self.flow.check_finished()
        else:
            self.flow.encoded(output[0])


def find_places(model: nn.Module, topology: Topology, config: LadderSideConfig) -> Iterator[tuple[str, Place]]:
    """Every block's name and place.

    Raises:
        ValueError: side_layers does not fit, or the stacks of the model do not follow one another.
    """
    chains: dict[str, list[str]] = {}
    for block in topology.layout:
        chains.setdefault(re.sub(r"\d+", "N", block.stack), []).append(block.name)  # Swin's stages are one chain
    seq2seq = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False)) and len(chains) == 2
    if len(chains) > 1 and not seq2seq:
        raise ValueError(
            f"{type(config).__name__}: {type(model).__name__} has the stacks {', '.join(chains)}, which do not follow "
            "one another; adapt one of its towers."
        )
    for number, names in enumerate(chains.values()):
        rungs = config.rungs(len(names))
        for position, name in enumerate(names):
            yield (
                name,
                Place(
                    chain=number,
                    position=position,
                    blocks=len(names),
                    rung=rungs.index(position) if position in rungs else None,
                    is_causal=_is_causal(model.get_submodule(name)),
                    reads_memory=seq2seq and number == 1,
                    fuses=number == len(chains) - 1,
                ),
            )


def _is_causal(block: nn.Module) -> bool:
    return next((bool(m.is_causal) for m in block.modules() if hasattr(m, "is_causal")), False)


def _encoder(model: nn.Module) -> nn.Module | None:
    find: Any = getattr(model, "get_encoder", None)
    encoder = None if find is None else find()
    return encoder if isinstance(encoder, nn.Module) else None
