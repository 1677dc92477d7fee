"""PetuneLayer: a frozen linear map and the adapters that live on it."""

import warnings
from abc import abstractmethod
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from petune.config import PetuneConfig

BASE = "__base__"  # PEFT's name, in `adapter_names`, for a row that takes no adapter


class PetuneLayer(nn.Module, BaseTunerLayer):
    """y = base(x) + Σ_name delta(name, x)

    A method subclasses this with three things: the containers of its parameters, keyed by adapter name and listed in
    `adapter_layer_names` (trained) or `other_param_names` (not trained); `create`, which fills them; and `delta`. One
    whose update is a weight, ΔW, gives `get_delta_weight` as well and is merged from there. One that is not additive
    (a mask, a routed block) overrides `forward` and starts from `live_adapters`.
    """

    supports_mixed_batch = True
    """Whether rows of one batch can take different adapters; needs a delta that looks at each row alone."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.cast_input_dtype_enabled = True  # `peft.helpers.disable_input_dtype_casting` looks for it
        innermost = self.get_base_layer()
        self.quantization_backend: QuantizationBackend | None = None  # set by the tuner, which knows the model
        self.transposed = isinstance(innermost, Conv1D)  # GPT-2 keeps its weights as [in_features, out_features]
        self.in_features, self.out_features = linear_shape(innermost)

    # ------------------------------------------------------------------------------------------- what a method gives

    @abstractmethod
    def create(self, name: str, config: PetuneConfig) -> None:
        """Fill the containers for a new adapter. Runs on the meta device when a checkpoint is about to be loaded."""

    @abstractmethod
    def delta(self, name: str, x: Tensor) -> Tensor:
        """What adapter `name` adds to the output: [..., in_features] to [..., out_features]."""

    def get_delta_weight(self, name: str) -> Tensor:
        """ΔW of adapter `name`, [out_features, in_features], in the dtype of its parameters.

        Raises:
            NotImplementedError: the update is not a weight.
        """
        raise NotImplementedError(
            f"{type(self).__name__}: the update of adapter {name!r} is no weight, so it cannot be merged; "
            "use unload() for the base model, or keep the adapter."
        )

    # -------------------------------------------------------------------------------------------------- shared by all

    def update_layer(self, name: str, config: PetuneConfig) -> None:
        """Add adapter `name`, on the base layer's device and, until PEFT casts it, in its dtype."""
        self.create(name, config)
        self._move_adapter_to_device_of_base_layer(name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def live_adapters(self) -> list[str]:
        """The adapters whose delta the forward adds: [] when disabled or merged. Unmerges if disabled while merged."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return []
        if self.merged:
            return []
        present = self._get_available_adapters()
        return [name for name in self.active_adapters if name in present]

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        if adapter_names is not None:
            return self._mixed_forward(x, adapter_names, *args, **kwargs)
        live = self.live_adapters()  # before the base layer runs: it may unmerge
        y = self.base_layer(x, *args, **kwargs)
        dtype = y.dtype
        for name in live:
            y = y + self.delta(name, self._adapter_input(name, x))
        return y.to(dtype)

    def _mixed_forward(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """Row i of the batch takes adapter_names[i]; `__base__` takes none."""
        if len(x) != len(adapter_names):
            raise ValueError(f"adapter_names has {len(adapter_names)} entries for a batch of {len(x)} rows.")
        if self.merged:
            raise ValueError("adapter_names needs adapters that are not merged; call unmerge_adapter() first.")
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return y
        for name in sorted(set(adapter_names) & self._get_available_adapters()):
            rows = torch.tensor([i for i, row in enumerate(adapter_names) if row == name], device=x.device)
            update = self.delta(name, self._adapter_input(name, x[rows]))
            y = y.index_add(0, rows, update.to(y.dtype))
        return y

    def _adapter_input(self, name: str, x: Tensor) -> Tensor:
        for attribute in self.adapter_layer_names:
            container = getattr(self, attribute)
            if name in container:
                entry = container[name]
                parameter = entry if isinstance(entry, Tensor) else next(entry.parameters())
                return self._cast_input_dtype(x, parameter.dtype)
        return x

    # --------------------------------------------------------------------------------------------------------- merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """W ← W + ΔW for each adapter, in float32 where the weight has fewer bits.

        Args:
            safe_merge: refuse, before the weight is touched, a sum that is not finite.
            adapter_names: None for the active ones.

        Raises:
            ValueError: safe_merge found NaN or infinity.
            NotImplementedError: the method's update is no weight.
            TypeError: the base weight is quantised in a way that PEFT cannot write.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self._get_available_adapters():
                continue
            merged = self._shifted_weight(name, sign=1)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            self.set_base_weight(merged)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """W ← W − ΔW, last merged first; the weight comes back to within a rounding of its dtype."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            self.set_base_weight(self._shifted_weight(self.merged_adapters.pop(), sign=-1))

    def _shifted_weight(self, name: str, sign: int) -> Tensor:
        weight = self.get_base_weight()
        if not weight.is_floating_point():
            raise TypeError(
                f"adapter {name!r} cannot be merged into a {type(self.get_base_layer()).__name__} of {weight.dtype}, "
                "which PEFT has no quantization backend for; load the base without quantisation, or keep the adapter."
            )
        delta = self.get_delta_weight(name).to(weight.device)
        if self.transposed:
            delta = delta.T
        wide = torch.promote_types(weight.dtype, torch.float32)
        return (weight.to(wide) + sign * delta.to(wide)).to(weight.dtype).contiguous()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `peft.convert_to_lora` can take ΔW: it can for every method that has one."""
        return type(self).get_delta_weight is not PetuneLayer.get_delta_weight

    def __repr__(self) -> str:
        return "petune." + super().__repr__()


def linear_shape(layer: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a Linear, a Conv1D, or a quantised linear of any backend.

    Raises:
        TypeError: the layer is none of them.
    """
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    in_features, out_features = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    if not (isinstance(in_features, int) and isinstance(out_features, int)):
        raise TypeError(f"a {type(layer).__name__} is no linear layer; PETune's layers wrap Linear and Conv1D.")
    return in_features, out_features
