"""The bottleneck adapter with weights of a few bits: `BiAdapterLayer`, and `BiAdapterModel`, which places it."""

import copy
import math
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from petune.adapters.onebit.config import BiAdapterConfig
from petune.config import PetuneConfig
from petune.hooks import remove_hooks
from petune.layer import BASE, AdapterLayer, linear_shape
from petune.quantized.linear import PackedLinear, QuantizedLinear
from petune.quantized.tuner import PackedTuner
from petune.topology import common_parent, find_topology, resolve_targets

ROLES = {"adaptformer": ("ffn_out",), "pfeiffer": ("ffn_out",), "houlsby": ("attention_out", "ffn_out")}
"""Default targets of each placement."""
OUTPUT = "output"
"""What an adapter reads that stands behind the layer; otherwise it is the config's `adapter_input`."""


class BiAdapterLayer(AdapterLayer):
    """y = h + Σ scale · dropout(relu(x D̂ᵀ)) Ûᵀ, h the wrapped layer's output

    x is h itself (placements pfeiffer and houlsby), or what a module that runs earlier gets as its input: the residual
    stream, or the input of the feed-forward (adaptformer). `watch` names that module; its input is held from there to
    the end of this layer's forward. Where the model norms or scales the feed-forward's output before it joins the
    residual stream (Gemma-2, DINOv2, dropout in training) the update is normed and scaled with it.
    """

    adapter_layer_names = ("petune_biadapter_down", "petune_biadapter_up")
    other_param_names = ("scale", "dropout_p", "source")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.in_features, self.out_features = linear_shape(self.get_base_layer())
        self.petune_biadapter_down = nn.ModuleDict()
        self.petune_biadapter_up = nn.ModuleDict()
        self.scale: dict[str, float] = {}
        self.dropout_p: dict[str, float] = {}
        self.source: dict[str, str] = {}
        self._readers: dict[str, str] = {}
        self._handles: dict[str, RemovableHandle] = {}
        self._seen: dict[tuple[str, torch.device], Tensor] = {}  # by device: DataParallel's replicas share it

    def create(self, name: str, config: BiAdapterConfig) -> None:
        down = QuantizedLinear(self.out_features, config.r, config.quantization)
        up = QuantizedLinear(config.r, self.out_features, config.quantization)
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        config.start(up.weight)
        self.petune_biadapter_down[name], self.petune_biadapter_up[name] = down, up
        self.scale[name], self.dropout_p[name] = config.scale, config.dropout
        self.source[name] = config.adapter_input if config.placement == "adaptformer" else OUTPUT

    def delta(self, name: str, x: Tensor) -> Tensor:
        s = F.relu(self.petune_biadapter_down[name](x))
        s = F.dropout(s, self.dropout_p[name], self.training)
        return self.petune_biadapter_up[name](s) * self.scale[name]

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        seen = {source: self._seen.pop((source, x.device), None) for source in self._handles}
        if adapter_names is not None:
            self._check_rows(x, adapter_names)
            live = [] if self.disable_adapters else sorted(set(adapter_names) & self._get_available_adapters())
        else:
            live = self.live_adapters()
        y = h = self.base_layer(x, *args, **kwargs)
        for source in dict.fromkeys(self.source[name] for name in live):
            read = h if source == OUTPUT else self._checked(source, seen.get(source), h)
            names = [name for name in live if self.source[name] == source]
            if adapter_names is None:
                y = self._with_updates(y, names, read)
            else:
                y = self._with_row_updates(y, [row if row in names else BASE for row in adapter_names], read)
        return y

    def get_delta_weight(self, name: str) -> Tensor:
        """Raises NotImplementedError: the update is no linear map."""
        raise NotImplementedError(
            f"{type(self).__name__}: the update of adapter {name!r} contains a ReLU and cannot be merged; use "
            "unload() for the base model, or keep the adapter."
        )

    # --- what is read elsewhere ---

    def watch(self, source: str, name: str, reader: nn.Module, around: nn.Module) -> None:
        """Read what module `name` gets as its input.

        Args:
            source: "residual" or "ffn"; a second adapter that reads the same adds no second hook.
            reader: the module.
            around: the innermost module that holds both the reader and this layer.
        """
        if source not in self._handles:
            hook = Reader(self, source, around)
            self._handles[source] = reader.register_forward_pre_hook(hook, with_kwargs=True)
            self._readers[source] = name

    def see(self, source: str, x: Tensor) -> None:
        """Hold x until the layer runs."""
        if source in self.source.values() and not self.disable_adapters:
            self._seen[source, x.device] = x

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        for source in set(self._handles) - set(self.source.values()):
            self._handles.pop(source).remove()

    def _checked(self, source: str, x: Tensor | None, h: Tensor) -> Tensor:
        if x is not None and x.shape == h.shape:
            return x
        reader, got = self._readers.get(source), "nothing" if x is None else list(x.shape)
        raise RuntimeError(
            f"the adapter reads the input of {reader!r} for an output of shape {list(h.shape)}, but has seen {got} "
            "since it ran last, so that module does not run before it in the same forward; use another adapter_input, "
            "or placement='pfeiffer', which needs none."
        )

    def _adapter_input(self, name: str, x: Tensor) -> Tensor:
        down: Any = self.petune_biadapter_down[name]
        return self._cast_input_dtype(x, torch.float32 if isinstance(down, PackedLinear) else down.weight.dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": {}}  # a tensor with a graph behind it cannot be copied


class Reader:
    """Forward pre-hook that hands a module's input to a `BiAdapterLayer`, copies of the module included."""

    def __init__(self, layer: BiAdapterLayer, source: str, around: nn.Module) -> None:
        self.layer, self.source, self.around = layer, source, around

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.layer.see(self.source, args[0] if args else next(iter(kwargs.values())))

    def __deepcopy__(self, memo: dict[int, Any]) -> "Reader":
        # Of a copied model the hook serves the copied layer. A norm that is copied alone, as PEFT does for
        # modules_to_save, stands in for the original: it serves the layer there is, and must not copy it.
        layer, around = self.layer, self.around
        if id(around) in memo:
            layer, around = (copy.deepcopy(module, memo) for module in (layer, around))
        return Reader(layer, self.source, around)


class BiAdapterModel(PackedTuner):
    """Puts `BiAdapterLayer`s in, by default on the last linear of every feed-forward."""

    prefix = "petune_biadapter_"
    tuner_layer_cls = BiAdapterLayer

    _readers: dict[str, str]
    """Name of each target -> of the module whose input its adapter reads; filled before an adapter is added."""

    def _prepare_adapter_config(self, peft_config: PetuneConfig, model_config: dict[str, Any]) -> PetuneConfig:
        assert isinstance(peft_config, BiAdapterConfig)
        if peft_config.target_modules is None:
            names = resolve_targets(self.model, ROLES[peft_config.placement])
            peft_config.target_modules = set(self._in_layers(peft_config, names))  # pyright: ignore[reportAttributeAccessIssue]
        return peft_config

    def check_targets(self, config: PetuneConfig, model: nn.Module, targets: list[tuple[str, nn.Module]]) -> None:
        """Also refuses targets beside which nothing can be read."""
        assert isinstance(config, BiAdapterConfig)
        super().check_targets(config, model, targets)
        self._readers = {}
        if config.placement != "adaptformer":
            return
        known = _find_readers(config, model)
        for name, _ in targets:
            if name not in known:
                config.refuse(
                    "placement",
                    f"runs beside a feed-forward, but target {name!r} is the last linear of none; name such as "
                    f"{next(iter(known))!r}, or use 'pfeiffer', which stands behind any linear layer",
                )
            if not known[name]:
                other = "'ffn', or " if config.adapter_input == "residual" else ""
                config.refuse(
                    "adapter_input",
                    f"cannot be told for target {name!r}, whose block has several feed-forwards or no norm; "
                    f"use {other}placement='pfeiffer'",
                )
            self._readers[name] = known[name]

    def prepare_layer(self, layer: AdapterLayer, name: str, adapter_name: str, config: PetuneConfig) -> None:
        """Lets the layer watch the module whose input its adapter reads."""
        assert isinstance(layer, BiAdapterLayer)
        assert isinstance(config, BiAdapterConfig)
        super().prepare_layer(layer, name, adapter_name, config)
        if name not in self._readers:
            return
        path = self._readers[name]
        reader = self.model.get_submodule(path)
        if isinstance(reader, BaseTunerLayer):  # another method's, which may be unloaded before this one
            reader = reader.get_base_layer()
        layer.watch(config.adapter_input, path, reader, self.model.get_submodule(common_parent(name, path)))

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        # copies of a watched norm, in modules_to_save, are watched as well
        remove_hooks(self.model, lambda hook: isinstance(hook, Reader))
        return model


def _find_readers(config: BiAdapterConfig, model: nn.Module) -> dict[str, str]:
    """Last linear of every feed-forward -> the module whose input is what its adapter reads, "" if not to be told."""
    try:
        layout = find_topology(model).layout
    except ValueError as error:
        reason = str(error).removesuffix("; pass target_modules.")
        raise ValueError(
            f"{type(config).__name__}.placement='adaptformer' runs beside feed-forwards, but {reason}; "
            "use 'pfeiffer', which stands behind any linear layer."
        ) from None
    found: dict[str, str] = {}
    for block in layout:
        for last in block.ffn_out:
            firsts = [first for first in block.ffn_in if first.rpartition(".")[0] == last.rpartition(".")[0]]
            if not firsts and len(block.ffn_out) == 1:
                firsts = block.ffn_in
            found[last] = block.ffn_residual if config.adapter_input == "residual" else next(iter(firsts), "")
    return found
