"""A plain LoRA nearest to an adapter of another method."""

import copy
from typing import Any, cast

from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.lora.conversion import convert_to_lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from peft.utils.peft_types import PeftType
from torch import Tensor
from transformers import PreTrainedModel

from petune.state import active_adapter, peft_config


def nearest_lora(model: PeftModel, rank: int | float) -> tuple[PeftModel, float]:
    """A LoRA model on a copy of the base whose BA is nearest to each layer's ΔW in the Frobenius norm.

    Args:
        model: its active adapter must add a ΔW to weights.
        rank: of every layer, or the share of ‖ΔW‖² to keep, (0, 1].

    Returns:
        the model, and ‖BA − ΔW‖ / ‖ΔW‖ over all layers.

    Raises:
        TypeError: the method's change is not a ΔW.
        ValueError: rank out of range.
    """
    name, prefix = active_adapter(model), PEFT_TYPE_TO_PREFIX_MAPPING[PeftType(peft_config(model).peft_type)]
    config, state = convert_to_lora(model, rank, adapter_name=name)
    config.task_type = peft_config(model).task_type
    saved = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    heads = {key: tensor for key, tensor in saved.items() if f".{prefix}" not in key}
    factors = {key: tensor for key, tensor in state.items() if ".lora_" in key}
    base: Any = unwrap_heads(copy.deepcopy(model)).unload()
    lora = _wrap(base, config, {**factors, **heads})
    return lora, _relative_error(model, lora, name)


def unwrap_heads(model: PeftModel) -> PeftModel:
    """Put the trained `modules_to_save` into the place of their wrappers, in `model` itself.

    PEFT's own unloading stops at a head without a `weight`, such as RoBERTa's (peft 0.21.2, every method but LoRA).
    """
    for path, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, module.modules_to_save[active_adapter(model)])
    return model


def _wrap(base: PreTrainedModel, config: PeftConfig, state: dict[str, Tensor]) -> PeftModel:
    model: Any = get_peft_model(base, config)
    result = set_peft_model_state_dict(model, state)
    if result.unexpected_keys:
        raise ValueError(f"the converted adapter does not fit the model: {result.unexpected_keys[:5]}.")
    return model


def _relative_error(model: PeftModel, lora: PeftModel, name: str) -> float:
    difference = total = 0.0
    new = dict(lora.named_modules())
    for path, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            written: Any = new[path]
            wanted: Tensor = cast("Any", layer).get_delta_weight(name).double()
            found: Tensor = written.get_delta_weight("default").double()
            difference += (found - wanted).square().sum().item()
            total += wanted.square().sum().item()
    return (difference / total) ** 0.5 if total else 0.0
