"""`FusedLoraLinear`: PEFT's LoRA linear layer with its forward as one operator."""

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.layer import dispatch_default
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from petune.adapters.lora.group import Group
from petune.four_bits import keep_form
from petune.kernels.lora_group import lora_group
from petune.kernels.lora_linear import lora_linear
from petune.low_rank import Operands, is_hooked, is_wrapped, takes, tensor, uncovered_base
from petune.mixed_batch import Mixed, MixedProjections, allow_training, mixed, only_brings_names, row_groups


class FusedLoraLinear(LoraLinear):
    """y = x Wᵀ + b + Σ scale · drop(x) Aᵀ Bᵀ over the active adapters, by `petune.kernels.lora_linear`.

    State, keys, merging and every other method are those of `peft.tuners.lora.Linear`, and so is the forward of all
    that the operator does not cover: variants such as DoRA, `lora_bias`, hooks on the wrapped modules, several active
    adapters with dropout. Rows of a batch that take different adapters (`adapter_names`) are computed by
    `petune.kernels.grouped_lora`.
    """

    group: Group | None = None
    """The projections of one input that are computed together with this one."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs:
            names = kwargs.get("adapter_names")
            y = None if names is None or args or len(kwargs) > 1 else self._mixed(x, names)
            return super().forward(x, *args, **kwargs) if y is None else y
        if self.group is not None:
            y = self.group.take(self, x, _together)
            if y is not None:
                return y
        operands = self.operands(x)
        return super().forward(x) if operands is None else lora_linear(x, *operands[:-1])

    def operands(self, x: Tensor) -> Operands | None:
        """The tensors and numbers of this call, or None where PEFT's own forward must run.

        Everything is looked at in every call, so no change to the layer, its adapters or their hooks is missed.
        """
        # the dictionaries of modules and parameters are read directly: nn.Module.__getattr__ takes ten times as long
        modules: dict[str, Any] = self._modules
        base = modules["base_layer"]
        if not self._takes(x, base):
            return None
        live: list[tuple[Tensor, Tensor, float, float]] = []
        active = self._active_adapter
        for name in (active,) if isinstance(active, str) else active:
            if name in modules["lora_A"]._modules:
                if uncovered_adapter(self, name):
                    return None
                live.append(self._adapter(name))
        weight = _weight(base)
        if len(live) == 1:
            return Operands(weight, tensor(base, "bias"), *live[0])
        if not live or any(dropout_p for *_, dropout_p in live):
            return None
        # adapters without dropout add up to one of the summed rank: [A₁; A₂; …] and [s₁B₁, s₂B₂, …]
        a = torch.cat([a for a, _, _, _ in live])
        b = torch.cat([b * scale for _, b, scale, _ in live], dim=1)
        return Operands(weight, tensor(base, "bias"), a, b, 1.0, 0.0)

    def _mixed(self, x: Tensor, names: Sequence[str]) -> Tensor | None:
        """The output for rows that take these adapters, or None where PEFT's loop over them must run."""
        if len(names) != len(x) or not self._takes(x, self._modules["base_layer"]):
            return None
        if self.group is not None and torch.is_grad_enabled():
            y = self.group.take(self, x, lambda layers, x: _mixed_together(layers, x, names), names)
            if y is not None:
                return y
        found = mixed(self, names, lambda: self._make_mixed(tuple(names)))
        return None if found is None else found(x)

    def _make_mixed(self, names: tuple[str, ...]) -> Mixed | None:
        modules: dict[str, Any] = self._modules
        present, groups = row_groups(names, frozenset(names).intersection(modules["lora_A"]._modules))
        if groups is None or any(uncovered_adapter(self, name) for name in present):
            return None
        base = modules["base_layer"]
        weight, bias = _weight(base), tensor(base, "bias")
        return Mixed([Operands(weight, bias, *self._adapter(name)) for name in present], groups)

    def _takes(self, x: Tensor, base: Any) -> bool:
        """Whether the operators may stand for the base layer, and for x as it is."""
        if self._disable_adapters or self.merged_adapters or _has_any_global_hook() or uncovered_base(base):
            return False
        weight = tensor(base, "weight")
        return x.shape[-1] == self.in_features and takes(x, weight, self.cast_input_dtype_enabled)

    def _adapter(self, name: str) -> tuple[Tensor, Tensor, float, float]:
        a, b, dropout = parts(self, name)
        dropout_p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
        return tensor(a, "weight"), tensor(b, "weight"), self.scaling[name], dropout_p


def _together(layers: Sequence[Any], x: Tensor) -> Sequence[Tensor] | None:
    """The outputs of sibling layers by `lora_group`, their dropout one mask for all; None where it covers them not."""
    operands: list[Operands] = []
    for layer in layers:
        own = None if type(layer) is not FusedLoraLinear or is_hooked(layer) else layer.operands(x)
        if own is None:
            return None
        operands.append(own)
    weights, biases, a, b, scales, dropouts, _ = zip(*operands, strict=True)
    if len(set(dropouts)) > 1 or len({factor.dtype for factor in a + b}) > 1:
        return None
    return lora_group(x, weights, biases, a, b, scales, dropouts[0])


def _mixed_together(layers: Sequence[Any], x: Tensor, names: Sequence[str]) -> Sequence[Tensor] | None:
    """As `_together`, for rows that take these adapters."""
    if any(type(layer) is not FusedLoraLinear or not layer._takes(x, layer.base_layer) for layer in layers):
        return None

    def make() -> MixedProjections | None:
        found = [layer._make_mixed(tuple(names)) for layer in layers if only_brings_names(layer, names)]
        whole = [one for one in found if one is not None]
        return MixedProjections.of(whole) if len(whole) == len(layers) else None

    found = mixed(layers[0].group, names, make)
    return None if found is None else found(x)


def _weight(base: nn.Module) -> Tensor:
    weight = tensor(base, "weight")
    return weight.T if type(base) is Conv1D else weight


def parts(layer: LoraLinear, name: str) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The modules A, B and dropout of an adapter."""
    modules: dict[str, Any] = layer._modules
    return modules["lora_A"]._modules[name], modules["lora_B"]._modules[name], modules["lora_dropout"]._modules[name]


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
    if is_wrapped(tensor(a, "weight")) or is_wrapped(tensor(b, "weight")):
        return f"adapter {name!r} holds a {type(tensor(a, 'weight')).__name__}"
    if type(layer.scaling[name]) not in (float, int):
        return f"adapter {name!r} has a {type(layer.scaling[name]).__name__} as its scale"
    if is_hooked(a) or is_hooked(b) or is_hooked(dropout):
        return f"adapter {name!r} has hooks or a replaced forward"
    return ""


def create_layer(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> nn.Module | None:
    """PEFT's custom-module factory: a `FusedLoraLinear`, or None to let PEFT's next dispatcher take the module."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    keep_form(base)
    if uncovered_base(base) or isinstance(target, BaseTunerLayer):
        return None
    layer = dispatch_default(target, adapter_name, config=config, **kwargs)
    if type(layer) is LoraLinear and not uncovered_adapter(layer, adapter_name):
        layer.__class__ = FusedLoraLinear
    return layer


allow_training(FusedLoraLinear)
