"""`HierarchicalSideConfig`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from petune.quantized.tuner import QuantizedConfig

STAGES = 4


@dataclass
class HierarchicalSideConfig(QuantizedConfig):
    """Hierarchical side-tuning of a ViT (Lin et al. 2023, arXiv 2310.05393): a pyramid of four scales beside it.

    The pyramid starts from the pixels, takes in what every block gives, and is all that is trained. With `detach`,
    ours, nothing is propagated back through the backbone; without, as in the paper, it learns tokens that go through
    every block, and copies of its norms, and saves no memory. Its maps feed dense heads
    (`HierarchicalModel.features`); `fusion` says how it joins the model's own output.

    Raises:
        ValueError: a field is out of range, or does not go with the others.
    """

    method: ClassVar[str] = "hside"

    bits: int = field(default=32, metadata={"help": "Bits a weight of the side network: 1, 2, 4, 8, or 32 for float."})
    dims: list[int] = field(
        default_factory=lambda: [32, 48, 64, 72], metadata={"help": "Width of each of the four stages."}
    )
    heads: list[int] = field(
        default_factory=lambda: [2, 4, 8, 12],
        metadata={"help": "Heads of each stage's cross-attention; each divides the stage's width."},
    )
    block_indices: list[int] | None = field(
        default=None,
        metadata={"help": "Index of the last block that each stage reads; None to spread all blocks evenly."},
    )
    detach: bool = field(
        default=True,
        metadata={"help": "Read the blocks without a gradient; False learns through them, with tokens and norms."},
    )
    meta_tokens: int = field(
        default=1, metadata={"help": "Tokens learned for each block with detach=False; else the class token serves."}
    )
    drop_path: float = field(
        default=0.0, metadata={"help": "Rate at which the last side block's branches are dropped; earlier ones less."}
    )
    fusion: Literal["residual", "replace"] = field(
        default="residual",
        metadata={"help": "Add to the class token, starting from zero; or the paper's: a head of the adapter's own."},
    )
    head_norm: Literal["batch", "layer"] = field(
        default="batch", metadata={"help": "Norm before the head of fusion='replace'; 'layer' takes batches of one."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_stages()
        self.check_positive("meta_tokens")
        self.check_interval(0.0, 1.0, "drop_path")
        self.check_choice("fusion", ("residual", "replace"))
        self.check_choice("head_norm", ("batch", "layer"))
        if self.detach and self.meta_tokens != 1:
            self.refuse("meta_tokens", "are learned through the blocks; set detach=False")
        if self.fusion == "residual" and self.head_norm != "batch":
            self.refuse("head_norm", "is of the adapter's own head; set fusion='replace'")
        if self.fusion == "replace" and self.bi_head is not None:
            self.refuse("bi_head", "would not be used, since the adapter has a head of its own; leave it out")
        if self.layers_to_transform is not None:
            self.refuse("layers_to_transform", "does not apply: the network runs beside all blocks; use block_indices")

    def _check_stages(self) -> None:
        for name in ("dims", "heads"):
            values = getattr(self, name)
            if len(values) != STAGES or not all(_is_count(value) for value in values):
                self.refuse(name, f"must be {STAGES} positive integers")
        for dim, heads in zip(self.dims, self.heads, strict=True):
            if dim % heads:
                usable = ", ".join(str(n) for n in range(1, dim + 1) if dim % n == 0)
                self.refuse("heads", f"has {heads} for a stage of width {dim}, which they do not divide; use {usable}")
        ends = self.block_indices
        if ends is not None and (len(ends) != STAGES or not _is_increasing(ends)):
            self.refuse("block_indices", f"must be {STAGES} increasing indices, the last block of each stage")

    def stage_ends(self, blocks: int) -> tuple[int, ...]:
        """How many blocks have been read at the end of each stage.

        Args:
            blocks: of the model; beside fewer than four, a stage may have none.

        Raises:
            ValueError: block_indices names a block that the model does not have.
        """
        if self.block_indices is None:
            return tuple(blocks * stage // STAGES for stage in range(1, STAGES + 1))
        if self.block_indices[-1] >= blocks:
            self.refuse("block_indices", f"names block {self.block_indices[-1]}, out of range 0..{blocks - 1}")
        return tuple(index + 1 for index in self.block_indices)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_increasing(values: Sequence[int]) -> bool:
    return all(low < high for low, high in zip([-1, *values], values, strict=False))
