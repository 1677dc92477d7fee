"""How much each expert matters to a token: `expert_scores`."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from petune.adapters.emoe.feed_forward import Activation
from petune.adapters.emoe.router import Router


@dataclass
class Around:
    """What the first linear of a feed-forward needs to know of its surroundings."""

    block: int
    """Number of its block, which sets it apart from the others where something is drawn at random."""
    parent: nn.Module
    """The module that holds it. In no module's list of children, so that it is saved and moved once."""
    up: str
    """Name in `parent` of the linear that the activated gate is multiplied with, or ""."""
    activation: Activation | None
    fused: bool
    """Whether the first linear holds gate and up, in this order."""

    @property
    def gated(self) -> bool:
        """Whether there is an up projection."""
        return self.fused or bool(self.up)


def expert_scores(
    router: Router, x: Tensor, z: Tensor, keys: Tensor | None, bias: Tensor | None, around: Around
) -> Tensor:
    """The score of every expert for every token, float32 [..., num_experts].

    Args:
        x: what the first linear reads, [..., in_features].
        z: what it gives, [..., out_features].
        keys: mean row of each expert's live weight, [num_experts, in_features]; read for score="gate", for which
            x keysᵀ is the mean pre-activation without the cost of one for every neuron.
        bias: of the first linear, [out_features].
        around: the feed-forward.
    """
    if router.weight is not None:
        return F.linear(x.float(), router.weight.float())
    if keys is not None:
        counted = bias if router.score_bias else None
        return F.linear(x.float(), keys, None if counted is None else router.mean(counted[: len(router.labels)]))
    gate, up = _inner(x, z, bias, router, around)
    if router.score.startswith("inter"):
        assert around.activation is not None
        gate = around.activation(gate)
        values = gate if up is None else gate * up
    else:
        assert up is not None
        values = up
    return router.mean(values.abs() if router.score.endswith("abs") else values)


def _inner(x: Tensor, z: Tensor, bias: Tensor | None, router: Router, around: Around) -> tuple[Tensor, Tensor | None]:
    """Pre-activation and up projection of every neuron, without the first linear's bias unless it counts."""
    if bias is not None and not router.score_bias:
        z = z - bias
    if around.fused:
        gate, up = z.chunk(2, dim=-1)
        return gate, up
    if not around.up:
        return z, None
    with torch.no_grad():
        return z, around.parent.get_submodule(around.up)(x)
