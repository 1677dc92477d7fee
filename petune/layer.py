"""PetuneLayer: a frozen linear map and the adapters that live on it; AdapterLayer: what it shares with PetuneBlock."""

import warnings
from abc import abstractmethod
from collections.abc import Callable
from itertools import chain
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from petune.config import PetuneConfig

BASE = "__base__"  # PEFT's name, in `adapter_names`, for a row that takes no adapter


class AdapterLayer(nn.Module, BaseTunerLayer):
    """A frozen module and the adapters that live on it: the bookkeeping that PEFT and the tuner ask for.

    A method subclasses `PetuneLayer`, which wraps a linear map, or `petune.block_layer.PetuneBlock`, which wraps any
    module from hidden states to hidden states, with three things: the containers of its parameters, keyed by adapter
    name and listed in `adapter_layer_names` (trained) or `other_param_names` (not trained); `create`, which fills
    them; and `delta`. One that is not additive (a mask, a routed block) overrides `forward` and starts from
    `live_adapters`.
    """

    supports_mixed_batch = True
    """Whether rows of one batch can take different adapters; needs a delta that looks at each row alone."""

    delta: ClassVar[Callable[..., Tensor]]
    """delta(self, name, *inputs): what adapter `name` adds to the output, of inputs in the dtype of its parameters."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.cast_input_dtype_enabled = True  # `peft.helpers.disable_input_dtype_casting` looks for it
        self.quantization_backend: QuantizationBackend | None = None  # set by the tuner, which knows the model

    @abstractmethod
    def create(self, name: str, config: PetuneConfig) -> None:
        """Fill the containers for a new adapter. Runs on the meta device when a checkpoint is about to be loaded."""

    def update_layer(self, name: str, config: PetuneConfig) -> None:
        """Add adapter `name`, on the base layer's device, in its train or eval mode and, until PEFT casts it, its
        dtype."""
        self.create(name, config)
        self.training = self.base_layer.training
        for child in self.children():
            if child is not self.base_layer:
                child.train(self.training)
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

    def _with_updates(self, y: Tensor, live: list[str], *inputs: Tensor) -> Tensor:
        """y + Σ delta(name, *inputs) over the live adapters, in the dtype of y."""
        dtype = y.dtype
        for name in live:
            y = y + self.delta(name, *(self._adapter_input(name, x) for x in inputs))
        return y.to(dtype)

    def _check_rows(self, x: Tensor, adapter_names: list[str]) -> None:
        if len(x) != len(adapter_names):
            raise ValueError(f"adapter_names has {len(adapter_names)} entries for a batch of {len(x)} rows.")
        if self.merged:
            raise ValueError("adapter_names needs adapters that are not merged; call unmerge_adapter() first.")

    def _with_row_updates(self, y: Tensor, adapter_names: list[str], *inputs: Tensor) -> Tensor:
        """Row i of the batch takes adapter_names[i]; `__base__` takes none."""
        if self.disable_adapters:
            return y
        for name in sorted(set(adapter_names) & self._get_available_adapters()):
            rows = torch.tensor([i for i, row in enumerate(adapter_names) if row == name], device=y.device)
            update = self.delta(name, *(self._adapter_input(name, x[rows]) for x in inputs))
            y = y.index_add(0, rows, update.to(y.dtype))
        return y

    def _adapter_input(self, name: str, x: Tensor) -> Tensor:
        for attribute in self.adapter_layer_names:
            container = getattr(self, attribute)
            if name in container:
                entry = container[name]
                tensors = [entry] if isinstance(entry, Tensor) else chain(entry.parameters(), entry.buffers())
                # of packed weights, whose codes are integers, the statistics
                return self._cast_input_dtype(x, next(one.dtype for one in tensors if one.is_floating_point()))
        return x

    def get_delta_weight(self, name: str) -> Tensor:
        """ΔW of adapter `name`, [out_features, in_features], in the dtype of its parameters.

        Raises:
            NotImplementedError: the update is not a weight.
        """
        raise NotImplementedError(
            f"{type(self).__name__}: the update of adapter {name!r} is no weight, so it cannot be merged; "
            "use unload() for the base model, or keep the adapter."
        )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises NotImplementedError, from `get_delta_weight`: only a linear map has a weight to merge into."""
        for name in check_adapters_to_merge(self, adapter_names):
            self.get_delta_weight(name)

    def unmerge(self) -> None:
        """Warn that there is nothing to do."""
        warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)

    def __repr__(self) -> str:
        return "petune." + super().__repr__()


class PetuneLayer(AdapterLayer):
    """y = base(x) + Σ_name delta(name, x), on a Linear or a Conv1D

    A method whose update is a weight, ΔW, gives `get_delta_weight` beside `create` and `delta`, and is merged from
    there.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        innermost = self.get_base_layer()
        self.transposed = isinstance(innermost, Conv1D)  # GPT-2 keeps its weights as [in_features, out_features]
        self.in_features, self.out_features = linear_shape(innermost)

    @abstractmethod
    def delta(self, name: str, x: Tensor) -> Tensor:
        """What adapter `name` adds to the output: [..., in_features] to [..., out_features]."""

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        if adapter_names is not None:
            self._check_rows(x, adapter_names)
            return self._with_row_updates(self.base_layer(x, *args, **kwargs), adapter_names, x)
        live = self.live_adapters()  # before the base layer runs: it may unmerge
        return self._with_updates(self.base_layer(x, *args, **kwargs), live, x)

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
            super().unmerge()
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
        return type(self).get_delta_weight is not AdapterLayer.get_delta_weight


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
