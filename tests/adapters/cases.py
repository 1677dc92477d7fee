"""One row per adapter method: what the contract tests need to know about it, and nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import peft
import pytest
import torch
from peft import PeftConfig

import petune
from petune.adapters.emoe import EmoeConfig
from petune.adapters.pat import PatConfig
from petune.adapters.side import HierarchicalSideConfig, LadderSideConfig
from tests.adapters.block_shift import BlockShiftConfig
from tests.adapters.dense_delta import DenseDeltaConfig
from tests.adapters.relu_delta import ReluDeltaConfig
from tests.families import FAMILIES


@dataclass(frozen=True)
class Case:
    """A method and what it claims to support; the contract tests hold it to the claims, and to refuse the rest."""

    name: str
    """Name of the folder below adapters/; test ids read it."""
    config_cls: type[PeftConfig]
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Fields that every config of the row carries."""
    random_start: Mapping[str, Any] = field(default_factory=lambda: {"init_weights": False})
    """Fields that start the adapter from random weights instead of the identity."""
    dropout: str | None = None
    """Name of the dropout field."""
    default_targets: bool = True
    """Whether target_modules=None finds the targets of every family from the model's structure."""
    chooses_targets: bool = True
    """Whether the user may say what it adapts; a side network stands beside all blocks."""
    blocks: bool = False
    """Whether it wraps whole blocks, or any module from hidden states to hidden states, instead of linear layers."""
    identity: bool = True
    """Whether a fresh adapter, and merging one, changes nothing; routing changes the model by definition."""
    merges: bool = True
    mixed_batch: bool = True
    several_active: bool = True
    weighted: bool = True
    converts_to_lora: bool = True
    native: bool = True
    """Whether transformers' own `model.add_adapter` takes it (not if the tuner holds shared state)."""
    anywhere: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Fields with which it takes any linear layer as a target."""
    packed: bool = False
    """Whether what PEFT saves is packed: exact, but without the latents, and nothing for transformers' own loader."""
    resumable: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Fields with which a checkpoint holds all that training goes on from."""
    quantised: bool = True
    """Whether it rides on a quantised base; a method that computes with the float weight refuses one."""
    strict_load: bool = True
    """Whether a checkpoint with missing tensors, or of another base, is refused; PEFT's own methods load it."""
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    families: tuple[str, ...] = tuple(FAMILIES)
    """What it works on."""
    suite_models: tuple[str, ...] = ("MLP", "EmbConv1D")
    """Toy models of PEFT's own test-suite that it runs on."""

    def config(self, **fields: Any) -> PeftConfig:
        return self.config_cls(**{**self.options, **fields})

    def random_config(self, **fields: Any) -> PeftConfig:
        """A config whose adapter visibly changes the output without any training."""
        return self.config(**{**self.random_start, **fields})


RANDOM_LORA = {"init_lora_weights": False}
BESIDE: dict[str, Any] = {
    # what a side network is: one at a time, beside all blocks, with state between them, and no weight
    "dropout": "dropout",
    "chooses_targets": False,
    "blocks": True,
    "merges": False,
    "mixed_batch": False,
    "several_active": False,
    "weighted": False,
    "converts_to_lora": False,
    "native": False,
    "suite_models": (),
}
LADDER = {"reduction_factor": 4}
HSIDE = {"dims": [8, 12, 16, 24], "heads": [2, 3, 4, 2]}
VITS = ("vit", "deit", "dinov2", "ast")
EMOE = {"r": 4, "num_experts": 4, "layers": "all", "lora_dropout": 0.0}

