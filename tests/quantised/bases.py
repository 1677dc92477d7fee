"""Quantised bases and methods, and what becomes of each pair: the tests run it, and docs/quantised.md shows it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    PreTrainedModel,
    ViTConfig,
)

import petune
from petune.adapters.emoe import EmoeConfig
from petune.adapters.pat import PatConfig
from petune.adapters.side import HierarchicalSideConfig, LadderSideConfig
from petune.tasks.quantization import quantization_config
from petune.topology import find_topology

# sizes that groups of 64 and 128 weights divide
SIZES = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
LABELS = 3
LINEARS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]


@dataclass(frozen=True)
class Base:
    """A form of a frozen base."""

    name: str
    title: str
    library: str
    device: str = "cpu"
    in_ci: bool = True
    """Whether its library is among those that `make` installs."""

    @property
    def run(self) -> str:
        """Where the row has been run, for the page."""
        if self.device == "cuda":
            return "GPU, not run yet"
        return "CPU, tested here" if self.in_ci else f"CPU, tested here where {self.library} is installed"

    def load(self, folder: Path, **options: Any) -> PreTrainedModel:
        """The model of a folder with the linears of its blocks quantised, in eval mode."""
        pytest.importorskip(self.library, reason=f"{self.title} needs {self.library}, which is not installed")
        config = AutoConfig.from_pretrained(folder)
        auto_class = AUTO[config.model_type]
        if self.name == "hqq":
            return with_hqq(auto_class.from_pretrained(folder, **options))
        if self.name == "gptq":
            from transformers import GPTQConfig

            form: Any = GPTQConfig(bits=4, group_size=64, dataset=["w1 w2 w3"] * 8, tokenizer=str(folder))
        else:
            form = quantization_config(
                self.name, auto_class, config, "float32" if self.device == "cpu" else "bfloat16"
            )
        placed = {} if self.device == "cpu" else {"device_map": {"": 0}, "dtype": torch.bfloat16}
        return auto_class.from_pretrained(folder, quantization_config=form, **{**placed, **options}).eval()


AUTO = {"bert": AutoModelForSequenceClassification, "vit": AutoModelForImageClassification}
BASES = (
    Base("nf4", "bitsandbytes nf4", "bitsandbytes"),
    Base("fp4", "bitsandbytes fp4", "bitsandbytes"),
    Base("int8", "bitsandbytes int8", "bitsandbytes"),
    Base("int8_weight_only", "torchao int8", "torchao"),
    Base("hqq", "HQQ, 4 bits", "hqq", in_ci=False),
    Base("int4_weight_only", "torchao int4", "torchao", "cuda"),
    Base("gptq", "GPTQ, 4 bits", "gptqmodel", "cuda"),
)


def with_hqq(model: PreTrainedModel) -> PreTrainedModel:
    """The model with HQQ's layers in its blocks: transformers 5.23 has no way to load one."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    for name in find_topology(model.requires_grad_(False)).linears:
        parent, _, leaf = name.rpartition(".")
        linear: Any = model.get_submodule(name)
        form = BaseQuantizeConfig(nbits=4, group_size=64)
        made = HQQLinear(linear, form, compute_dtype=torch.float32, device="cpu")
        setattr(model.get_submodule(parent), leaf, made)
    return model.eval()


@dataclass(frozen=True)
class Method:
    """A method of the project, as it is put on a base."""

    name: str
    config_cls: type[peft.PeftConfig]
    options: Mapping[str, Any]
    model: str = "bert"
    random: Mapping[str, Any] = field(default_factory=lambda: {"init_weights": False})
    """Fields that start the adapter away from the identity."""

    def config(self, **fields: Any) -> peft.PeftConfig:
        return self.config_cls(**{**self.options, **fields})


METHODS = (
    # PEFT's all-linear, the default, finds no linears of HQQ and GPTQ
    Method("lora", petune.FusedLoraConfig, {"r": 4, "target_modules": LINEARS}, random={"init_lora_weights": False}),
    Method("bilora", petune.BiLoraConfig, {"r": 4, "dropout": 0.0}),
    Method("biadapter", petune.BiAdapterConfig, {"r": 4, "dropout": 0.0}),
    Method("emoe", EmoeConfig, {"r": 4, "num_experts": 4, "top_k": 4, "layers": "all", "lora_dropout": 0.0}),
    Method("pat", PatConfig, {"r": 4}),
    Method("ladder", LadderSideConfig, {"reduction_factor": 4}),
    Method("hside", HierarchicalSideConfig, {"dims": [8, 12, 16, 24], "heads": [2, 3, 4, 2]}, model="vit"),
)


