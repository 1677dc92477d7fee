"""`BiLoraConfig` and `BiAdapterConfig`: LoRA and the bottleneck adapter with weights of one bit."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn import init

from petune.quantized.tuner import QuantizedConfig


@dataclass
class OneBitConfig(QuantizedConfig):
    """What both methods share (Jie et al. 2023, arXiv 2307.16867)."""

    r: int = field(default=32, metadata={"help": "Width of the bottleneck: rows of the down projection."})
    scale: float = field(default=1.0, metadata={"help": "What the update is multiplied by."})
    dropout: float = field(default=0.1, metadata={"help": "Probability, in the bottleneck; see dropout_position."})
    init_weights: bool | Literal["paper"] = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=True,
        metadata={"help": "True starts as the identity; 'paper' near to it; False from random weights, for tests."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("r")
        self.check_interval(0.0, 1.0, "dropout")
        self.check_choice("init_weights", (True, False, "paper"))
        if self.granularity == "row" and self.r == 1:
            self.refuse(
                "granularity", "needs r >= 2: at r=1 a row of the up projection is one weight, without a scale"
            )

    def start(self, up: Tensor) -> None:
        """Fill the latent of the up projection as `init_weights` says."""
        if self.init_weights == "paper" and self.bits < 32:
            init.trunc_normal_(up, 0.0, 1e-3, -2e-3, 2e-3)
        elif self.init_weights:
            init.zeros_(up)
        else:
            init.normal_(up, 0.0, 0.3)


@dataclass
class BiLoraConfig(OneBitConfig):
    """1-bit LoRA: y = x Wᵀ + b + scale · dropout(x Âᵀ) B̂ᵀ, Â and B̂ quantised (Jie et al. 2023, section 4)."""

    method: ClassVar[str] = "bilora"

    dropout_position: Literal["middle", "input"] = field(
        default="middle", metadata={"help": "Drop x Aᵀ, as the paper does, or x, as PEFT's LoRA does."}
    )
    fused_parts: Literal["qv", "all"] = field(
        default="qv", metadata={"help": "Of a fused query-key-value layer: adapt queries and values, or all of it."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("dropout_position", ("middle", "input"))
        self.check_choice("fused_parts", ("qv", "all"))


@dataclass
class BiAdapterConfig(OneBitConfig):
    """1-bit bottleneck adapter: y + scale · dropout(relu(x D̂ᵀ)) Ûᵀ, D̂ and Û quantised (Jie et al. 2023, section 4)."""

    method: ClassVar[str] = "biadapter"

    placement: Literal["adaptformer", "pfeiffer", "houlsby"] = field(
        default="adaptformer",
        metadata={"help": "Beside the feed-forward, as in the paper; behind it; or behind the attention and it."},
    )
    adapter_input: Literal["residual", "ffn"] = field(
        default="residual",
        metadata={
            "help": "adaptformer: read the stream before the feed-forward's norm, as the paper does, or after it."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("placement", ("adaptformer", "pfeiffer", "houlsby"))
        self.check_choice("adapter_input", ("residual", "ffn"))
        if self.placement != "adaptformer" and self.adapter_input != "residual":
            self.refuse(
                "adapter_input",
                f"is read by placement='adaptformer' only, and placement is {self.placement!r}; leave it out",
            )
