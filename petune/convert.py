"""A plain LoRA equal, or nearest, to an adapter of another method."""

import copy
import math
from collections import Counter
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora.conversion import convert_to_lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from peft.utils.peft_types import PeftType
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from petune.layer import PetuneLayer
from petune.low_rank import Factors, LowRankLayer
from petune.quantized.head import QuantizedHead, plain_head
from petune.state import active_adapter, peft_config

_ROOT = "base_model.model."  # of every name in a PEFT checkpoint


def plain_lora(model: PeftModel, rank: int | float | None) -> tuple[PeftModel, float]:
    """A LoRA model on a copy of the base with each layer's ΔW, or with the nearest BA in the Frobenius norm.

    Args:
        model: its active adapter must add a ΔW to weights.
        rank: of every layer, or the share of ‖ΔW‖² to keep, (0, 1]. None takes the factors of a method that has them
            as they are, and 0.999 for any other.

    Returns:
        the model, and ‖BA − ΔW‖ / ‖ΔW‖ over all layers.

    Raises:
        TypeError: the method's change is not a ΔW.
        ValueError: rank out of range.
    """
    name = active_adapter(model)
    layers = {path.removeprefix(_ROOT): layer for path, layer in _layers(model, name)}
    if not all(layer.supports_lora_conversion(name) for layer in layers.values()):
        kind = PeftType(peft_config(model).peft_type).value
        raise TypeError(
            f"layers of {kind} do not support LoRA conversion: what they add is not the product of their input and a "
            "ΔW; keep the adapter as it is, with save_adapter."
        )
    if rank is None and layers and all(isinstance(layer, LowRankLayer) for layer in layers.values()):
        config, state = _from_factors({path: layer.factors(name) for path, layer in layers.items()})
    else:
        config, state = convert_to_lora(model, 0.999 if rank is None else rank, adapter_name=name)
    config.task_type = peft_config(model).task_type
    config.fan_in_fan_out = any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values())
    config.modules_to_save = _heads(model) or None
    lora = _wrap(model, config, {key: tensor for key, tensor in state.items() if ".lora_" in key})
    return lora, _relative_error(layers, lora, name)


def unwrap_heads(model: PeftModel) -> PeftModel:
    """Put the trained `modules_to_save` into the place of their wrappers, in `model` itself.

    PEFT's own unloading stops at a head without a `weight`, such as RoBERTa's (peft 0.21.2, every method but LoRA).
    """
    for path, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            parent, _, name = path.rpartition(".")
            head = module.modules_to_save[active_adapter(model)]
            head = plain_head(head, module.original_module) if isinstance(module, QuantizedHead) else head
            setattr(model.get_submodule(parent), name, head)
    return model


def _layers(model: PeftModel, name: str) -> list[tuple[str, Any]]:
    """The layers that adapter `name` sits on, by path."""
    modules: list[tuple[str, Any]] = list(model.named_modules())
    found = [(path, module) for path, module in modules if isinstance(module, BaseTunerLayer)]
    return [(path, layer) for path, layer in found if name in layer._all_available_adapter_names()]


def _heads(model: PeftModel) -> list[str]:
    """What PEFT trains whole, quantised heads among it, by the names that a config takes."""
    names: list[str] = list(getattr(peft_config(model), "modules_to_save", None) or ())
    quantised = [path for path, module in model.named_modules() if isinstance(module, QuantizedHead)]
    return sorted({*names, *(path.removeprefix(_ROOT) for path in quantised)})


def _from_factors(factors: dict[str, Factors]) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Config and checkpoint of the LoRA that has these factors; where ranks or scales differ, by PEFT's patterns."""
    ranks = {path: len(one.a) for path, one in factors.items()}
    alphas = {path: _alpha(one.scale, ranks[path]) for path, one in factors.items()}
    rank, alpha = (Counter(of.values()).most_common(1)[0][0] for of in (ranks, alphas))
    config = LoraConfig(
        r=int(rank),
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  # PEFT divides it by r, whatever it is
        target_modules=list(factors),
        rank_pattern={f"^{path}": one for path, one in ranks.items() if one != rank},
        alpha_pattern={f"^{path}": one for path, one in alphas.items() if one != alpha},  # pyright: ignore[reportArgumentType]
    )
    state: dict[str, Tensor] = {}
    for path, one in factors.items():
        state[f"{_ROOT}{path}.lora_A.weight"] = one.a.detach().float().contiguous()
        state[f"{_ROOT}{path}.lora_B.weight"] = one.b.detach().float().contiguous()
    return config, state


def _alpha(scale: float, rank: int) -> int | float:
    """An alpha with alpha / rank = scale, to the bit where there is one; an integer where it is one."""
    alpha = scale * rank
    for near in (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf)):
        if near / rank == scale:
            alpha = near
            break
    return int(alpha) if alpha == int(alpha) else alpha


def _wrap(model: PeftModel, config: LoraConfig, state: dict[str, Tensor]) -> PeftModel:
    """The LoRA on a copy of the base, whose heads are the trained ones."""
    base: Any = unwrap_heads(copy.deepcopy(model)).unload()
    lora: Any = get_peft_model(base, config)
    config.modules_to_save = list(dict.fromkeys(config.modules_to_save or ())) or None  # PEFT adds those of the task
    heads = get_peft_model_state_dict(lora, save_embedding_layers=False)
    result = set_peft_model_state_dict(lora, {**heads, **state})
    if result.unexpected_keys:
        raise ValueError(f"the converted adapter does not fit the model: {result.unexpected_keys[:5]}.")
    return lora.eval()


@torch.no_grad()
def _relative_error(layers: dict[str, Any], lora: PeftModel, name: str) -> float:
    difference = total = 0.0
    for path, layer in layers.items():
        written: Any = lora.get_submodule(_ROOT + path)
        wanted: Tensor = layer.get_delta_weight(name)
        found: Tensor = written.get_delta_weight("default").to(wanted.dtype)
        if written.fan_in_fan_out and isinstance(layer, PetuneLayer):  # whose ΔW has rows of outputs on any base
            found = found.T
        difference += (found.double() - wanted.double()).square().sum().item()
        total += wanted.double().square().sum().item()
    return (difference / total) ** 0.5 if total else 0.0
