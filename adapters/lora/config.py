"""`FusedLoraConfig`: PEFT's `LoraConfig` with our layer class put in."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, cast

from peft import LoftQConfig, LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from petune.adapters.lora.layer import create_layer

_INIT_METADATA = next(f.metadata for f in fields(LoraConfig) if f.name == "init_lora_weights")
# task types for which PEFT adds the head to modules_to_save only after the adapters are in
_LATE_HEADS = {"TOKEN_CLS": ["classifier", "score"], "QUESTION_ANS": ["qa_outputs"]}


@dataclass
class FusedLoraConfig(LoraConfig):
    """LoRA with one fused operator per layer (Hu et al. 2021, arXiv 2106.09685): `peft.LoraConfig`, but faster.

    Fields, meaning, checkpoint keys and `peft_type` are those of `peft.LoraConfig`: plain PEFT loads what it saves.
    Two defaults differ: `target_modules=None` means "all-linear" for every architecture (with `layers_to_transform` or
    `target_parameters` it keeps PEFT's meaning), and a classification head that is trained in full is not wrapped.

    Raises:
        ValueError: r, a rank of rank_pattern, lora_dropout or target_modules is out of range.
    """

    rank_pattern: dict[str, int] | None = field(default_factory=lambda: dict[str, int]())
    """Other ranks than `r` for modules whose name ends in, or matches, a key."""
    alpha_pattern: dict[str, int | float] | None = field(default_factory=lambda: dict[str, int | float]())
    """Other values than `lora_alpha` for modules whose name ends in, or matches, a key."""
    init_lora_weights: bool | str = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=True, metadata=dict(_INIT_METADATA)
    )
    """True starts as a no-op; False is random A and B; or gaussian, eva, olora, pissa, corda, loftq, …"""

    loftq_config: dict[str, Any] | LoftQConfig = field(default_factory=lambda: dict[str, Any]())
    """Options of init_lora_weights="loftq"."""

    def __post_init__(self) -> None:
        self._check_ranges()
        super().__post_init__()
        if self.target_modules is None and self.target_parameters is None and self.layers_to_transform is None:
            self.target_modules = "all-linear"
        if self.target_modules == "all-linear" and self.task_type in _LATE_HEADS:
            self._exclude(_LATE_HEADS[self.task_type])
        factory = cast("type[nn.Module]", cast("Callable[..., Any]", create_layer))
        self._register_custom_module({nn.Linear: factory, Conv1D: factory})

    def _check_ranges(self) -> None:
        ranks = {"r": self.r, **{f"rank_pattern[{key!r}]": rank for key, rank in (self.rank_pattern or {}).items()}}
        for name, rank in ranks.items():
            if rank <= 0:
                raise ValueError(f"FusedLoraConfig.{name}={rank} must be a positive integer; 8 is a usual rank.")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"FusedLoraConfig.lora_dropout={self.lora_dropout} is not in [0, 1); 0.05 is usual.")
        aimless = self.target_parameters is None and self.trainable_token_indices is None
        if self.target_modules is not None and not self.target_modules and aimless:
            raise ValueError(
                "FusedLoraConfig.target_modules is empty; name modules, or leave it out for all linear layers."
            )
        if self.lora_alpha == 0:
            warnings.warn("FusedLoraConfig.lora_alpha=0 switches the adapter off: its scale is 0.", stacklevel=4)

    def _exclude(self, names: list[str]) -> None:
        # PEFT refuses to train a head in full that it has wrapped a moment before
        if not isinstance(self.exclude_modules, str):  # a pattern is the user's own business
            self.exclude_modules = cast("list[str]", {*(self.exclude_modules or ()), *names})
