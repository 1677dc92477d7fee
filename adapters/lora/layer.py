"""`FusedLinear`: PEFT's LoRA linear layer with its forward as one operator, and `fuse`, which puts it in."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import dispatch_default
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.pytorch_utils import Conv1D

from petune.kernels.lora_linear import lora_linear

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class FusedLinear(LoraLinear):
    """y = x Wᵀ + b + Σ scale · drop(x) Aᵀ Bᵀ over the active adapters, by `petune.kernels.lora_linear`.

    State, keys, merging and every other method are those of `peft.tuners.lora.Linear`, and so is the forward of all
    that the operator does not cover: mixed batches, variants such as DoRA, `lora_bias`, hooks on the wrapped modules,
    several active adapters with dropout.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        live = [name for name in self.active_adapters if name in self.lora_A]
        if not live or self._uncovered(x, live):
            return super().forward(x)
        base = cast("nn.Linear", self.base_layer)
        weight = base.weight.T if isinstance(base, Conv1D) else base.weight
        if len(live) == 1:
            a, b = self._factors(live[0])
            return lora_linear(x, weight, base.bias, a, b, self.scaling[live[0]], self._dropout_p(live[0]))
        # adapters without dropout add up to one of the summed rank: [A₁; A₂; …] and [s₁B₁, s₂B₂, …]
        a = torch.cat([self._factors(name)[0] for name in live])
        b = torch.cat([self._factors(name)[1] * self.scaling[name] for name in live], dim=1)
        return lora_linear(x, weight, base.bias, a, b, 1.0)

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        return cast("Tensor", self.lora_A[name].weight), cast("Tensor", self.lora_B[name].weight)

    def _dropout_p(self, name: str) -> float:
        dropout = self.lora_dropout[name]
        return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0

    def _uncovered(self, x: Tensor, live: list[str]) -> bool:
        autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
        return (
            any(uncovered_adapter(self, name) for name in live)
            or bool(uncovered_base(self.base_layer))
            or (len(live) > 1 and any(self._dropout_p(name) for name in live))
            # PEFT's own forward has the error message for these
            or x.shape[-1] != self.in_features
            or (not autocast and x.dtype != self.base_layer.weight.dtype)
            or (not autocast and not self.cast_input_dtype_enabled)
        )


def uncovered_base(base: nn.Module) -> str:
    """Why the operator cannot stand for this base layer, or "" if it can."""
    if type(base) not in (nn.Linear, Conv1D):
        return f"the base layer is {_class_name(base)}"
    weight = cast("Tensor", base.weight)
    if weight.dtype not in _DTYPES or is_traceable_wrapper_subclass(weight):
        return f"the base weight is a {type(weight).__name__} of {weight.dtype}"
    if getattr(base, "_hf_tp_plan", None) is not None:
        return "the base layer is tensor parallel"
    if _is_hooked(base):
        return "the base layer has hooks or a replaced forward"
    return ""


def uncovered_adapter(layer: LoraLinear, name: str) -> str:
    """Why the operator cannot stand for this adapter of the layer, or "" if it can."""
    a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if name in layer.lora_variant:
        return f"adapter {name!r} is a {type(layer.lora_variant[name]).__name__}"
    if type(a) is not nn.Linear or type(b) is not nn.Linear or layer.lora_bias.get(name):
        return f"adapter {name!r} has a bias (lora_bias=True) or is not made of nn.Linear"
    if type(dropout) not in (nn.Identity, nn.Dropout) or getattr(dropout, "p", 0.0) >= 1.0:
        return f"adapter {name!r} has the dropout {dropout}"
    if _is_hooked(a) or _is_hooked(b) or _is_hooked(dropout):
        return f"adapter {name!r} has hooks or a replaced forward"
    return ""


def create_layer(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> nn.Module | None:
    """PEFT's custom-module factory: a `FusedLinear`, or None to let PEFT's next dispatcher take the module."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if uncovered_base(base) or isinstance(target, BaseTunerLayer):
        return None
    layer = dispatch_default(target, adapter_name, config=config, **kwargs)
    if type(layer) is LoraLinear and not uncovered_adapter(layer, adapter_name):
        layer.__class__ = FusedLinear
    return layer


@dataclass(frozen=True)
class FuseReport:
    """What `fuse` found: print it."""

    fused: int
    """LoRA layers that now run the operator."""
    total: int
    """LoRA layers of the model."""
    left: dict[str, str]
    """Module name to the reason why it stays PEFT's own layer."""

    def __str__(self) -> str:
        by_reason = dict[str, list[str]]()
        for name, reason in self.left.items():
            by_reason.setdefault(reason, []).append(name)
        lines = [f"{len(names)} left to PEFT ({names[0]}, …): {reason}" for reason, names in by_reason.items()]
        return "; ".join([f"fused: {self.fused}/{self.total} layers", *lines])


def fuse(model: nn.Module) -> FuseReport:
    """Let every plain LoRA layer of a loaded PEFT model run the fused operator, in place.

    Parameters, keys and results stay (up to float rounding); only the class of the layers changes. Layers that the
    operator does not cover are left alone and reported.

    Raises:
        ValueError: the model has no LoRA layer.
    """
    fused, left = 0, dict[str, str]()
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        reason = _why_not(cast("nn.Module", layer))
        if reason:
            left[name] = reason
        else:
            layer.__class__ = FusedLinear
            fused += 1
    if not fused and not left:
        raise ValueError(f"fuse found no LoRA layer in {type(model).__name__}; add or load a LoRA adapter first.")
    return FuseReport(fused, fused + len(left), left)


def _why_not(layer: nn.Module) -> str:
    if type(layer) is not LoraLinear and not isinstance(layer, FusedLinear):
        return f"it is PEFT's {_class_name(layer)}"
    reasons = [uncovered_adapter(layer, name) for name in layer.lora_A]
    return uncovered_base(layer.base_layer) or (reasons[0] if reasons and all(reasons) else "")


def _is_hooked(module: nn.Module) -> bool:
    state = module.__dict__  # nn.Module.__getattr__ is slow, and this runs in every forward
    return "forward" in state or any(state[hooks] for hooks in _HOOKS)


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__.split('.')[0]}'s {type(module).__name__}"
