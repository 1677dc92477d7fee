"""What layers with a low-rank update share: when the fused operator may stand for a call, and `LowRankLayer`."""

import math
from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.pytorch_utils import Conv1D

from petune.kernels.lora_linear import lora_linear
from petune.layer import PetuneLayer

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Factors(NamedTuple):
    """One update scale · B A."""

    a: Tensor
    """Down projection A, [rank, in_features]."""
    b: Tensor
    """Up projection B, [out_features, rank]."""
    scale: float
    dropout_p: float = 0.0
    """Of an element of x on its way to A."""
    rank_dropout_p: float = 0.0
    """Of an element of x Aᵀ on its way to B."""


class Operands(NamedTuple):
    """What a call of `petune.kernels.lora_linear.lora_linear` needs besides x, in its order, and what is dropped."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: float
    dropout_p: float
    """Of an element of x on its way to A."""
    rank_dropout_p: float = 0.0
    """Of an element of x Aᵀ on its way to B: never in LoRA. The caller draws the mask."""


class LowRankLayer(PetuneLayer):
    """y = x Wᵀ + bias + Σ scale · drop(drop(x) Aᵀ) Bᵀ, by `petune.kernels.lora_linear` where it covers the call

    A method gives `factors`.
    """

    @abstractmethod
    def factors(self, name: str) -> Factors:
        """The update of adapter `name`, its dropout 0 outside of training."""

    def delta(self, name: str, x: Tensor) -> Tensor:
        a, b, scale, dropout_p, rank_dropout_p = self.factors(name)
        s = F.linear(F.dropout(x, dropout_p), a.to(x.dtype))
        return F.linear(F.dropout(s, rank_dropout_p), b.to(x.dtype)) * scale

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        if adapter_names is None and not args and not kwargs:
            live = self.live_adapters()
            if len(live) == 1 and self._is_covered(x):
                return self._fused(live[0], x)
        return super().forward(x, *args, adapter_names=adapter_names, **kwargs)

    @torch.no_grad()
    def get_delta_weight(self, name: str) -> Tensor:
        """ΔW = scale · B A of adapter `name`, [out_features, in_features], float32."""
        a, b, scale, *_ = self.factors(name)
        return (b.float() @ a.float()) * scale

    def _base(self) -> tuple[Tensor, Tensor | None]:
        """W, [out_features, in_features], and the bias."""
        weight = tensor(self.base_layer, "weight")
        return weight.T if self.transposed else weight, tensor(self.base_layer, "bias")

    def _fused(self, name: str, x: Tensor) -> Tensor:
        a, b, scale, dropout_p, rank_dropout_p = self.factors(name)
        mask = rank_mask(x, len(a), rank_dropout_p) if rank_dropout_p > 0.0 else None
        return lora_linear(x, *self._base(), a, b, scale, dropout_p, mask)

    def _is_covered(self, x: Tensor) -> bool:
        if _has_any_global_hook() or uncovered_base(self.base_layer) or x.shape[-1] != self.in_features:
            return False
        return takes(x, tensor(self.base_layer, "weight"), self.cast_input_dtype_enabled)


def lora_factors(
    in_features: int, out_features: int, rank: int, *, identity: bool
) -> tuple[nn.Parameter, nn.Parameter]:
    """A [rank, in_features] and B [out_features, rank] as PEFT's LoRA starts them; B = 0, the identity, or random."""
    a, b = torch.empty(rank, in_features), torch.zeros(out_features, rank)
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    if not identity:
        nn.init.normal_(b, 0.0, 0.3)
    return nn.Parameter(a), nn.Parameter(b)


def rank_mask(x: Tensor, rank: int, dropout_p: float) -> Tensor:
    """A dropout mask for x Aᵀ: 0 or 1 / (1 − dropout_p), [tokens, rank], in the dtype of x."""
    return F.dropout(x.new_ones(x.numel() // x.shape[-1], rank), dropout_p)


def takes(x: Tensor, weight: Tensor, casts_input: bool) -> bool:
    """Whether the operator reads x as it is; the unfused forward has the error messages for the rest.

    Args:
        casts_input: the layer's `cast_input_dtype_enabled`.
    """
    if type(x) is not Tensor and is_traceable_wrapper_subclass(x):
        return False
    if x.dtype == weight.dtype and casts_input:
        return True
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def uncovered_base(base: nn.Module) -> str:
    """Why the operator cannot stand for this base layer, or "" if it can."""
    if type(base) is not nn.Linear and type(base) is not Conv1D:
        return f"the base layer is {class_name(base)}"
    weight = tensor(base, "weight")
    if weight.dtype not in _DTYPES or is_wrapped(weight):
        return f"the base weight is a {type(weight).__name__} of {weight.dtype}"
    if base.__dict__.get("_hf_tp_plan") is not None:
        return "the base layer is tensor parallel"
    if is_hooked(base):
        return "the base layer has hooks or a replaced forward"
    return ""


def tensor(module: nn.Module, name: str) -> Any:
    """`module.weight` and the like, from where it usually is."""
    # FSDP1 and DataParallel put a tensor in the place of the parameter
    return module._parameters[name] if name in module._parameters else getattr(module, name)


def is_hooked(module: nn.Module, *, but_before: bool = False) -> bool:
    """Whether calling the module is more, or something else, than its class's forward.

    Args:
        module: any.
        but_before: leave out hooks that run before it.
    """
    state = module.__dict__
    return bool(
        "forward" in state
        or (state["_forward_pre_hooks"] and not but_before)
        or state["_forward_hooks"]
        or state["_backward_pre_hooks"]
        or state["_backward_hooks"]
        or state.get("_compiled_call_impl")
    )


def is_wrapped(weight: Tensor) -> bool:
    """Whether the weight is a distributed, quantised or other tensor that only looks like a plain one."""
    return type(weight) is not nn.Parameter and is_traceable_wrapper_subclass(weight)


def class_name(module: nn.Module) -> str:
    """peft's Embedding, torch's Linear, …"""
    return f"{type(module).__module__.split('.')[0]}'s {type(module).__name__}"
