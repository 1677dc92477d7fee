"""What the tensors of a stored task are for: the factors of which layer, or a whole module of the task's own."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from petune.adapters.lora.layer import uncovered_adapter
from petune.adapters.onebit import BiLoraLayer
from petune.adapters.onebit.layer import with_zero_rows
from petune.kernels.grouped_lora import PackedFactors
from petune.kernels.packed_lora import unpacked
from petune.low_rank import class_name
from petune.quantized.linear import PackedLinear, QuantizedLinear
from petune.quantized.packing import Entry, decode
from petune.quantized.slots import check_shape, packed_names, plain_tensors
from petune.quantized.tuner import QuantizedConfig, quantized_weights
from petune.state import active_adapter, peft_config

_ROOT = "base_model.model."  # of every name in a PeftModel
_OWN = "modules_to_save"  # what PEFT calls a task's own copy of a module


@dataclass(frozen=True)
class Update:
    """The low-rank update of one layer by one task."""

    scale: float
    """Dimensionless."""
    codes: PackedFactors | None
    """For `grouped_packed_lora`; None where the factors are float, or leave rows of B out."""
    a: "Tensor | Codes"
    b: "Tensor | Codes"
    """With the rows of `parts` alone, where there are any."""
    parts: tuple[tuple[int, int], ...]
    """Rows [start, stop) of the output that are updated; () for all."""
    out_features: int

    def dense(self) -> tuple[Tensor, Tensor]:
        """A, [rank, in_features], and B, [out_features, rank]."""
        a, b = (factor if isinstance(factor, Tensor) else factor.dense() for factor in (self.a, self.b))
        return a, with_zero_rows(b, self.parts, self.out_features)


class Codes(NamedTuple):
    """A packed weight, as `petune.kernels.packed_lora.unpacked` takes it."""

    bits: Tensor
    levels: Tensor
    shape: tuple[int, int]
    width: int
    """Bits a code."""

    def dense(self) -> Tensor:
        """The weight, [rows, columns], float32."""
        return unpacked(*self)


class Active(NamedTuple):
    """A task in the form in which layers use it: views of its resident tensors."""

    updates: dict[str, Update]
    """By the name of the layer."""
    modules: dict[str, dict[str, Tensor]]
    """By the name of a module that the task has whole: its parameters and buffers."""


class _Layer(NamedTuple):
    path: str
    a: int | str
    """Which of the packed weights it is, or its name in a checkpoint."""
    b: int | str
    scale: float
    parts: tuple[tuple[int, int], ...]
    out_features: int


class _Module(NamedTuple):
    path: str
    tensors: dict[str, int | str]
    """As `_Layer.a`, by their names in the module."""
    dtype: torch.dtype
    """Of the base's own."""
    zero_bias: bool
    """Whether the base's module has a bias, and the task's none."""


