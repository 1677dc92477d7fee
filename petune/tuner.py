"""PetuneTuner: finds the target modules, checks everything before the first one is replaced, then replaces them."""

import copy
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _ExcludedModule,
    _filter_state_dict_by_key_prefixes,
    _get_tuner_state_dict_key_prefixes,
)
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.quantization_utils import QuantizationBackend, resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from petune.block_layer import PetuneBlock
from petune.blocks import has_width
from petune.config import PetuneConfig
from petune.four_bits import keep_form
from petune.hooks import remove_hooks, share_of_step
from petune.layer import BASE, AdapterLayer
from petune.mixed_batch import bring_names, one_call
from petune.topology import closest_modules, find_topology, resolve_targets

# fields in which summed adapters may differ
_NOT_OF_THE_UPDATE = {
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "inference_mode"),
    *("base_model_name_or_path", "revision", "peft_version", "task_type"),
}
_SHAPE = ("model_type", "hidden_size", "num_hidden_layers")
HEAD_NAMES = frozenset({"classifier", "score", "qa_outputs", "lm_head"})  # what PEFT trains whole for a task_type


class PetuneTuner(BaseTuner):
    """Base of every method's tuner. A method sets the class attributes; most need no method of their own."""

    tuner_layer_cls: type[AdapterLayer]  # pyright: ignore[reportIncompatibleVariableOverride]
    """The layer that replaces a target."""
    target_module_mapping = {}  # noqa: RUF012  # PEFT's table by model_type; here the structure is asked instead
    default_roles: ClassVar[tuple[str, ...]] = ("attention_qv",)
    """Topology roles that target_modules=None stands for."""
    supported_modules: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, Conv1D)
    """What may be wrapped; `(nn.Module,)`, with `default_roles = ("blocks",)`, by a method of `PetuneBlock`s."""
    needs_float_base: ClassVar[bool] = False
    """Whether the method computes with the base weight itself, which a quantised layer does not have."""
    linear_in_parameters: ClassVar[bool] = False
    """Whether delta is linear in the parameters, so that a weighted sum of adapters is an adapter."""
    exact_merge: ClassVar[dict[str, Any]] = {}
    """Arguments with which `merge_and_unload` keeps what the model computes."""

    # --- before anything changes ---

    def _prepare_adapter_config(self, peft_config: PetuneConfig, model_config: dict[str, Any]) -> PetuneConfig:
        if peft_config.target_modules is None:
            names = resolve_targets(self.model, self.default_roles)
            peft_config.target_modules = set(self._in_layers(peft_config, names))  # pyright: ignore[reportAttributeAccessIssue]
        return peft_config

    def _prepare_model(self, peft_config: PetuneConfig, model: nn.Module) -> None:
        """Refuse what cannot work, with the model still untouched."""
        self._check_base(peft_config, model)
        if peft_config.target_modules == DUMMY_TARGET_MODULES:
            return
        targets = self._expand_targets(peft_config, model)
        for name, module in targets:
            self._check_target(name, module)
        _check_not_nested(targets)
        self.check_targets(peft_config, model, targets)
        keep_form(model)

    def check_targets(self, config: PetuneConfig, model: nn.Module, targets: list[tuple[str, nn.Module]]) -> None:
        """What only this method asks of its targets; raises ValueError with field, value, module and alternative."""

    def _check_base(self, config: PetuneConfig, model: nn.Module) -> None:
        if getattr(model, "_tp_size", None):
            raise ValueError(
                f"{type(config).__name__}: the model is sharded by tensor parallelism, which its layers do not "
                "follow; load it without tp_plan, or shard with FSDP."
            )
        shape = base_shape(model)
        if config.base_shape is not None and shape and config.base_shape != shape:
            raise ValueError(f"adapter was made for {_say(config.base_shape)}, this model has {_say(shape)}.")
        config.base_shape = shape or None

    def _expand_targets(self, config: PetuneConfig, model: nn.Module) -> list[tuple[str, nn.Module]]:
        modules = [(name, module) for name, module in model.named_modules() if not _inside_tuner_layer(model, name)]
        if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
            if issubclass(self.tuner_layer_cls, PetuneBlock):
                config.refuse("target_modules", "names linear layers, but the method adapts blocks; leave it out")
            skip = HEAD_NAMES | set(config.modules_to_save or ())
            names = [name for name, module in modules if self._supports(module) and not skip & set(name.split("."))]
            config.target_modules = set(self._in_layers(config, names))  # pyright: ignore[reportAttributeAccessIssue]
        found = [(name, module) for name, module in modules if name and self._matches(config, name)]
        if not found:
            raise self._no_match(config, model)
        return found

    def _matches(self, config: PetuneConfig, name: str) -> bool:
        found = self._check_target_module_exists(config, name)
        return bool(found) and not isinstance(found, _ExcludedModule)

    def _no_match(self, config: PetuneConfig, model: nn.Module) -> NoMatchingPeftModuleError:
        wanted = config.target_modules or ""
        near = closest_modules(model, wanted if isinstance(wanted, str) else sorted(wanted))
        hidden = [name for name, _ in model.named_modules() if _inside_tuner_layer(model, name)]
        found = next((name for name in hidden if self._matches(config, name)), None)
        inside = f"{found!r} lies inside an adapted module, so add this adapter before that one; " if found else ""
        return NoMatchingPeftModuleError(
            f"no module matched target_modules={wanted!r} in {type(model).__name__}"
            f"{_also(config, 'exclude_modules')}{_also(config, 'layers_to_transform')}; "
            f"{inside}similar names: {', '.join(near) or 'none'}."
        )

    def _check_target(self, name: str, module: nn.Module) -> None:
        base = _base(module)
        supported = " and ".join(cls.__name__ for cls in self.supported_modules)
        if not self._supports(base):
            raise ValueError(
                f"target {name!r} is a {type(base).__name__}; {type(self).__name__} supports {supported}: "
                "narrow target_modules to those."
            )
        if issubclass(self.tuner_layer_cls, PetuneBlock):
            self._check_block(name, base)
        if self.needs_float_base and self._quantization_backend(base) is not None:
            raise ValueError(
                f"target {name!r} is a quantised {type(base).__name__}; {type(self).__name__} computes with the float "
                "weight: load the base without quantisation, or use FusedLoraConfig."
            )

    def _check_block(self, name: str, block: nn.Module) -> None:
        if type(block).forward is nn.Module.forward or not has_width(block):
            raise ValueError(
                f"target {name!r} is a {type(block).__name__}, which does not map hidden states to hidden states; "
                "narrow target_modules to the blocks."
            )
        inner = next((path for path, m in block.named_modules() if isinstance(m, self.tuner_layer_cls)), None)
        if inner is not None:
            raise ValueError(
                f"target {name!r} has an adapter of the same method inside, on {inner!r}, which unload() would leave "
                "there; delete that adapter, or narrow target_modules."
            )

    def _supports(self, module: nn.Module) -> bool:
        if isinstance(_base(module), self.supported_modules):
            return True
        backend = self._quantization_backend(module)  # GPTQ's and others' linear layers are no nn.Linear
        return backend is not None and backend.layer_type == "linear" and nn.Linear in self.supported_modules

    def _quantization_backend(self, module: nn.Module) -> QuantizationBackend | None:
        """PEFT's access to a quantised weight; None for a float one."""
        config = getattr(getattr(self.model, "hf_quantizer", None), "quantization_config", None)
        requantise = getattr(config, "get_apply_tensor_subclass", None)  # torchao's way to quantise a merged weight
        return resolve_quantization_backend(_base(module), get_apply_tensor_subclass=requantise)

    def _in_layers(self, config: PetuneConfig, names: list[str]) -> list[str]:
        """The names inside the blocks of `layers_to_transform`; PEFT applies that field to name endings only."""
        chosen = config.layers_to_transform
        if chosen is None:
            return names
        chosen = [chosen] if isinstance(chosen, int) else chosen
        blocks = find_topology(self.model).blocks
        outside = [index for index in chosen if not 0 <= index < len(blocks)]
        if outside:
            config.refuse("layers_to_transform", f"names block {outside[0]}, but the model has 0..{len(blocks) - 1}")
        roots = tuple(f"{blocks[index]}." for index in chosen)
        return [name for name in names if f"{name}.".startswith(roots)]

    # --- injection ---

    def _create_and_replace(
        self,
        peft_config: PetuneConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        if isinstance(target, self.tuner_layer_cls):
            layer = target
        else:
            layer = self.make_layer(target, current_key)
            layer.quantization_backend = self._quantization_backend(target)
        self.prepare_layer(layer, current_key, adapter_name, peft_config)
        layer.update_layer(adapter_name, peft_config)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def make_layer(self, target: nn.Module, name: str) -> AdapterLayer:
        """The layer that takes the place of `target`, the module `name` of the model, without an adapter yet."""
        return self.tuner_layer_cls(target)  # `target` may be another method's layer: it is wrapped as it stands

    def prepare_layer(self, layer: AdapterLayer, name: str, adapter_name: str, config: PetuneConfig) -> None:
        """What only this method does with `layer`, module `name` of the model, before an adapter is added to it."""

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if hasattr(new_module, "base_layer"):
            super()._replace_module(parent, child_name, new_module, child)
        else:  # unloading: PEFT would ask a trained head for its `weight`, which RoBERTa's has not (peft 0.21.2)
            setattr(parent, child_name, new_module)

    # --- training ---

    def auxiliary_loss(self) -> Tensor | None:
        """What the active adapters want added to the task's loss, after a forward in training; None for nothing.

        It is added to `output.loss`; who computes a loss of his own adds it himself.
        """
        return None

    def sharding_conflict(self) -> str | None:
        """Why FSDP2 cannot run the model as it is: a clause for a message; None where it can."""

    def before_forward(self) -> None:
        """Runs before each forward of the model, of a method that has an auxiliary loss."""

    def _post_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        # PeftModel without a task_type, and transformers' add_adapter, call the base model and not this module
        if type(self).auxiliary_loss is not PetuneTuner.auxiliary_loss:
            model.register_forward_pre_hook(self._before)
            model.register_forward_hook(self._after, with_kwargs=True)

    def _before(self, _: nn.Module, __: Any) -> None:
        self.before_forward()

    def _after(self, model: nn.Module, _: Any, kwargs: dict[str, Any], output: Any) -> None:
        if model.training and getattr(output, "loss", None) is not None:
            extra = self.auxiliary_loss()
            if extra is not None:
                output.loss = output.loss + extra * share_of_step(model, kwargs)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        unloaded = super()._unload_and_optionally_merge(*args, **kwargs)
        remove_hooks(self.model, lambda hook: getattr(hook, "__self__", None) is self)
        return unloaded

    # --- mixed batches ---

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Generator[None]:
        """Hand `adapter_names` to every layer for one forward or generate call. PEFT looks for this by name."""
        rows: list[str] | None = kwargs.pop("adapter_names", None)
        if rows is None:
            yield
            return
        self._check_adapter_names(rows)
        beams = kwargs.get("num_beams") or 1
        kinds = AdapterLayer, AuxiliaryTrainingWrapper
        handles = bring_names(self, [name for name in rows for _ in range(beams)], kinds)
        encoder = self.model.get_encoder() if beams > 1 and hasattr(self.model, "get_encoder") else None
        if isinstance(encoder, nn.Module) and encoder is not self.model:
            # beams are spread after the encoder has run; the later hook wins
            handles += bring_names(encoder, rows, kinds)
        try:
            with one_call():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_adapter_names(self, rows: list[str]) -> None:
        if not self.tuner_layer_cls.supports_mixed_batch:
            raise ValueError(
                f"{type(self).__name__}: adapter_names is not supported, because the method looks at the whole batch; "
                "call the model once per adapter with set_adapter()."
            )
        if self.training and not hasattr(self.tuner_layer_cls, "operands"):  # grouped layers train mixed batches
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        unknown = set(rows) - set(self.peft_config) - {BASE}
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")

    # --- weighted adapters ---

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        """Add the adapter Σ wᵢ · adapterᵢ.

        Raises:
            NotImplementedError: the method's update is not linear in its parameters.
            ValueError: unknown or taken names, lists of different length, or adapters of different config.
        """
        if not self.linear_in_parameters:
            raise NotImplementedError(
                f"{type(self).__name__}: a weighted sum of adapters is not an adapter of this method; activate "
                "several with base_model.set_adapter([...]), or merge them in turn with merge_adapter([...])."
            )
        self._check_weighted(adapters, weights, adapter_name)
        config = copy.deepcopy(self.peft_config[adapters[0]])
        names = set[str]().union(*(self._targets_of(name) for name in adapters))
        config.target_modules = names  # pyright: ignore[reportAttributeAccessIssue]
        self.peft_config[adapter_name] = config
        self.inject_adapter(self.model, adapter_name)
        parts = [self._entries(name) for name in adapters]
        with torch.no_grad():
            for key, total in self._entries(adapter_name).items():
                total.zero_()
                for weight, part in zip(weights, parts, strict=True):
                    if key in part:  # an adapter with other targets adds nothing here
                        total.add_(part[key], alpha=weight)

    def _check_weighted(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        if len(adapters) != len(weights) or not adapters:
            raise ValueError(f"add_weighted_adapter: {len(adapters)} adapters, but {len(weights)} weights.")
        unknown = [name for name in adapters if name not in self.peft_config]
        if unknown:
            raise ValueError(f"add_weighted_adapter: no adapter {unknown[0]!r}; there are {sorted(self.peft_config)}.")
        if adapter_name in self.peft_config:
            raise ValueError(f"add_weighted_adapter: {adapter_name!r} exists; delete it first or choose another name.")
        configs = [self.peft_config[name].to_dict() for name in adapters]
        for field in sorted(configs[0].keys() - _NOT_OF_THE_UPDATE):
            if any(config[field] != configs[0][field] for config in configs):
                raise ValueError(
                    f"add_weighted_adapter: {adapters} differ in {field}, so their sum has no one config."
                )

    def _targets_of(self, name: str) -> set[str]:
        """Full names of the modules that adapter `name` sits on."""
        modules = self.model.named_modules()
        return {
            path for path, m in modules if isinstance(m, AdapterLayer) and name in m._all_available_adapter_names()
        }

    def _entries(self, name: str) -> dict[str, Tensor]:
        """Trained tensors of one adapter, by a key that is the same for all adapters."""
        prefixes = _get_tuner_state_dict_key_prefixes(self, adapter_name=name)
        named = _filter_state_dict_by_key_prefixes(dict(self.named_parameters()), prefixes)
        return {self._remove_adapter_name_from_key(key, name): tensor for key, tensor in named.items()}

    # --- loading ---

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's remapping, and a refusal of what PEFT would load without a word: an adapter with holes in it."""
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        prefixes = _get_tuner_state_dict_key_prefixes(model, adapter_name=adapter_name)
        missing = [k for k in _filter_state_dict_by_key_prefixes(model.state_dict(), prefixes) if k not in remapped]
        if missing:
            raise ValueError(
                f"the checkpoint of adapter {adapter_name!r} lacks {len(missing)} tensors that the model has: "
                f"{', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}; it is incomplete or of another base."
            )
        return remapped


def base_shape(model: nn.Module) -> dict[str, int | str]:
    """Model type and sizes by which an adapter knows its base: {} for a model without a Hugging Face config."""
    config = getattr(model, "config", None)
    return {name: getattr(config, name) for name in _SHAPE if getattr(config, name, None) is not None}


def _say(shape: dict[str, int | str]) -> str:
    return ", ".join(f"{name}={shape[name]}" for name in _SHAPE if name in shape)  # JSON files sort their keys


def _also(config: PetuneConfig, name: str) -> str:
    value = getattr(config, name)
    return f" with {name}={value!r}" if value else ""


def _base(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _inside_tuner_layer(model: nn.Module, name: str) -> bool:
    parent = name.rpartition(".")[0]
    while parent:
        if isinstance(model.get_submodule(parent), BaseTunerLayer):
            return True
        parent = parent.rpartition(".")[0]
    return False


def _check_not_nested(targets: list[tuple[str, nn.Module]]) -> None:
    outer = ""
    for name, _ in targets:  # in model order: what is inside follows at once
        if outer and name.startswith(f"{outer}."):
            raise ValueError(f"target {name!r} lies inside target {outer!r}; narrow target_modules to one of them.")
        outer = name