CASES = (
    Case("lora", petune.FusedLoraConfig, {"r": 4}, RANDOM_LORA, dropout="lora_dropout", strict_load=False),
    Case(
        "bilora",
        petune.BiLoraConfig,
        {"r": 4, "dropout": 0.0},
        dropout="dropout",
        weighted=False,
        packed=True,
        resumable={"storage": "latent"},
    ),
    Case(
        "biadapter",
        petune.BiAdapterConfig,
        {"r": 4, "dropout": 0.0},
        dropout="dropout",
        merges=False,
        weighted=False,
        converts_to_lora=False,
        packed=True,
        resumable={"storage": "latent"},
        anywhere={"placement": "pfeiffer"},
        suite_models=(),  # they have no feed-forward to stand beside
    ),
    Case(
        "emoe",
        EmoeConfig,
        {**EMOE, "top_k": 4},
        dropout="lora_dropout",
        several_active=False,  # a neuron has one expert
        weighted=False,
        converts_to_lora=False,
        suite_models=(),  # they have no feed-forward to route
    ),
    Case(
        "emoe_routed",
        EmoeConfig,
        {**EMOE, "top_k": 2},
        dropout="lora_dropout",
        identity=False,
        several_active=False,
        weighted=False,
        converts_to_lora=False,
        families=("bert", "gpt2", "phi3", "t5", "vit"),  # the row above has them all
        suite_models=(),
    ),
    Case(
        "pat",
        PatConfig,
        {"r": 4, "lora_dropout": 0.0},
        dropout="lora_dropout",
        merges=False,
        mixed_batch=False,
        several_active=False,  # a stream has one mask
        weighted=False,
        converts_to_lora=False,
        native=False,
        quantised=False,
        families=tuple(family for family in FAMILIES if family != "swin"),  # whose width changes on the way
        suite_models=(),  # they have no residual stream
    ),
    Case("ladder", LadderSideConfig, LADDER, **BESIDE),
    Case(
        "ladder_1bit",
        LadderSideConfig,
        {**LADDER, "bits": 1},
        packed=True,
        resumable={"storage": "latent"},
        families=("bert", "gpt2", "llama", "t5", "vit", "swin"),
        **BESIDE,
    ),
    Case("densedelta", DenseDeltaConfig, dropout="delta_dropout"),
    Case(
        "reludelta",
        ReluDeltaConfig,
        {"target_modules": r".*\.(query|k_proj|q|q_proj)"},
        merges=False,
        mixed_batch=False,
        weighted=False,
        converts_to_lora=False,
        quantised=False,
        default_targets=False,
        families=("bert", "t5"),
        suite_models=("MLP",),
    ),
    Case(
        "blockshift",
        BlockShiftConfig,
        dropout="shift_dropout",
        blocks=True,
        merges=False,
        weighted=False,
        converts_to_lora=False,
        suite_models=(),
    ),
    Case("hside", HierarchicalSideConfig, HSIDE, families=VITS, **{**BESIDE, "dropout": "drop_path"}),
    Case(
        "hside_attached",
        HierarchicalSideConfig,
        {**HSIDE, "detach": False},
        identity=False,  # the tokens that it learns take part in every block's attention
        families=("vit", "dinov2"),
        **{**BESIDE, "dropout": "drop_path"},
    ),
    Case(
        "hside_1bit",
        HierarchicalSideConfig,
        {**HSIDE, "bits": 1},
        packed=True,
        resumable={"storage": "latent"},
        families=("vit",),
        **{**BESIDE, "dropout": "drop_path"},
    ),
    # the control: what PEFT's own method fails here is no demand of the contract
    Case(
        "peft_lora",
        peft.LoraConfig,
        {"r": 4},
        RANDOM_LORA,
        dropout="lora_dropout",
        default_targets=False,
        strict_load=False,
        families=("bert", "gpt2", "llama", "t5", "vit"),
    ),
)

BY_NAME = {case.name: case for case in CASES}


def cases(**claims: bool) -> pytest.MarkDecorator:
    """Parametrise over the methods that work on texts and whose row has all these claims; `cases(merges=False)` gives
    those without."""
    rows = [case for case in CASES if "bert" in case.families and _claims(case, claims)]
    return pytest.mark.parametrize("case", rows, ids=lambda case: case.name)


def cases_and_families(*families: str, **claims: bool) -> pytest.MarkDecorator:
    """Parametrise over methods × families, where a row works on them."""
    rows = [
        pytest.param(case, family, id=f"{case.name}-{family}")
        for case in CASES
        for family in families
        if _claims(case, claims) and family in case.families
    ]
    return pytest.mark.parametrize(("case", "family"), rows)


def _claims(case: Case, claims: Mapping[str, bool]) -> bool:
    return all(getattr(case, claim) == value for claim, value in claims.items())
