"""`sparsify`: routed feed-forwards that compute the chosen experts and nothing else.

The neurons are put in the order of their experts once. For the (token, expert) pairs of a call, sorted by expert, the
first linear gives pre-activations of shape [..., top_k · s], s neurons an expert; whatever stands in the middle is
elementwise and passes them on, and the last linear sums each token's pairs. So no family needs code of its own. Where
computing every neuron is faster, or gradients are asked for, that is done, and the experts not chosen are set to zero.
"""

import threading
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from petune.adapters.emoe.feed_forward import FeedForward, find_feed_forwards
from petune.adapters.emoe.routed import RoutedConv1D, RoutedLinear
from petune.adapters.emoe.router import Router
from petune.kernels import chooser
from petune.kernels.expert_linear import Assignment, assign, expert_in, expert_out
from petune.low_rank import is_hooked
from petune.topology import common_parent


class _Call(NamedTuple):
    """What one call of a feed-forward computes with: pairs, or a mask over all experts."""

    x: Tensor
    assignment: Assignment | None
    keep: Tensor | None


class ExpertsIn(nn.Module):
    """A first linear, or the up projection beside it: [..., d] to [..., parts · top_k · s]

    Where all neurons are computed it gives [..., parts · num_experts · s].

    Args:
        weight: in the order of the experts, [parts, num_experts, s, d]; two parts where gate and up are fused.
        bias: [parts, num_experts, s].
    """

    router: Router
    """Of a first linear."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.experts: Experts | None = None

    def forward(self, x: Tensor) -> Tensor:
        assert self.experts is not None
        call = self.experts.call(x)
        if call.assignment is None:
            return self.all_neurons(x, call.keep)
        return self.pairs(x, call.assignment)

    def pairs(self, x: Tensor, assignment: Assignment) -> Tensor:
        """The pre-activations of each token's chosen experts, in the order of the pairs."""
        rows = x.reshape(-1, x.shape[-1])
        biases = [None] * len(self.weight) if self.bias is None else list(self.bias)
        parts = [
            expert_in(rows, weight, bias, assignment).view(*x.shape[:-1], -1)
            for weight, bias in zip(self.weight, biases, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def all_neurons(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """The pre-activations of every neuron, zero where `keep` [..., num_experts] is False."""
        parts, num_experts, size, _ = self.weight.shape
        z = F.linear(x, self.weight.flatten(0, 2), None if self.bias is None else self.bias.flatten())
        if keep is None:
            return z
        z = z.unflatten(-1, (parts, num_experts, size))
        keep = keep[..., None, :, None]
        # a product in place takes a quarter of the time of a fill on a CPU; in fp16 a large z may be infinite
        if z.requires_grad or z.dtype == torch.float16:
            return z.masked_fill(~keep, 0.0).flatten(-3)
        return z.mul_(keep).flatten(-3)

    def extra_repr(self) -> str:
        return "parts={}, num_experts={}, expert_size={}, in_features={}".format(*self.weight.shape)


class ExpertsOut(nn.Module):
    """A last linear: what `ExpertsIn` and the activation give, to [..., out_features]

    Args:
        weight: in the order of the experts, [num_experts, s, out_features].
        bias: [out_features].
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.experts: Experts | None = None

    def forward(self, h: Tensor) -> Tensor:
        assert self.experts is not None
        call = self.experts.finish()
        if call is None or call.assignment is None:
            return F.linear(h, self.weight.flatten(0, 1).T, self.bias)
        return self.sum_of_pairs(h, call.assignment)

    def sum_of_pairs(self, h: Tensor, assignment: Assignment) -> Tensor:
        """bias + Σ h[pair] · weight[expert of the pair] over the pairs of each token."""
        _, size, out_features = self.weight.shape
        y = expert_out(h.reshape(-1, size), self.weight, self.bias, assignment)
        return y.view(*h.shape[:-1], out_features)

    def extra_repr(self) -> str:
        return "num_experts={}, expert_size={}, out_features={}".format(*self.weight.shape)


class Experts:
    """What the linears of one feed-forward share: the router, and the call that is under way in each thread."""

    def __init__(
        self,
        router: Router,
        first: ExpertsIn,
        up: ExpertsIn | None,
        last: ExpertsOut,
    ) -> None:
        first.router = router
        self.first, self.up, self.last = first, up, last
        self._calls: dict[int, _Call] = {}
        for module in (first, up, last):
            if module is not None:
                module.experts = self

    def call(self, x: Tensor) -> _Call:
        """The pairs for x, found by whichever linear is called with it first."""
        current = self._calls.get(threading.get_ident())
        if current is None or current.x is not x:
            current = self._calls[threading.get_ident()] = self._begin(x)
        return current

    def finish(self) -> _Call | None:
        """The call under way, which ends."""
        return self._calls.pop(threading.get_ident(), None)

    def _begin(self, x: Tensor) -> _Call:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            scores = self._scores(x.float())
            chosen = self.first.router(scores)
        if self._sparse_is_faster(x, chosen):
            return _Call(x, assign(chosen.flatten(0, -2), scores.shape[-1]), None)
        return _Call(x, None, _mask(scores, chosen))

    def _scores(self, x: Tensor) -> Tensor:
        router, weight, bias = self.first.router, self.first.weight, self.first.bias
        if router.weight is not None:
            return F.linear(x, router.weight.float())
        keys = router.frozen_keys(weight, lambda: weight[0].flatten(0, 1))
        counted = bias[0].float().mean(-1) if bias is not None and router.score_bias else None
        return F.linear(x, keys, counted)

    def _sparse_is_faster(self, x: Tensor, chosen: Tensor) -> bool:
        tokens = x.numel() // x.shape[-1]
        watched = torch.is_grad_enabled() and x.requires_grad
        if not tokens or watched or torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
            return False
        x, chosen = x.detach().reshape(tokens, -1), chosen.reshape(tokens, -1)
        key = (
            *("routed_feed_forward", chooser.bucket(tokens), chosen.shape[-1], *self.first.weight.shape),
            *(int(self.up is not None), str(x.dtype).removeprefix("torch."), torch.get_num_threads()),
        )
        candidates = {"sparse": lambda: self._all_in_pairs(x, chosen), "dense": lambda: self._all_neurons(x, chosen)}
        return chooser.choose(key, candidates, "sparse", x.device, on_cpu=True) == "sparse"

    def _all_in_pairs(self, x: Tensor, chosen: Tensor) -> Tensor:
        assignment = assign(chosen, self.last.weight.shape[0])
        h = self.first.pairs(x, assignment).chunk(len(self.first.weight), dim=-1)[0]
        if self.up is not None:
            h = h * self.up.pairs(x, assignment)
        return self.last.sum_of_pairs(h, assignment)

    def _all_neurons(self, x: Tensor, chosen: Tensor) -> Tensor:
        keep = _mask(chosen.new_empty(len(x), self.last.weight.shape[0]), chosen)
        h = self.first.all_neurons(x, keep).chunk(len(self.first.weight), dim=-1)[0]
        if self.up is not None:
            h = h * self.up.all_neurons(x, None)
        return F.linear(h, self.last.weight.flatten(0, 1).T, self.last.bias)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_calls": {}}


def _mask(scores: Tensor, chosen: Tensor) -> Tensor:
    return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter_(-1, chosen, True)


def sparsify(model: nn.Module) -> nn.Module:
    """Let the routed feed-forwards of a merged model compute the chosen experts only, in place; for inference.

    A feed-forward stays as it is, with a warning, where its scores need every neuron, where something between its
    linears is not elementwise, or where its last linear is not a plain one.

    Args:
        model: what `merge_and_unload(keep_routing=True)` gave.

    Raises:
        ValueError: the model has no routed feed-forward.
    """
    routed = [one for one in find_feed_forwards(model) if _is_routed(model.get_submodule(one.first))]
    if not routed:
        raise ValueError(
            f"sparsify found no routed feed-forward in {type(model).__name__}; pass what "
            "merge_and_unload(keep_routing=True) returns."
        )
    for one in routed:
        if reason := _why_not(model, one):
            warnings.warn(f"sparsify leaves the feed-forward at {one.first!r} dense: {reason}.", stacklevel=3)
        else:
            _make_sparse(model, one)
    return model


def _is_routed(module: nn.Module) -> bool:
    return isinstance(module, (RoutedLinear, RoutedConv1D))


def _why_not(model: nn.Module, one: FeedForward) -> str:
    first: Any = model.get_submodule(one.first)
    if first.router.kind == "keys" and not first.router.needs_keys:
        return f"score={first.router.score!r} looks at every neuron"
    if not first.router.routes:
        return "every expert is chosen"
    for name in one.linears:
        module = model.get_submodule(name)
        if type(module) not in (nn.Linear, Conv1D, RoutedLinear, RoutedConv1D) or is_hooked(module):
            return f"{name!r} is a {type(module).__name__}, or has hooks"
    inner = len(first.router.labels)
    for name, module in model.get_submodule(common_parent(*one.linears)).named_modules():
        own = [] if isinstance(module, (nn.Linear, Conv1D)) else module.parameters(recurse=False)
        if any(parameter.shape == (inner,) for parameter in own):
            return f"{name!r} weighs its neurons one by one"
    return ""


def _make_sparse(model: nn.Module, one: FeedForward) -> None:
    first: Any = model.get_submodule(one.first)
    router: Router = first.router
    order = router.order()
    into = [_experts_in(model.get_submodule(name), router, order) for name in one.linears[:-1]]
    last = _experts_out(model.get_submodule(one.last), router, order)
    router.assign(router.labels[order])  # of the neurons in their new order
    Experts(router, into[0], into[1] if one.up else None, last)
    for name, module in zip(one.linears, (*into, last), strict=True):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.train(router.training))


def _experts_in(linear: Any, router: Router, order: Tensor) -> ExpertsIn:
    weight = linear.weight.T if isinstance(linear, Conv1D) else linear.weight
    shape = (-1, router.num_experts, len(order) // router.num_experts)
    by_part = weight.detach().unflatten(0, (-1, len(order)))[:, order]
    bias = None if linear.bias is None else linear.bias.detach().view(-1, len(order))[:, order].unflatten(1, shape[1:])
    return ExpertsIn(by_part.unflatten(1, shape[1:]).contiguous(), bias)


def _experts_out(linear: Any, router: Router, order: Tensor) -> ExpertsOut:
    weight = linear.weight if isinstance(linear, Conv1D) else linear.weight.T
    by_expert = weight.detach()[order].unflatten(0, (router.num_experts, -1)).contiguous()
    return ExpertsOut(by_expert, None if linear.bias is None else linear.bias.detach().clone())