@cache
def float_model(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    common = {**SIZES, "num_labels": LABELS, "initializer_range": 0.1}  # wide, so that rounding is seen
    if kind == "vit":
        return AUTO[kind].from_config(ViTConfig(image_size=32, patch_size=8, **common)).eval()
    return AUTO[kind].from_config(BertConfig(vocab_size=99, max_position_embeddings=32, **common)).eval()


def batch_for(kind: str, device: str = "cpu") -> dict[str, torch.Tensor]:
    rng = torch.Generator("cpu").manual_seed(1)
    labels = torch.tensor([0, 1, 2])
    if kind == "vit":
        inputs = {"pixel_values": torch.randn(3, 3, 32, 32, generator=rng)}
    else:
        inputs = {"input_ids": torch.randint(3, 99, (3, 11), generator=rng)}
    return {name: value.to(device) for name, value in {**inputs, "labels": labels}.items()}


def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits.float()


@dataclass(frozen=True)
class Cell:
    """What becomes of a method on a base."""

    refused: str = ""
    """Words of the message where the method does not go on the base at all."""
    not_merged: str = ""
    """Words of the message where the adapter cannot be merged into it."""
    reason: str = ""
    """What the page says of it, and what to do."""


OF_METHOD: dict[str, Cell] = {
    "biadapter": Cell(not_merged="contains a ReLU", reason="no base merges it: its update contains a ReLU; keep it"),
    "pat": Cell(
        refused="computes with the float weight",
        reason="it prunes the float weights; load the base without quantisation, or use `lora`",
    ),
    "ladder": Cell(not_merged="is a side network", reason="no base merges it: it is a network of its own; keep it"),
    "hside": Cell(not_merged="is a side network", reason="no base merges it: it is a network of its own; keep it"),
}
OF_PAIR: dict[tuple[str, str], Cell] = {
    ("lora", "int4_weight_only"): Cell(
        refused="only supports int8 weights for now",
        reason="PEFT's LoRA takes no 4-bit weights of torchao; use `nf4`, or `bilora`",
    ),
    ("lora", "gptq"): Cell(
        not_merged="Cannot merge LORA layers when the model is gptq quantized",
        reason="PEFT cannot write GPTQ's weights; put the adapter on the float base and merge there",
    ),
    ("bilora", "gptq"): Cell(
        not_merged="Dequantization is not supported for gptq",
        reason="PEFT cannot write GPTQ's weights; put the adapter on the float base and merge there",
    ),
    ("emoe", "gptq"): Cell(
        refused="whose weight PEFT cannot read",
        reason="experts are found in the weights, and PEFT cannot read GPTQ's; use `nf4`",
    ),
}


def cell(method: Method, base: Base) -> Cell:
    """The outcome of a pair."""
    return OF_PAIR.get((method.name, base.name)) or OF_METHOD.get(method.name) or Cell()


def table() -> str:
    """The matrix as docs/quantised.md has it, with the reasons below it."""
    reasons: dict[str, int] = {}
    lines = [
        "| base | run | " + " | ".join(f"`{method.name}`" for method in METHODS) + " |",
        "|---" * (len(METHODS) + 2) + "|",
    ]
    for base in BASES:
        words = [_short(cell(method, base), reasons) for method in METHODS]
        lines.append(f"| {base.title} | {base.run} | {' | '.join(words)} |")
    return "\n".join(
        [*lines, "", *(f"{number}. {reason[0].upper()}{reason[1:]}." for reason, number in reasons.items())]
    )


def _short(outcome: Cell, reasons: dict[str, int]) -> str:
    if not outcome.reason:
        return "works"
    number = reasons.setdefault(outcome.reason, len(reasons) + 1)
    return f"refused ({number})" if outcome.refused else f"works, no merge ({number})"
