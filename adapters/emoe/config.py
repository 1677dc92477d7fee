"""`EmoeConfig`: experts found in a dense feed-forward, and the LoRA that is trained while they are routed to."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from petune.config import PetuneConfig

LAST_EVEN = "last_even:"
_WHOLE_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # task types for which PEFT trains the head whole


@dataclass
class EmoeConfig(PetuneConfig):
    """Emergent mixture of experts (Qiu, Huang & Fu 2024, arXiv 2310.10908), with LoRA on `target_modules`.

    The neurons of a feed-forward are grouped into experts of equal size by what they read; each token keeps the
    `top_k` experts whose mean pre-activation is largest, and the rest is set to zero. With top_k < num_experts the
    model changes at once: by definition a fresh adapter of this method is no identity.

    Raises:
        ValueError: a field is out of range.
    """

    method: ClassVar[str] = "emoe"

    num_experts: int = field(default=64, metadata={"help": "Experts a feed-forward; must divide its inner size."})
    top_k: int = field(default=16, metadata={"help": "Experts that a token keeps, 1 to num_experts."})
    layers: list[int] | int | str = field(
        default=f"{LAST_EVEN}2",
        metadata={"help": "Blocks with a routed feed-forward: 'last_even:n', 'all', or numbers from 0."},
    )
    router: Literal["keys", "random", "learned"] = field(
        default="keys",
        metadata={
            "help": "Scores by the experts' mean keys; a frozen random map (SMoE-Dropout: see callback TopKSchedule); "
            "or a trained sigmoid map (SPT's routed feed-forward, with cluster='contiguous')."
        },
    )
    score: Literal["gate", "up", "up_abs", "inter", "inter_abs"] = field(
        default="gate",
        metadata={"help": "What router='keys' takes an expert's mean of: pre-activations, or other inner values."},
    )
    score_bias: bool = field(default=False, metadata={"help": "Let the first linear's bias count in the score."})
    router_noise: float = field(
        default=0.0, metadata={"help": "In training, add N(0, 1) · router_noise / num_experts to the scores."}
    )
    pre_act_dropout: float = field(default=0.0, metadata={"help": "Dropout of the routed pre-activations."})
    balance_loss: float = field(
        default=0.0, metadata={"help": "Weight of the loss that keeps the experts evenly used, added to output.loss."}
    )
    cluster: Literal["balanced_kmeans", "random", "contiguous"] = field(
        default="balanced_kmeans", metadata={"help": "How neurons are grouped into experts."}
    )
    seed: int = field(default=0, metadata={"help": "Of the clustering and of a random router."})
    r: int = field(default=8, metadata={"help": "Rank of the LoRA on target_modules; 0 for none."})
    lora_alpha: float = field(default=16.0, metadata={"help": "LoRA's scale is lora_alpha / r."})
    lora_dropout: float = field(default=0.1, metadata={"help": "Dropout of LoRA's input."})
    train_ffn: bool = field(
        default=False, metadata={"help": "Also train the weights of the routed feed-forwards, all of them."}
    )
    routed_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of the linears whose output is routed, filled at injection."}
    )
    ffn_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of all linears of the routed feed-forwards, filled at injection."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.restored = self.routed_modules is not None  # the labels are in a checkpoint: do not cluster before it
        self.check_positive("num_experts", "top_k")
        if self.top_k > self.num_experts:
            self.refuse("top_k", f"must be 1 to num_experts={self.num_experts}")
        self._check_layers()
        self.check_choice("router", ("keys", "random", "learned"))
        self.check_choice("score", ("gate", "up", "up_abs", "inter", "inter_abs"))
        self.check_choice("cluster", ("balanced_kmeans", "random", "contiguous"))
        self.check_interval(0.0, 1.0, "lora_dropout", "pre_act_dropout")
        self.check_interval(0.0, float("inf"), "router_noise", "balance_loss")
        if self.router != "keys" and (self.score != "gate" or self.score_bias):
            self.refuse("router", "has scores of its own; leave out score and score_bias, or use router='keys'")
        if self.r != 0:
            self.check_positive("r")

    def _check_layers(self) -> None:
        layers = self.layers
        if isinstance(layers, str):
            count = layers.removeprefix(LAST_EVEN)
            if layers != "all" and not (layers.startswith(LAST_EVEN) and count.isdecimal() and int(count)):
                self.refuse("layers", "must be 'all', 'last_even:n' with n >= 1, or block numbers such as [8, 10]")
        elif isinstance(layers, int):
            self.layers = [layers]
        elif not layers:
            self.refuse("layers", "names at least one block; 'last_even:2' is the default")

    @property
    def scale(self) -> float:
        """What LoRA's update is multiplied by."""
        return self.lora_alpha / self.r if self.r else 0.0

    @property
    def trains_nothing(self) -> bool:
        """Whether no parameter would be trained: routing itself has none."""
        own = self.r > 0 or self.train_ffn or self.router == "learned"
        return not own and not self.modules_to_save and self.task_type not in _WHOLE_HEADS