@dataclass(frozen=True)
class Layout:
    """Where everything of a task lies; tasks of one config share it."""

    entries: tuple[Entry, ...]
    """The packed weights, in the order of their codes."""
    packed: tuple[str, str]
    """What their codes and their statistics are called in a checkpoint."""
    shapes: dict[str, torch.Size]
    """Of the tensors that are stored as they are, by their names in a checkpoint."""
    layers: tuple[_Layer, ...]
    modules: tuple[_Module, ...]

    @classmethod
    def of(cls, model: PeftModel, where: str) -> "Layout":
        """The layout of the adapter that a model carries.

        Args:
            model: with a Bi-LoRA that `TaskStore.attach` has put on it, or with a LoRA.
            where: what holds the adapter, for messages.

        Raises:
            ValueError: the adapter is more than low-rank updates and whole modules.
        """
        adapter = active_adapter(model)
        weights = quantized_weights(model, adapter)
        places: dict[str, int | str] = {f"{path}.weight": index for index, (_, path) in enumerate(weights)}
        plain = plain_tensors(model, adapter, weights)
        places |= {path: key for key, path in plain.items()}
        layers = tuple(
            _layer(path, layer, adapter, places, where)
            for path, layer in model.named_modules()
            if isinstance(layer, BaseTunerLayer)
        )
        modules = _modules(model, adapter, places)
        used = {place for layer in layers for place in (layer.a, layer.b)}
        used |= {place for module in modules for place in module.tensors.values()}
        assert not plain.keys() - used, "an update has factors, and modules are whole"
        state = model.state_dict()
        shapes = {key: state[path].shape for key, path in plain.items()}
        config = peft_config(model)
        packed = packed_names(config) if isinstance(config, QuantizedConfig) else ("", "")
        return cls(tuple(entry for entry, _ in weights), packed, shapes, layers, modules)

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Whether a checkpoint is of this layout.

        Raises:
            ValueError: it lacks tensors, has others, or some of another size.
        """
        wanted = {*self.shapes, *(self.packed if self.entries else ())}
        if different := sorted(tensors.keys() ^ wanted):
            what = "has" if different[0] in tensors else "lacks"
            raise ValueError(f"it {what} {different[0]}, unlike an adapter of its config on this base; save it again.")
        heads = {key for module in self.modules for key in module.tensors.values()}
        for key, shape in self.shapes.items():
            check_shape(key, tensors[key].shape, shape, is_head=key in heads)
        if self.entries:
            decode(self.entries, *(tensors[name] for name in self.packed))

    def activate(self, tensors: Mapping[str, Tensor]) -> Active:
        """Views of a resident task's tensors, and the levels of its codes, computed for all layers at once."""
        codes = self._codes(tensors)
        updates: dict[str, Update] = {}
        for path, *places, scale, parts, out_features in self.layers:
            a, b = (tensors[place] if isinstance(place, str) else codes[place] for place in places)
            packed = None
            if isinstance(a, Codes) and isinstance(b, Codes) and not parts:
                packed = PackedFactors(a.bits, a.levels, b.bits, b.levels, a.shape[0], a.width, scale)
            updates[path] = Update(scale, packed, a, b, parts, out_features)
        return Active(updates, {module.path: _own(module, tensors, codes) for module in self.modules})

    @cached_property
    def _splits(self) -> tuple[list[int], list[int]]:
        """Bytes, and rows of the table of statistics, of each packed weight."""
        return [entry.size for entry in self.entries], [entry.rows for entry in self.entries]

    def _codes(self, tensors: Mapping[str, Tensor]) -> list[Codes]:
        if not self.entries:
            return []
        blob, table = (tensors[name] for name in self.packed)
        quantization = self.entries[0].quantization  # of all of them: a config has one
        sizes, rows = self._splits
        codes, levels = blob.split(sizes), quantization.levels(table.reshape(-1, 2)).split(rows)
        return [
            Codes(bits, level, (entry.shape[0], entry.shape[1]), quantization.bits)
            for entry, bits, level in zip(self.entries, codes, levels, strict=True)
        ]


def _layer(path: str, layer: BaseTunerLayer, adapter: str, places: Mapping[str, int | str], where: str) -> _Layer:
    name = path.removeprefix(_ROOT)
    if isinstance(layer, BiLoraLayer):
        a, b = (places[f"{path}.petune_bilora_{factor}.{adapter}.weight"] for factor in "ab")
        return _Layer(name, a, b, layer.scale[adapter], layer.parts[adapter], layer.out_features)
    lora: Any = layer
    fault = uncovered_adapter(layer, adapter) if isinstance(layer, LoraLinear) else f"it is {class_name(lora)}"
    if fault:
        raise ValueError(
            f"{where}: {name} has more than a LoRA of two matrices ({fault}); serve the adapter on a base of its own."
        )
    a, b = (places[f"{path}.lora_{factor}.{adapter}.weight"] for factor in "AB")
    return _Layer(name, a, b, lora.scaling[adapter], (), lora.out_features)


def _modules(model: PeftModel, adapter: str, places: Mapping[str, int | str]) -> tuple[_Module, ...]:
    """The modules that the task has whole; a quantised head is one."""
    found: dict[str, dict[str, int | str]] = {}
    middle = f".{_OWN}.{adapter}."
    for path, place in places.items():
        if middle in path:
            owner, _, name = path.partition(middle)
            found.setdefault(owner, {})[name] = place
    modules: list[_Module] = []
    for path, tensors in found.items():
        wrapper: Any = model.get_submodule(path)
        original: nn.Module = wrapper.original_module
        quantised = isinstance(wrapper.modules_to_save[adapter], QuantizedLinear | PackedLinear)
        zero_bias = quantised and original._parameters.get("bias") is not None
        dtype = next(original.parameters()).dtype
        modules.append(_Module(path.removeprefix(_ROOT), tensors, dtype, zero_bias))
    return tuple(modules)


def _own(module: _Module, tensors: Mapping[str, Tensor], codes: list[Codes]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, place in module.tensors.items():
        tensor = tensors[place] if isinstance(place, str) else codes[place].dense()
        found[name] = tensor.to(module.dtype) if tensor.is_floating_point() else tensor
    if module.zero_bias:
        found["bias"] = found["weight"].new_zeros(len(found["weight"]))
    return found
