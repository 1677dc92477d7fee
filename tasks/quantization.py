"""Load a base with the linears of its blocks quantised, by the library that has the form asked for."""

import importlib.util
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftConfig, prepare_model_for_kbit_training
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.peft_types import PeftType
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel, TorchAoConfig
from transformers.pytorch_utils import Conv1D

from petune.config import PetuneConfig
from petune.four_bits import keep_form
from petune.layer import linear_shape
from petune.topology import find_topology

Quantization = Literal["nf4", "fp4", "int8", "int8_weight_only", "int4_weight_only"]

Options = Callable[[torch.dtype, list[str]], Any]
"""Makes transformers' config of the dtype to compute in and the names of the linears to leave as they are."""


@dataclass(frozen=True)
class Form:
    """A form of quantised weights."""

    library: str
    """Package that has it."""
    bits: float
    """Of a weight, with its share of the scales."""
    options: Options
    group: int = 1
    """What the input size of a linear must be a multiple of, for it to be quantised."""
    takes_conv1d: bool = False
    """Whether GPT-2's Conv1D is quantised as well."""


def _bitsandbytes(kind: str) -> Options:
    def options(dtype: torch.dtype, skip: list[str]) -> Any:
        if kind == "int8":
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=skip
        )

    return options


def _torchao(name: str) -> Options:
    def options(_: torch.dtype, skip: list[str]) -> Any:
        forms = importlib.import_module("torchao.quantization")
        return TorchAoConfig(getattr(forms, name)(), modules_to_not_convert=skip)

    return options


FORMS: dict[Quantization, Form] = {
    # a scale of 32 bits for 64 weights, or for a row
    "nf4": Form("bitsandbytes", 4.5, _bitsandbytes("nf4"), takes_conv1d=True),
    "fp4": Form("bitsandbytes", 4.5, _bitsandbytes("fp4"), takes_conv1d=True),
    "int8": Form("bitsandbytes", 8.0, _bitsandbytes("int8"), takes_conv1d=True),
    "int8_weight_only": Form("torchao", 8.0, _torchao("Int8WeightOnlyConfig")),
    "int4_weight_only": Form(
        "torchao", 4.25, _torchao("Int4WeightOnlyConfig"), group=128
    ),  # a scale and a zero of 16 bits each for 128 weights
}


def quantization_config(kind: Quantization, auto_class: Any, config: PretrainedConfig, dtype: str) -> Any:
    """What `from_pretrained` takes to quantise the linears of the blocks, and nothing else.

    What is outside of the blocks, a head or a pooler, may be made anew, and trains in full.

    Args:
        kind: the form.
        auto_class: transformers Auto class that the model will be made by.
        config: of the base.
        dtype: of what is not quantised, to compute in; "auto" for the config's.

    Raises:
        ImportError: the form's library is not installed.
        ValueError: the model has no blocks, or none of their linears can be quantised so.
    """
    form = FORMS[kind]
    if importlib.util.find_spec(form.library) is None:
        raise ImportError(
            f"quantization={kind} needs {form.library}, which is not installed; run pip install {form.library}, or "
            "leave quantization out."
        )
    with torch.device("meta"):
        model: nn.Module = auto_class.from_config(config)
    inside = quantisable(model, kind)
    if not inside:
        others = ", ".join(name for name, other in FORMS.items() if other.takes_conv1d)
        raise ValueError(
            f"quantization={kind} quantises nn.Linear layers of an input size that {form.group} divides, and the "
            f"blocks of {type(model).__name__} have none; use one of {others}."
        )
    outside = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in inside]
    computes: Any = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
    return form.options(computes, [rf"^{re.escape(name)}(\.|$)" for name in outside])


def quantisable(model: nn.Module, kind: Quantization) -> dict[str, nn.Module]:
    """The modules of a float model that `kind` quantises, by name.

    Raises:
        ValueError: the blocks of the model cannot be told.
    """
    try:
        names = find_topology(model).linears
    except ValueError as error:
        reason = str(error).removesuffix("; pass target_modules.")
        raise ValueError(f"quantization={kind} is for the linears of blocks: {reason}; leave it out.") from error
    found = {name: _plain(model.get_submodule(name)) for name in names}
    return {name: one for name, one in found.items() if _takes(FORMS[kind], one)}


def _takes(form: Form, module: nn.Module) -> bool:
    return (form.takes_conv1d or isinstance(module, nn.Linear)) and linear_shape(module)[0] % form.group == 0


def _plain(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def saved_bytes(model: nn.Module, kind: Quantization) -> int:
    """Bytes that `kind` saves of a float model's weights."""
    weights: list[Any] = [module.weight for module in quantisable(model, kind).values()]
    return round(sum(weight.numel() * (weight.element_size() - FORMS[kind].bits / 8) for weight in weights))


def prepare(model: PreTrainedModel) -> None:
    """Make a quantised model ready to be trained on, as PEFT advises; see also `keep_form`.

    All of it is frozen; what is left in half precision beside weights of bitsandbytes goes to float32, norms among
    them.
    """
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    keep_form(model)
    # each int8 layer says at each call that it computes in float16
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def name_linears(adapter: Any, model: nn.Module) -> None:
    """Put names in the place of "all-linear" where PEFT would pass over the linears of the blocks.

    It takes what is an `nn.Linear` for one, and the layers of GPTQ, HQQ and others are none: only a pooler or a head
    would be adapted.
    """
    if getattr(adapter, "target_modules", None) != "all-linear" or isinstance(adapter, PetuneConfig):
        return
    try:
        names = find_topology(model).linears
    except ValueError:  # no blocks: PEFT's own way it is
        return
    if not all(isinstance(model.get_submodule(name), (nn.Linear, Conv1D)) for name in names):
        adapter.target_modules = set(names)


def check_adapter(kind: Quantization, trained: str, adapter: PeftConfig, source: Any) -> None:
    """Refuse what does not go together with a quantised base, before anything is loaded.

    Raises:
        ValueError: the model is loaded already, all of it is to be trained, or the method needs the float weights.
    """
    if not isinstance(source, str):
        raise ValueError(
            f"quantization={kind} is for a model that is loaded from a folder or the hub, and a "
            f"{type(source).__name__} was given; load it with a quantization_config, and leave quantization out."
        )
    if trained == "all":
        raise ValueError(
            f"quantization={kind} freezes the base's weights, which train=all trains; use train=adapter, or leave "
            "quantization out."
        )
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(PeftType(adapter.peft_type)) if adapter.peft_type else None
    if trained == "adapter" and getattr(tuner, "needs_float_base", False):
        raise ValueError(
            f"quantization={kind} leaves no float weights, with which {type(adapter).__name__} computes; leave "
            "quantization out, or use FusedLoraConfig."
        )
