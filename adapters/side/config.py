"""Configs of the side networks: `LadderSideConfig`."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from petune.quantized.tuner import QuantizedConfig


@dataclass
class LadderSideConfig(QuantizedConfig):
    """Ladder side-tuning (Sung et al. 2022, arXiv 2206.06522): a narrow transformer beside the frozen one.

    It reads what the blocks give and is all that is trained, so nothing is propagated back through the backbone, whose
    activations are not kept. Its output joins the last block's hidden states, before the model's own norm and head.

    Raises:
        ValueError: a field is out of range.
    """

    method: ClassVar[str] = "ladder"

    bits: int = field(default=32, metadata={"help": "Bits a weight of the side network: 1, 2, 4, 8, or 32 for float."})
    reduction_factor: int = field(
        default=8, metadata={"help": "The side network is this many times narrower; divides the hidden size."}
    )
    side_layers: list[int] | None = field(
        default=None,
        metadata={"help": "Indices of the blocks that are read; None for all but every fourth, starting with 0."},
    )
    block: Literal["generic", "mirror"] = field(
        default="generic",
        metadata={"help": "Side blocks of PETune's own make, or slim ones of the model's own layer class."},
    )
    fusion: Literal["residual", "replace", "merge_last"] = field(
        default="residual",
        metadata={
            "help": "Add to the last hidden states, starting from zero; or the paper's: stand in for them, or mix."
        },
    )
    start: Literal["random", "l1", "fisher"] = field(
        default="random",
        metadata={
            "help": "Side blocks of block='mirror' from random weights, or cut out of the model's by importance."
        },
    )
    gate_temperature: float = field(
        default=0.1, metadata={"help": "Of the gates between rungs: smaller ones move faster."}
    )
    num_heads: int | None = field(
        default=None, metadata={"help": "Attention heads of a generic side block; None for heads of 16 or more."}
    )
    ffn_ratio: int = field(
        default=4, metadata={"help": "Inner size of a generic side block's feed-forward, in widths."}
    )
    dropout: float = field(
        default=0.0, metadata={"help": "Dropout of what enters the side network, and of its blocks."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("reduction_factor", "ffn_ratio")
        self.check_choice("block", ("generic", "mirror"))
        self.check_choice("fusion", ("residual", "replace", "merge_last"))
        self.check_choice("start", ("random", "l1", "fisher"))
        self.check_interval(0.0, float("inf"), "gate_temperature")
        if self.gate_temperature == 0.0:
            self.refuse("gate_temperature", "must be above 0: the gates would be hard, and not train")
        self.check_interval(0.0, 1.0, "dropout")
        if self.num_heads is not None:
            self.check_positive("num_heads")
        if self.side_layers is not None:
            if not isinstance(self.side_layers, list) or not all(type(index) is int for index in self.side_layers):
                self.refuse("side_layers", "must be a list of the blocks' numbers")
            if not self.side_layers:
                self.refuse("side_layers", "names at least one block; leave it out for the default")
            self.side_layers = sorted(set(self.side_layers))
        if self.start != "random" and self.block != "mirror":
            self.refuse("start", "cuts side blocks out of the model's own; set block='mirror'")
        for name in ("exclude_modules", "layers_to_transform", "layers_pattern"):
            if getattr(self, name) is not None:
                self.refuse(name, "does not apply: the network runs beside all blocks; use side_layers")

    def side_width(self, hidden_size: int) -> int:
        """Width of the side network beside a model of this one.

        Raises:
            ValueError: reduction_factor does not divide it.
        """
        if self.reduction_factor > hidden_size or hidden_size % self.reduction_factor:
            usable = [n for n in range(2, hidden_size // 4 + 1) if hidden_size % n == 0]
            near = sorted(usable, key=lambda n: abs(n - self.reduction_factor))[:6]
            self.refuse(
                "reduction_factor",
                f"does not divide hidden_size={hidden_size}; use {', '.join(map(str, sorted(near)))}",
            )
        return hidden_size // self.reduction_factor

    def rungs(self, blocks: int) -> tuple[int, ...]:
        """Which of a stack's blocks the side network reads.

        Raises:
            ValueError: side_layers names a block that the stack does not have, or none of those it has.
        """
        if self.side_layers is None:
            return tuple(i for i in range(blocks) if i % 4) or (blocks - 1,)
        outside = [index for index in self.side_layers if not 0 <= index < blocks]
        if outside:
            self.refuse("side_layers", f"names block {outside[0]}, out of range 0..{blocks - 1}")
        return tuple(self.side_layers)
