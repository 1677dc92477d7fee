"""`EmoeModel`: puts routers on feed-forwards and LoRA beside them, and takes them out, densely or sparsely."""

import warnings
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from petune.adapters.emoe.cluster import nearest_divisors
from petune.adapters.emoe.config import EmoeConfig
from petune.adapters.emoe.feed_forward import (
    FeedForward,
    choose,
    find_activation,
    find_feed_forwards,
    value_at_zero,
)
from petune.adapters.emoe.layer import EmoeLayer
from petune.adapters.emoe.routed import check_plain
from petune.adapters.emoe.routed import keep_routing as make_routed
from petune.adapters.emoe.router import UNSET, Router
from petune.adapters.emoe.scores import Around
from petune.adapters.emoe.sparse import sparsify
from petune.config import PetuneConfig
from petune.layer import AdapterLayer, linear_shape
from petune.tuner import PetuneTuner


class EmoeModel(PetuneTuner):
    """Routes the feed-forwards of `layers`, and puts LoRA on `target_modules`, by default queries and values."""

    prefix = "petune_emoe_"
    tuner_layer_cls = EmoeLayer
    exact_merge: ClassVar[dict[str, Any]] = {"keep_routing": True}

    _feed_forwards: dict[str, FeedForward]
    """Those that the adapter which is being added routes, by name of their first linear."""

    # --- before anything changes ---

    def _prepare_adapter_config(self, peft_config: PetuneConfig, model_config: dict[str, Any]) -> PetuneConfig:
        assert isinstance(peft_config, EmoeConfig)
        if peft_config.trains_nothing and not peft_config.inference_mode:
            raise ValueError(
                "EmoeConfig has no parameters of its own to train; set r > 0, train_ffn=True, router='learned' or "
                "modules_to_save."
            )
        found = choose(peft_config, find_feed_forwards(self.model))
        self._feed_forwards = {one.first: one for one in found}
        for one in found:
            self._check_feed_forward(peft_config, one)
        peft_config.routed_modules = list(self._feed_forwards)
        linears = [name for one in found for name in one.linears]
        peft_config.ffn_modules = linears if peft_config.train_ffn else peft_config.routed_modules
        if peft_config.r == 0:
            peft_config.target_modules = set(peft_config.ffn_modules)  # pyright: ignore[reportAttributeAccessIssue]
        return super()._prepare_adapter_config(peft_config, model_config)

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> Any:
        assert isinstance(peft_config, EmoeConfig)
        return key in (peft_config.ffn_modules or ()) or check_target_module_exists(peft_config, key)

    def _expand_targets(self, config: PetuneConfig, model: nn.Module) -> list[tuple[str, nn.Module]]:
        assert isinstance(config, EmoeConfig)
        found = super()._expand_targets(config, model)
        if config.r and not any(check_target_module_exists(config, name) for name, _ in found):
            raise self._no_match(config, model)  # the routed ones matched; LoRA would be nowhere
        return found

    def check_targets(self, config: PetuneConfig, model: nn.Module, targets: list[tuple[str, nn.Module]]) -> None:
        """Refuse to route a linear whose rows cannot be read."""
        for name in self._feed_forwards:
            base = _innermost(model, name)
            backend = self._quantization_backend(base)
            if backend is None:
                continue
            try:
                backend.get_base_weight(base)
            except (TypeError, NotImplementedError) as error:
                raise ValueError(
                    f"EmoeConfig would route {name!r}, a {type(base).__name__} whose weight PEFT cannot read; leave "
                    "its block out of layers, or load the base without that quantisation."
                ) from error

    def _check_feed_forward(self, config: EmoeConfig, one: FeedForward) -> None:
        inner = linear_shape(_innermost(self.model, one.last))[0]
        if inner % config.num_experts:
            near = " and ".join(map(str, nearest_divisors(inner, config.num_experts)))
            config.refuse("num_experts", f"does not divide {inner}, the inner size at {one.first!r}; use {near}")
        if config.score.startswith("up") and not (one.up or one.fused):
            config.refuse(
                "score", f"needs a gated feed-forward, and {one.first!r} has no up projection; use 'gate' or 'inter'"
            )
        activation = find_activation(self.model, one.first)
        if activation is None:
            warnings.warn(
                f"EmoeConfig cannot find the activation behind {one.first!r}; routing needs one that maps 0 to 0.",
                stacklevel=2,
            )
            if config.score.startswith("inter"):
                config.refuse("score", f"needs the activation behind {one.first!r}, which cannot be found; use 'gate'")
        elif (value := value_at_zero(activation)) != 0.0:
            raise ValueError(
                f"EmoeConfig: the activation behind {one.first!r} has f(0) = {value:g}, so that masking before it "
                "would not remove experts; use layers whose activation maps 0 to 0, such as GELU, SiLU or ReLU."
            )

    # --- injection ---

    def prepare_layer(self, layer: AdapterLayer, name: str, adapter_name: str, config: PetuneConfig) -> None:
        """Tells the layer what the adapter is to have there."""
        assert isinstance(layer, EmoeLayer)
        assert isinstance(config, EmoeConfig)
        layer.takes_lora = config.r > 0 and bool(check_target_module_exists(config, name))
        layer.takes_dense = config.train_ffn and name in (config.ffn_modules or ())
        layer.takes_router = name in self._feed_forwards
        if layer.takes_router:
            one = self._feed_forwards[name]
            parent, activation = self.model.get_submodule(name.rpartition(".")[0]), find_activation(self.model, name)
            layer.around = Around(one.block, parent, one.up.rpartition(".")[2], activation, one.fused)

    # --- training ---

    def before_forward(self) -> None:
        """Forget the last forward's use of the experts."""
        for router, _ in self._balanced():
            router.loss = None

    def auxiliary_loss(self) -> Tensor | None:
        """The balance loss of the active adapters in the last forward; None without balance_loss."""
        losses = [weight * router.loss for router, weight in self._balanced() if router.loss is not None]
        if not losses:
            return None
        total = torch.stack(losses).sum()
        self._check_gradient(total)
        return total

    def _check_gradient(self, loss: Tensor) -> None:
        trains = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters())
        if trains and not loss.requires_grad:
            warnings.warn(
                "balance_loss has no gradient: what is trained does not reach the scores, or checkpointing is "
                'reentrant; pass gradient_checkpointing_kwargs={"use_reentrant": False}, or set balance_loss=0.',
                stacklevel=3,
            )

    def _balanced(self) -> Iterator[tuple[Router, float]]:
        active = [name for name in self.active_adapters if name in self.peft_config]  # transformers deletes by itself
        weights = {name: getattr(self.peft_config[name], "balance_loss", 0.0) for name in active}
        if any(weights.values()):
            for _, layer in self._routed_layers():
                for name, router in layer.petune_emoe_router.items():
                    if weights.get(name) and isinstance(router, Router):
                        yield router, weights[name]

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters.

        Raises:
            ValueError: two of them would route the same feed-forward.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        for path, layer in self._routed_layers():
            both = [name for name in names if name in layer.petune_emoe_router]
            if len(both) > 1:
                raise ValueError(
                    f"adapters {both[0]!r} and {both[1]!r} both route {path!r}, and a neuron has one expert: activate "
                    "one of them at a time."
                )
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    # --- the way out ---

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        keep_routing: bool = False,
    ) -> nn.Module:
        """The base model with the low-rank and dense updates folded into its weights.

        Args:
            progressbar: show one.
            safe_merge: refuse weights that would not be finite.
            adapter_names: None for the active ones.
            keep_routing: False drops the routing, with a warning, as the paper's EMoE2Dense does. True keeps it: the
                first linear of every routed feed-forward becomes a `RoutedLinear` or `RoutedConv1D`.

        Raises:
            TypeError: keep_routing, and a routed layer is quantised.
        """
        names = adapter_names or self.active_adapters
        kept = [
            (path, layer.router(name), layer.around)
            for path, layer in self._routed_layers()
            for name in names
            if name in layer.petune_emoe_router
        ]
        if not keep_routing:
            return super().merge_and_unload(progressbar, safe_merge, adapter_names)
        for path, layer in self._routed_layers():
            check_plain(path, layer.get_base_layer())
        model = self._unload_and_optionally_merge(True, progressbar, safe_merge, adapter_names, warn=False)
        for path, router, around in kept:
            assert around is not None
            make_routed(model.get_submodule(path), router, around)
        return model

    def sparsify(self, adapter_names: list[str] | None = None) -> nn.Module:
        """The merged model, whose routed feed-forwards compute the chosen experts only (`sparse.sparsify`)."""
        model = self.merge_and_unload(adapter_names=adapter_names, keep_routing=True)
        return sparsify(model)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Fold the updates into the weights, in place; until they are unmerged the model is dense."""
        self._warn_of_density(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        warn: bool = True,
    ) -> Any:
        if merge and warn:
            self._warn_of_density(adapter_names)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def _warn_of_density(self, adapter_names: list[str] | None) -> None:
        names = adapter_names or self.active_adapters
        routers: list[Any] = [
            layer.petune_emoe_router[name]
            for _, layer in self._routed_layers()
            for name in names
            if name in layer.petune_emoe_router
        ]
        if any(router.top_k < router.num_experts for router in routers):
            warnings.warn(
                "routing removed (EMoE2Dense): outputs change unless top_k == num_experts; "
                "merge_and_unload(keep_routing=True) keeps it.",
                stacklevel=3,
            )

    # --- checkpoints ---

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """PEFT's selection, the experts found by then."""
        for module in model.modules():
            if isinstance(module, EmoeLayer) and adapter_name in module.petune_emoe_router:
                module.router(adapter_name)  # writes into the tensor that state_dict holds
        return super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's remapping, and a refusal of labels that make no experts.

        Raises:
            ValueError: labels of another length, or experts of different size.
        """
        assert isinstance(config, EmoeConfig)
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        for path, module in model.named_modules():
            labels = remapped.get(f"{path}.labels")
            if isinstance(module, Router) and labels is not None:
                _check_labels(path, labels, len(module.labels), config.num_experts)
        return remapped

    def _routed_layers(self) -> Iterator[tuple[str, EmoeLayer]]:
        for path, module in self.model.named_modules():
            if isinstance(module, EmoeLayer) and module.petune_emoe_router:
                yield path, module


def _check_labels(path: str, labels: Tensor, inner: int, num_experts: int) -> None:
    if labels.shape != (inner,):
        raise ValueError(
            f"the checkpoint has {labels.numel()} labels for {path!r}, whose feed-forward has {inner} neurons; load "
            "it on the base that it was trained on."
        )
    valid = labels.min() > UNSET and labels.max() < num_experts
    sizes = torch.bincount(labels.long(), minlength=num_experts) if valid else torch.zeros(1)
    if not bool((sizes == inner // num_experts).all()):
        raise ValueError(
            f"the labels for {path!r} do not make {num_experts} experts of {inner // num_experts} neurons each; the "
            "checkpoint is damaged, or its num_experts was changed."
        )


def _innermost(model: nn.Module, name: str) -> nn.Module:
    module: Any = model.get_submodule(name)
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module
