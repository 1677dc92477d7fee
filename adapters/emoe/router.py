"""`Router`: which expert every neuron belongs to, and which experts a token keeps."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from petune.adapters.emoe.config import EmoeConfig

UNSET = -1
"""Label of a neuron before the clustering has run."""


class Router(nn.Module):
    """The experts of one feed-forward, and the choice of top_k among them for every token.

    Calling it, scores [..., num_experts] to chosen experts [..., top_k] in ascending order, is the choice alone; hooks
    on it see every choice that is made.
    """

    labels: Tensor
    """Expert of every neuron, int32 [inner size] (gloo sends no narrower signed ones), saved; `UNSET` until found."""
    weight: Tensor | None
    """Of a random or learned router, [num_experts, in_features]."""

    def __init__(self, config: EmoeConfig, in_features: int, inner_size: int, *, fused: bool, seed: int) -> None:
        super().__init__()
        self.num_experts, self.top_k = config.num_experts, config.top_k
        self.kind, self.score, self.score_bias = config.router, config.score, config.score_bias
        self.noise, self.dropout_p, self.balanced = (
            config.router_noise,
            config.pre_act_dropout,
            config.balance_loss > 0,
        )
        self.fused, self.seed = fused, seed
        self.loss: Tensor | None = None
        """How unevenly the last forward in training used the experts, where `balanced` asks for it."""
        self.register_buffer("labels", torch.full((inner_size,), UNSET, dtype=torch.int32))
        self.is_set = False
        weight = torch.empty(config.num_experts, in_features)
        if config.router == "learned":
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight if config.router == "random" else None)
        if config.router != "keys" and not weight.is_meta:
            generator = torch.Generator(weight.device).manual_seed(seed)
            with torch.no_grad():
                self.weight.normal_(0.0, 1 / math.sqrt(in_features), generator=generator)  # pyright: ignore
        self._pooled: tuple[tuple[Any, ...], Tensor] | None = None

    @property
    def routes(self) -> bool:
        """Whether it leaves experts out, or has a choice to learn."""
        return self.top_k < self.num_experts or (self.kind == "learned" and self.training)

    @property
    def needs_keys(self) -> bool:
        """Whether the scores are x · mean key, and no inner value is needed."""
        return self.kind == "keys" and self.score == "gate"

    def assign(self, labels: Tensor) -> None:
        """Set the experts of the neurons, [inner size]."""
        self.labels.copy_(labels)
        self.is_set = True

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if (labels := state_dict.get(f"{prefix}labels")) is not None:
            self.is_set = not bool((labels == UNSET).any())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "loss": None, "_pooled": None}  # a loss of some graph cannot be copied

    # --- scores ---

    def pooled(self, weight: Tensor) -> Tensor:
        """The mean of each expert's rows of `weight` [inner size, features], float32 [num_experts, features].

        A sum in the order of the labels: `index_add_` on CUDA would add in any order.
        """
        rows = weight[: len(self.labels)][self.order()].float()
        return rows.view(self.num_experts, -1, weight.shape[1]).mean(1)

    def frozen_keys(self, source: Tensor, read: Callable[[], Tensor]) -> Tensor:
        """`pooled` of a weight that seldom changes, kept until it does.

        Args:
            source: the parameter that holds the weight, in whatever form.
            read: gives the weight, [inner size or more, features].
        """
        if torch.compiler.is_compiling():
            return self.pooled(read())
        versions = tuple((one.data_ptr(), 0 if one.is_inference() else one._version) for one in (source, self.labels))
        state = (*versions, source.device)
        if self._pooled is None or self._pooled[0] != state:
            with torch.no_grad():
                self._pooled = (state, self.pooled(read()))
        return self._pooled[1]

    def order(self) -> Tensor:
        """The neurons sorted by expert, [inner size]."""
        return torch.argsort(self.labels, stable=True)

    def mean(self, values: Tensor) -> Tensor:
        """The mean of each expert's values, [..., inner size] to float32 [..., num_experts]."""
        return values[..., self.order()].float().unflatten(-1, (self.num_experts, -1)).mean(-1)

    # --- the choice ---

    def forward(self, scores: Tensor) -> Tensor:
        """The best top_k experts of every token in ascending order, int64; of equal ones the first."""
        with torch.no_grad():  # topk would take any of the equal ones
            best = scores.argsort(dim=-1, descending=True, stable=True)
            return best[..., : self.top_k].sort(dim=-1).values

    def route(self, z: Tensor, scores: Tensor) -> Tensor:
        """z [..., features] with the neurons of the experts that are not chosen at zero, where act(0) = 0 drops them.

        A learned router passes the gradient of its choice straight through to sigmoid(scores).
        """
        noisy = scores
        if self.training and self.noise:
            noisy = scores + torch.randn_like(scores) * (self.noise / self.num_experts)
        chosen = self(noisy)
        keep = torch.zeros(scores.shape, dtype=z.dtype, device=z.device).scatter_(-1, chosen, 1.0)
        if self.kind == "learned" and scores.requires_grad:
            gate = torch.sigmoid(scores)
            keep = keep * (1 + (gate - gate.detach())).to(z.dtype)
        labels = torch.cat([self.labels, self.labels]) if self.fused else self.labels
        z = z * keep.index_select(-1, labels)  # a fill by a gathered mask of bools takes seven times as long on a CPU
        if self.balanced and self.training:
            self.loss = importance_and_load(scores, noisy.gather(-1, chosen).amin(-1), self.noise)
        return F.dropout(z, self.dropout_p, self.training)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, top_k={self.top_k}, kind={self.kind}"


def importance_and_load(scores: Tensor, threshold: Tensor, noise: float) -> Tensor:
    """Squared coefficients of variation of the experts' importance and load, averaged (Riquelme et al. 2021, A).

    Importance is the sum of the softmax over the tokens. Load, the sum of the probabilities that new noise would
    choose the expert, needs noise; without it importance stands alone.

    Args:
        scores: without noise, [..., num_experts].
        threshold: the smallest score that was chosen, with its noise, [...].
        noise: standard deviation of the noise, times num_experts.
    """
    scores = scores.flatten(0, -2)
    importance = _squared_variation(torch.softmax(scores, dim=-1).sum(0))
    if not noise:
        return importance
    margin = (scores - threshold.flatten().unsqueeze(1)) * (scores.shape[-1] / noise)
    load = _squared_variation(torch.special.ndtr(margin).sum(0))
    return (importance + load) / 2


def _squared_variation(values: Tensor) -> Tensor:
    return values.var() / (values.mean() ** 2 + 1e-10)
