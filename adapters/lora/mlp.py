"""Gated MLPs, down(activation(gate(x)) * up(x)), whose product is made inside the operator of the down projection."""

import copyreg
from functools import cache, partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook
from transformers.activations import GELUActivation, GELUTanh, SiLUActivation

from petune.adapters.lora.layer import FusedLoraLinear
from petune.adapters.lora.source import GatedForm, gated_form
from petune.kernels.gated_lora import gated, gated_lora
from petune.low_rank import class_name, is_hooked

_GELU = {"none": "gelu", "tanh": "gelu_tanh"}


class FusedGatedMlp(nn.Module):
    """Stands before the class of an MLP: its forward, but what is kept for backward is gate(x) and up(x) alone.

    Where anything is not as the operators need it, and under `torch.compile`, the forward of that class runs.
    """

    original: ClassVar[type[nn.Module]]
    form: ClassVar[GatedForm]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or _is_observed() or uncovered_mlp(self, self.form):
            return super().forward(*args, **kwargs)
        modules: dict[str, Any] = self._modules
        gate, up = modules[self.form.gate](args[0]), modules[self.form.up](args[0])
        activation, down = modules[self.form.activation], modules[self.form.down]
        if type(gate) is not Tensor or type(up) is not Tensor or gate.shape != up.shape or gate.dtype != up.dtype:
            return down(activation(gate) * up)
        if type(down) is FusedLoraLinear and not is_hooked(down):
            operands = down.operands(gate)  # which has the shape and dtype of the product
            if operands is not None:
                return gated_lora(gate, up, activation_name(activation), *operands[:-1])
        return down(gated(gate, up, activation_name(activation)))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # this class is made at run time and has no address: a copy or a pickle names the class that it stands before
        make, (_, *args), *state = cast("tuple[Any, ...]", super().__reduce_ex__(max(protocol, 2)))
        assert make is copyreg.__newobj__  # pyright: ignore[reportAttributeAccessIssue]
        return (_new, (self.original, *args), *state)


@cache
def fused_class(original: type[nn.Module]) -> type[FusedGatedMlp] | None:
    """The subclass that runs an MLP's class fused, one for each class; None if its forward is not of the form."""
    form = gated_form(original)
    if form is None:
        return None
    body = {"original": original, "form": form, "__module__": __name__, "__doc__": original.__doc__}
    return cast("type[FusedGatedMlp]", type(f"Fused{original.__name__}", (FusedGatedMlp, original), body))


def uncovered_mlp(mlp: nn.Module, form: GatedForm) -> str:
    """Why the operators cannot stand for this MLP, or "" if they can."""
    modules = mlp._modules
    gate, up, down = modules.get(form.gate), modules.get(form.up), modules.get(form.down)
    activation = modules.get(form.activation)
    if gate is None or up is None or down is None or activation is None:
        return "its projections or its activation are no modules"
    if FusedLoraLinear not in (type(gate), type(up), type(down)):
        return "none of its projections is a fused LoRA layer"
    if not activation_name(activation):
        return f"its activation is {class_name(activation)}"
    if is_hooked(activation):
        return "its activation has hooks or a replaced forward"
    return ""


def activation_name(activation: nn.Module) -> str:
    """The operators' name of an activation, or "" if they do not know it."""
    kind = type(activation)
    if kind is nn.SiLU or kind is SiLUActivation:
        return "silu"
    if kind is nn.GELU:
        return _GELU.get(cast("nn.GELU", activation).approximate, "")
    act = activation.__dict__.get("act")
    if kind is GELUActivation and act is F.gelu:
        return "gelu"
    if kind is GELUTanh and isinstance(act, partial) and act.func is F.gelu and not act.args:
        return "gelu_tanh" if act.keywords == {"approximate": "tanh"} else ""
    return ""


def _is_observed() -> bool:
    """Whether something looks into every module or operator of this call and wants the plain ones."""
    transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return transformed or bool(_has_any_global_hook())


def _new(original: type[nn.Module], *args: Any) -> nn.Module:
    cls = fused_class(original) or original
    return cls.__new__(cls, *args)
