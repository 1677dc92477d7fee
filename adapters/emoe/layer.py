"""`EmoeLayer`: a linear layer with LoRA, a routed output, or both."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from petune.adapters.emoe.cluster import balanced_kmeans, contiguous_clusters, random_clusters
from petune.adapters.emoe.config import EmoeConfig
from petune.adapters.emoe.router import Router
from petune.adapters.emoe.scores import Around, expert_scores
from petune.layer import BASE
from petune.low_rank import Factors, LowRankLayer, lora_factors, tensor


class EmoeLayer(LowRankLayer):
    """y = x Wᵀ + bias + scale · drop(x) Aᵀ Bᵀ + x ΔWᵀ, and on the first linear of a routed feed-forward y ⊙ keep

    Of each adapter the layer has what its config asks for here: LoRA's A and B, the dense update ΔW of train_ffn, a
    router. The scores of the experts come from the layer's input and the live weight W + scale · B A + ΔW, without
    dropout and in float32, so that what is chosen for a token depends on nothing but the token.
    """

    adapter_layer_names = ("petune_emoe_a", "petune_emoe_b", "petune_emoe_dense", "petune_emoe_router")
    other_param_names = ("scale", "dropout_p")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.petune_emoe_a = nn.ParameterDict()
        self.petune_emoe_b = nn.ParameterDict()
        self.petune_emoe_dense = nn.ParameterDict()
        self.petune_emoe_router = nn.ModuleDict()
        self.scale: dict[str, float] = {}
        self.dropout_p: dict[str, float] = {}
        self.around: Around | None = None
        """The feed-forward that the layer is the first linear of; set by the tuner, as is what an adapter takes."""
        self.takes_lora = self.takes_dense = self.takes_router = False

    def create(self, name: str, config: EmoeConfig) -> None:
        self.scale[name], self.dropout_p[name] = config.scale, config.lora_dropout
        if self.takes_lora:
            a, b = lora_factors(self.in_features, self.out_features, config.r, identity=bool(config.init_weights))
            self.petune_emoe_a[name], self.petune_emoe_b[name] = a, b
        if self.takes_dense:
            dense = torch.zeros(self.out_features, self.in_features)
            if not config.init_weights:
                nn.init.normal_(dense, 0.0, 0.3 / math.sqrt(self.in_features))
            self.petune_emoe_dense[name] = nn.Parameter(dense)
        if self.takes_router:
            assert self.around is not None
            self.petune_emoe_router[name] = self._make_router(config, self.around)

    # --- the update ---

    def factors(self, name: str) -> Factors:
        dropout_p = self.dropout_p[name] if self.training else 0.0
        return Factors(self.petune_emoe_a[name], self.petune_emoe_b[name], self.scale[name], dropout_p)

    def delta(self, name: str, x: Tensor) -> Tensor:
        total = super().delta(name, x) if name in self.petune_emoe_a else None
        if name in self.petune_emoe_dense:
            dense = nn.functional.linear(x, self.petune_emoe_dense[name].to(x.dtype))
            total = dense if total is None else total + dense
        return x.new_zeros(*x.shape[:-1], self.out_features) if total is None else total

    @torch.no_grad()
    def get_delta_weight(self, name: str) -> Tensor:
        """ΔW of adapter `name`, routing aside, [out_features, in_features], float32."""
        if name in self.petune_emoe_a:
            total = super().get_delta_weight(name)
        else:
            total = torch.zeros(self.out_features, self.in_features, device=self.get_base_weight().device)
        return total + self.petune_emoe_dense[name].float() if name in self.petune_emoe_dense else total

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Not where the adapter routes: a LoRA would be dense."""
        return adapter_name not in self.petune_emoe_router

    def _updates(self, name: str) -> bool:
        return name in self.petune_emoe_a or name in self.petune_emoe_dense

    def _fused(self, name: str, x: Tensor) -> Tensor:
        if name in self.petune_emoe_a and name not in self.petune_emoe_dense:
            return super()._fused(name, x)
        return self._with_updates(self.base_layer(x), [name], x)

    def _with_updates(self, y: Tensor, live: list[str], *inputs: Tensor) -> Tensor:
        return super()._with_updates(y, [name for name in live if self._updates(name)], *inputs)

    def _with_row_updates(self, y: Tensor, adapter_names: list[str], *inputs: Tensor) -> Tensor:
        names = [name if self._updates(name) else BASE for name in adapter_names]
        return super()._with_row_updates(y, names, *inputs)

    # --- routing ---

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        y = super().forward(x, *args, adapter_names=adapter_names, **kwargs)
        if not self.petune_emoe_router or self.disable_adapters:
            return y
        if adapter_names is None:
            routed = [name for name in self.live_adapters() if name in self.petune_emoe_router]
            return self._routed(routed[0], x, y, self.live_adapters()) if routed else y
        for name in sorted(set(adapter_names) & set(self.petune_emoe_router)):
            rows = torch.tensor([i for i, row in enumerate(adapter_names) if row == name], device=y.device)
            y = y.index_copy(0, rows, self._routed(name, x[rows], y[rows], [name]))
        return y

    def router(self, name: str) -> Router:
        """The router of adapter `name`, its experts found if they were not yet.

        Raises:
            KeyError: the layer is not routed by that adapter.
        """
        router: Any = self.petune_emoe_router[name]
        if not router.is_set:
            router.assign(balanced_kmeans(self._keys(router), router.num_experts, seed=router.seed))
        return router

    def _routed(self, name: str, x: Tensor, y: Tensor, live: list[str]) -> Tensor:
        """y by the router of adapter `name`, where the adapters `live` have given it their updates."""
        assert self.around is not None
        router = self.router(name)
        if not router.routes:
            return y
        learns = router.training and (router.balanced or router.kind == "learned")
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()), torch.autocast(x.device.type, enabled=False):
            keys = self._live_keys(router, live) if router.needs_keys else None
            scores = expert_scores(router, x, y, keys, tensor(self.get_base_layer(), "bias"), self.around)
        return router.route(y, scores)

    def _live_keys(self, router: Router, live: list[str]) -> Tensor:
        base = self.get_base_layer()
        stored = tensor(base, "weight") if hasattr(base, "weight") else next(base.parameters())  # HQQ names it W_q
        keys = router.frozen_keys(stored, self._base_keys)
        for name in live:
            if name in self.petune_emoe_a:
                a, b, scale, *_ = self.factors(name)
                keys = keys + scale * (router.pooled(b) @ a.float())
            if name in self.petune_emoe_dense:
                keys = keys + router.pooled(self.petune_emoe_dense[name])
        return keys

    def _make_router(self, config: EmoeConfig, around: Around) -> Router:
        inner = self.out_features // (2 if around.fused else 1)
        router = Router(config, self.in_features, inner, fused=around.fused, seed=config.seed + around.block)
        if router.labels.is_meta:
            return router
        if config.cluster == "random":
            router.assign(random_clusters(inner, config.num_experts, router.seed))
        elif config.cluster == "contiguous":
            router.assign(contiguous_clusters(inner, config.num_experts))
        elif not config.restored and not self._base_keys().is_meta:
            router.assign(balanced_kmeans(self._keys(router), config.num_experts, seed=router.seed))
        return router

    def _keys(self, router: Router) -> Tensor:
        return self._base_keys()[: len(router.labels)]

    def _base_keys(self) -> Tensor:
        """What the neurons read: rows of the weight, columns of a Conv1D's, [out_features, in_features]."""
        weight = self.get_base_weight()
        return weight.T if self.transposed else weight
