"""Which tensors of a wrapped model are the adapter's and which are the base's, read from PEFT's own module types."""

from collections.abc import Iterator

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.")  # torch.compile and FSDP put these into the names below them
_WRAPPED = ("base_layer", "original_module", "token_adapter")  # PEFT's names for what it puts between a base's


def plain_name(name: str) -> str:
    """The name without the marks of `torch.compile` and FSDP."""
    for mark in _WRAPPERS:
        name = name.replace(mark, "")
    return name


def unwrap(model: nn.Module) -> nn.Module:
    """The module behind `torch.compile(module)`; anything else unchanged."""
    return model._modules.get("_orig_mod") or model  # not getattr: a PeftModel asks its base


def adapter_keys(module: nn.Module) -> set[str]:
    """Names in `module.state_dict()` that belong to adapters: all of a tuner layer but its base, `modules_to_save`
    copies, state kept on the tuner, prompt encoders; trainable or not, parameters and persistent buffers."""
    holders = {name: held for name, child in module.named_modules() if (held := _base_part(child)) is not None}
    return {key for key in _state_names(module) if _is_adapter_key(key, holders)}


def base_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """(name as before wrapping, owning module, parameter) of every base parameter, each shared tensor once."""
    adapters = adapter_keys(module)
    modules = dict(module.named_modules())
    for name, parameter in module.named_parameters():
        if name in adapters:
            continue
        path = [part for part in plain_name(name).split(".") if part not in _WRAPPED]
        yield ".".join(path), modules[name.rpartition(".")[0]], parameter


def active_adapter(model: PeftModel) -> str:
    """The name of the one active adapter.

    Raises:
        ValueError: several are active, so that it is not clear which one is meant.
    """
    names = list(model.active_adapters)
    if len(names) != 1:
        raise ValueError(f"{len(names)} adapters are active ({', '.join(names)}); choose one with model.set_adapter.")
    return names[0]


def peft_config(model: PeftModel) -> PeftConfig:
    """The config of the one active adapter."""
    return model.peft_config[active_adapter(model)]


def find_model(module: nn.Module) -> nn.Module:
    """The first PeftModel or Hugging Face model in `module`, itself included; `module` where there is none."""
    for child in module.modules():
        if isinstance(child, PeftModel | PreTrainedModel):
            return child
    return unwrap(module)


def backbone(module: nn.Module) -> nn.Module:
    """The pretrained part of a model: below PEFT's wrapper and without the task head."""
    model = unwrap(module)
    model = unwrap(model.get_base_model()) if isinstance(model, PeftModel) else model
    return model.base_model if isinstance(model, PreTrainedModel) else model


def _state_names(module: nn.Module) -> Iterator[str]:
    """The names of `module.state_dict()`; that itself would gather every shard of a sharded model."""
    yield from (name for name, _ in module.named_parameters(remove_duplicate=False))
    for prefix, child in module.named_modules(remove_duplicate=False):
        for name, buffer in child._buffers.items():
            if buffer is not None and name not in child._non_persistent_buffers_set:
                yield f"{prefix}.{name}".lstrip(".")


def _base_part(module: nn.Module) -> str | None:
    """The child of an adapter module below which the base lives; None for a module that is no adapter's."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        return "original_module"
    if isinstance(module, BaseTunerLayer):
        return "base_layer"
    if isinstance(module, BaseTuner):
        return "model"
    return None


def _is_adapter_key(key: str, holders: dict[str, str]) -> bool:
    owner = key
    while owner:  # from the innermost module outwards: the nearest adapter module decides
        owner = owner.rpartition(".")[0]
        if owner in holders:
            child = key[len(owner) :].lstrip(".").partition(".")[0]
            return child != holders[owner]
    return "prompt_encoder." in key  # prompt learning keeps its state on the PeftModel itself
