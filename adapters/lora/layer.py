"""`FusedLoraLinear`: PEFT's LoRA linear layer with its forward as one operator."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.layer import dispatch_default
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.pytorch_utils import Conv1D

from petune.kernels.lora_linear import lora_linear

if TYPE_CHECKING:
    from petune.adapters.lora.group import Group

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Operands(NamedTuple):
    """What a call needs besides x, in the order of `petune.kernels.lora_linear.lora_linear`."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: float
    dropout_p: float


class FusedLoraLinear(LoraLinear):
    """y = x Wᵀ + b + Σ scale · drop(x) Aᵀ Bᵀ over the active adapters, by `petune.kernels.lora_linear`.

    State, keys, merging and every other method are those of `peft.tuners.lora.Linear`, and so is the forward of all
    that the operator does not cover: mixed batches, variants such as DoRA, `lora_bias`, hooks on the wrapped modules,
    several active adapters with dropout.
    """

    group: "Group | None" = None
    """The projections of one input that are computed together with this one."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs:
            return super().forward(x, *args, **kwargs)
        if self.group is not None:
            y = self.group.take(self, x)
            if y is not None:
                return y
        operands = self.operands(x)
        return super().forward(x) if operands is None else lora_linear(x, *operands)

    def operands(self, x: Tensor) -> Operands | None:
        """The tensors and numbers of this call, or None where PEFT's own forward must run.

        Everything is looked at in every call, so no change to the layer, its adapters or their hooks is missed.
        """
        # the dictionaries of modules and parameters are read directly: nn.Module.__getattr__ takes ten times as long
        modules: dict[str, Any] = self._modules
        base = modules["base_layer"]
        if self._disable_adapters or self.merged_adapters or _has_any_global_hook() or uncovered_base(base):
            return None
        weight = tensor(base, "weight")
        if x.shape[-1] != self.in_features or not self._takes(x, weight):
            return None
        live: list[tuple[Tensor, Tensor, float, float]] = []
        active = self._active_adapter
        for name in (active,) if isinstance(active, str) else active:
            if name in modules["lora_A"]._modules:
                if uncovered_adapter(self, name):
                    return None
                live.append(self._adapter(name))
        if type(base) is Conv1D:
            weight = weight.T
        if len(live) == 1:
            return Operands(weight, tensor(base, "bias"), *live[0])
        if not live or any(dropout_p for *_, dropout_p in live):
            return None
        # adapters without dropout add up to one of the summed rank: [A₁; A₂; …] and [s₁B₁, s₂B₂, …]
        a = torch.cat([a for a, _, _, _ in live])
        b = torch.cat([b * scale for _, b, scale, _ in live], dim=1)
        return Operands(weight, tensor(base, "bias"), a, b, 1.0, 0.0)

    def _adapter(self, name: str) -> tuple[Tensor, Tensor, float, float]:
        a, b, dropout = parts(self, name)
        dropout_p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
        return tensor(a, "weight"), tensor(b, "weight"), self.scaling[name], dropout_p

    def _takes(self, x: Tensor, weight: Tensor) -> bool:
        """Whether the operator reads x as it is; PEFT's own forward has the error messages for the rest."""
        if type(x) is not Tensor and is_traceable_wrapper_subclass(x):
            return False
        if x.dtype == weight.dtype and self.cast_input_dtype_enabled:
            return True
        return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def parts(layer: LoraLinear, name: str) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The modules A, B and dropout of an adapter."""
    modules: dict[str, Any] = layer._modules
    return modules["lora_A"]._modules[name], modules["lora_B"]._modules[name], modules["lora_dropout"]._modules[name]


def tensor(module: nn.Module, name: str) -> Any:
    """`module.weight` and the like, from where it usually is."""
    # FSDP1 and DataParallel put a tensor in the place of the parameter
    return module._parameters[name] if name in module._parameters else getattr(module, name)


def uncovered_base(base: nn.Module) -> str:
    """Why the operator cannot stand for this base layer, or "" if it can."""
    if type(base) is not nn.Linear and type(base) is not Conv1D:
        return f"the base layer is {class_name(base)}"
    weight = tensor(base, "weight")
    if weight.dtype not in _DTYPES or _is_wrapped(weight):
        return f"the base weight is a {type(weight).__name__} of {weight.dtype}"
    if base.__dict__.get("_hf_tp_plan") is not None:
        return "the base layer is tensor parallel"
    if is_hooked(base):
        return "the base layer has hooks or a replaced forward"
    return ""


def uncovered_adapter(layer: LoraLinear, name: str) -> str:
    """Why the operator cannot stand for this adapter of the layer, or "" if it can."""
    a, b, dropout = parts(layer, name)
    if name in layer.lora_variant:
        return f"adapter {name!r} is a {type(layer.lora_variant[name]).__name__}"
    if type(a) is not nn.Linear or type(b) is not nn.Linear or layer.lora_bias.get(name):
        return f"adapter {name!r} has a bias (lora_bias=True) or is not made of nn.Linear"
    if type(dropout) is nn.Dropout:
        if dropout.p >= 1.0:
            return f"adapter {name!r} has the dropout {dropout}"
    elif type(dropout) is not nn.Identity:
        return f"adapter {name!r} has the dropout {dropout}"
    if _is_wrapped(tensor(a, "weight")) or _is_wrapped(tensor(b, "weight")):
        return f"adapter {name!r} holds a {type(tensor(a, 'weight')).__name__}"
    if type(layer.scaling[name]) not in (float, int):
        return f"adapter {name!r} has a {type(layer.scaling[name]).__name__} as its scale"
    if is_hooked(a) or is_hooked(b) or is_hooked(dropout):
        return f"adapter {name!r} has hooks or a replaced forward"
    return ""


def create_layer(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> nn.Module | None:
    """PEFT's custom-module factory: a `FusedLoraLinear`, or None to let PEFT's next dispatcher take the module."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if uncovered_base(base) or isinstance(target, BaseTunerLayer):
        return None
    layer = dispatch_default(target, adapter_name, config=config, **kwargs)
    if type(layer) is LoraLinear and not uncovered_adapter(layer, adapter_name):
        layer.__class__ = FusedLoraLinear
    return layer


def is_hooked(module: nn.Module) -> bool:
    """Whether calling the module is more, or something else, than its class's forward."""
    state = module.__dict__
    return bool(
        "forward" in state
        or state["_forward_pre_hooks"]
        or state["_forward_hooks"]
        or state["_backward_pre_hooks"]
        or state["_backward_hooks"]
        or state.get("_compiled_call_impl")
    )


def class_name(module: nn.Module) -> str:
    """peft's Embedding, torch's Linear, …"""
    return f"{type(module).__module__.split('.')[0]}'s {type(module).__name__}"


def _is_wrapped(weight: Tensor) -> bool:
    """Whether the weight is a distributed, quantised or other tensor that only looks like a plain one."""
    return type(weight) is not nn.Parameter and is_traceable_wrapper_subclass(weight)
