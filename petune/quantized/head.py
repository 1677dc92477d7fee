"""A task head of few bits: it stands in for the model's own, as a module of `modules_to_save` does."""

import math
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from petune.layer import linear_shape
from petune.quantized.linear import QuantizedLinear
from petune.quantized.quantizer import Quantization


class QuantizedHead(ModulesToSaveWrapper):
    """logits = x Ŵᵀ in the place of a linear head, one Ŵ an adapter, without a bias

    Switching, disabling and deleting are PEFT's. `petune.quantized.tuner.PackedTuner` saves and loads the latents, so
    that PEFT finds none here. Merged or unloaded it is a plain Linear.
    """

    def __init__(self, head: nn.Module, adapter_name: str, quantization: Quantization) -> None:
        # ModulesToSaveWrapper's own __init__ hands no keywords on
        super(ModulesToSaveWrapper, self).__init__(head, adapter_name, quantization=quantization)

    def update(self, adapter_name: str, quantization: Quantization | None = None, **kwargs: Any) -> None:
        if adapter_name not in self.modules_to_save and quantization is not None:
            in_features, out_features = linear_shape(self.original_module)
            head = QuantizedLinear(in_features, out_features, quantization)
            nn.init.kaiming_uniform_(head.weight, a=math.sqrt(5))
            head = head if head.weight.is_meta else head.to(next(self.original_module.parameters()).device)
            self.modules_to_save[adapter_name] = head.train(self.original_module.training)
        super().update(adapter_name, **kwargs)

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Nothing, as the tuner keeps it with its own weights; the weight itself where it is not quantised."""
        return {} if self._is_the_tuners(adapter_name) else super().adapter_state_dict(adapter_name, state_dict)

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """As `adapter_state_dict`."""
        return {} if self._is_the_tuners(adapter_name) else super().adapter_state_dict_load_map(adapter_name)

    def _is_the_tuners(self, adapter_name: str) -> bool:
        if adapter_name not in self.modules_to_save:
            return True
        head: Any = self.modules_to_save[adapter_name]
        return head.quantization.active

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: Any) -> nn.Module:
        """The active adapter's head as a plain Linear; the model's own where no adapter is active."""
        if not self.active_adapters:
            return self.original_module
        return plain_head(self.modules_to_save[self.active_adapters[0]], self.original_module)


@torch.no_grad()
def plain_head(head: nn.Module, original: nn.Module) -> nn.Linear:
    """A Linear with the values of a quantised head, in the dtype and on the device of the model's own.

    Where that has a bias, this one has zeros: without, transformers would start a new one when it loads the model.
    """
    weight: Tensor = head.quantized()  # pyright: ignore[reportCallIssue]
    out_features, in_features = weight.shape
    bias = getattr(original, "bias", None) is not None
    like = next(original.parameters())
    plain = nn.Linear(in_features, out_features, bias=bias, device=like.device, dtype=like.dtype)
    plain.weight.copy_(weight)
    if bias:
        nn.init.zeros_(plain.bias)
    return plain.train(original.training)


def is_wrapped(module: nn.Module) -> bool:
    """Whether PEFT already trains a copy of this module."""
    return isinstance(module, AuxiliaryTrainingWrapper)
