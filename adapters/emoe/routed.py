"""`RoutedLinear` and `RoutedConv1D`: a plain linear layer that keeps the routing after its adapter was merged."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from petune.adapters.emoe.router import Router
from petune.adapters.emoe.scores import Around, expert_scores


class _Routed(nn.Module):
    """Stands before the class of a linear layer: its output with the experts that are not chosen at zero.

    The keys of the layer's state are those of the plain class and `router.labels` beside them, so that its checkpoint
    loads into the stock model, as the dense feed-forward.
    """

    weight: Tensor
    bias: Any
    router: Router
    around: Around

    def forward(self, x: Tensor) -> Tensor:
        z = super().forward(x)
        if not self.router.routes:
            return z
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            keys = self.router.frozen_keys(self.weight, self.keys) if self.router.needs_keys else None
            scores = expert_scores(self.router, x, z, keys, self.bias, self.around)
        return self.router.route(z, scores)

    def keys(self) -> Tensor:
        """What the neurons read, [out_features, in_features]."""
        return self.weight


class RoutedLinear(_Routed, nn.Linear):
    """A Linear whose output is routed."""


class RoutedConv1D(_Routed, Conv1D):
    """A Conv1D, whose weight is [in_features, out_features], whose output is routed."""

    def keys(self) -> Tensor:
        return self.weight.T


_ROUTED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: RoutedLinear, Conv1D: RoutedConv1D}


def check_plain(name: str, linear: nn.Module) -> None:
    """Refuse what `keep_routing` cannot route.

    Raises:
        TypeError: module `name` is no plain Linear or Conv1D.
    """
    if type(linear) not in _ROUTED:
        raise TypeError(
            f"keep_routing=True needs a Linear or Conv1D to route, but {name!r} is a {type(linear).__name__}; "
            "load the base without quantisation, or merge without keep_routing."
        )


def keep_routing(linear: nn.Module, router: Router, around: Around) -> nn.Module:
    """Make `linear`, a plain Linear or Conv1D, a routed layer, in place."""
    linear.__class__ = _ROUTED[type(linear)]
    routed = cast("Any", linear)
    routed.router, routed.around = router.requires_grad_(False), around
    return linear
