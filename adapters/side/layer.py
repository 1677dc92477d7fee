"""`LadderBlock`: a frozen block, and the rung of the side network that reads it."""

from typing import Any

from torch import Tensor, nn

from petune.adapters.side.config import LadderSideConfig
from petune.adapters.side.flow import Flow, Place, Step
from petune.adapters.side.rung import Entry, Exit, Rung, SideBlock, default_heads
from petune.adapters.side.start import make_mirror
from petune.frozen_block import Call, FrozenBlock


class LadderBlock(FrozenBlock):
    """A frozen block with its part of every adapter's ladder: the entry on the first, the exit on the last."""

    adapter_layer_names = ("petune_ladder_entry", "petune_ladder_rung", "petune_ladder_exit")
    other_param_names = ("names",)
    flow: Flow
    """Set by the tuner; shared by all blocks."""
    place: Place
    """Of the adapter that is added next; set by the tuner."""
    side_width: int
    """Of that adapter."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.petune_ladder_entry = nn.ModuleDict()
        self.petune_ladder_rung = nn.ModuleDict()
        self.petune_ladder_exit = nn.ModuleDict()
        self.names: dict[str, Place] = {}

    def create(self, name: str, config: LadderSideConfig) -> None:
        place, width, hidden_size = self.place, self.side_width, self.hidden_size
        self.names[name] = place
        if place.is_first:
            self.petune_ladder_entry[name] = Entry(config, hidden_size, width)
        if place.rung is not None:
            self.petune_ladder_rung[name] = Rung(config, hidden_size, width, self._block(config, width))
        if place.is_last:
            self.petune_ladder_exit[name] = Exit(config, hidden_size, width, fuses=place.fuses)

    def _block(self, config: LadderSideConfig, width: int) -> nn.Module:
        if config.block == "mirror":
            return make_mirror(config, self.get_base_layer(), self.place)
        return SideBlock(config, width, default_heads(config, width), reads_memory=self.place.reads_memory)

    def follow(self, name: str, call: Call, y: Tensor) -> Tensor:
        place, flow = self.names[name], self.flow
        if place.is_first:
            flow.start(place, self.petune_ladder_entry[name](call.x))
        else:
            flow.passed(place)
        s: Any = flow.s
        if name in self.petune_ladder_rung:
            s = flow.s = self.petune_ladder_rung[name](flow.fit(s, call), y, Step(place, call, flow))
        if not place.is_last:
            return y
        flow.leave(place)
        end: Any = self.petune_ladder_exit[name]
        if place.fuses:
            return end(s, y)
        flow.remember(end.norm(s))
        return y

    def get_delta_weight(self, name: str) -> Tensor:
        """Raises NotImplementedError: the update is no weight."""
        raise NotImplementedError(
            f"adapter {name!r} is a side network, a path of its own that depends on the input, and no weight: it "
            "cannot be merged; use unload() for the base model, or keep the adapter."
        )

    def _get_available_adapters(self) -> set[str]:
        return set(self.names)
