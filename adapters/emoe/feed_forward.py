"""Where the feed-forwards of a model are, and what their first linear is followed by."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from petune.adapters.emoe.config import LAST_EVEN, EmoeConfig
from petune.blocks import Block
from petune.layer import linear_shape
from petune.topology import find_topology

Activation = Callable[[Tensor], Tensor]

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_ACTIVATION = re.compile(r"(.*_)?act(ivation)?(_?fn|_?func(tion)?)?")
_IN_CONFIG = ("hidden_act", "hidden_activation", "activation_function", "activation", "dense_act_fn")


@dataclass(frozen=True)
class FeedForward:
    """The linears of one feed-forward, by full name.

    Attributes:
        block: number of its block.
        first: the linear whose output the activation takes: the gate where there is one.
        up: the linear that the activated gate is multiplied with; "" where there is none, or where `first` holds both.
        last: the linear back to the residual stream.
        fused: whether `first` holds gate and up, in this order.
    """

    block: int
    first: str
    up: str
    last: str
    fused: bool

    @property
    def linears(self) -> tuple[str, ...]:
        """All of them, in the order they are applied."""
        return (self.first, self.up, self.last) if self.up else (self.first, self.last)


def find_feed_forwards(model: nn.Module) -> list[FeedForward]:
    """Every feed-forward of a model, in the order of its blocks.

    Raises:
        ValueError: the model is a mixture of experts already, or its blocks cannot be told.
    """
    config = getattr(model, "config", None)
    for name in _EXPERT_COUNTS:
        count = getattr(config, name, None)
        if isinstance(count, int) and count > 1:
            raise ValueError(
                f"{type(model).__name__} is a mixture of experts already ({name}={count}); EmoeConfig makes experts "
                "out of dense feed-forwards: use FusedLoraConfig."
            )
    layout = find_topology(model).layout
    return [found for number, block in enumerate(layout) for found in _of_block(model, number, block)]


def choose(config: EmoeConfig, found: list[FeedForward]) -> list[FeedForward]:
    """The feed-forwards in the blocks that `config.layers` stands for, or that a checkpoint routed.

    Raises:
        ValueError: a block that the model does not have, or that has no feed-forward of the usual form.
    """
    if config.routed_modules is not None:
        by_name = {one.first: one for one in found}
        unknown = [name for name in config.routed_modules if name not in by_name]
        if unknown:
            config.refuse(
                "routed_modules",
                f"names {unknown[0]!r}, which is the first linear of no feed-forward here; they are "
                f"{', '.join(by_name)}",
            )
        return [by_name[name] for name in config.routed_modules]
    blocks = sorted({one.block for one in found})
    if config.layers == "all":
        wanted = blocks
    elif isinstance(config.layers, str):
        wanted = [block for block in blocks if block % 2 == 0][-int(config.layers.removeprefix(LAST_EVEN)) :]
    else:
        wanted = [config.layers] if isinstance(config.layers, int) else config.layers
    if not wanted:
        config.refuse("layers", f"leaves no feed-forward to route; the model has them in blocks {_say(blocks)}")
    for block in wanted:
        if block not in blocks:
            config.refuse("layers", f"names block {block}, but the model has feed-forwards in blocks {_say(blocks)}")
    return [one for one in found if one.block in wanted]


def find_activation(model: nn.Module, name: str) -> Activation | None:
    """The activation behind the linear `name`: an attribute of a module around it, else what the config names."""
    path = name.split(".")[:-1]
    for depth in range(len(path), 0, -1):
        around = model.get_submodule(".".join(path[:depth]))
        for attribute, value in (*around._modules.items(), *vars(around).items()):
            if _ACTIVATION.fullmatch(attribute) and callable(value):
                return cast("Activation", value)
        if isinstance(around, nn.ModuleList):
            break
    config = getattr(model, "config", None)
    names = (getattr(config, attribute, None) for attribute in _IN_CONFIG)
    return next((ACT2FN[one] for one in names if isinstance(one, str) and one in ACT2FN), None)


def value_at_zero(activation: Activation) -> float:
    """f(0), on whatever device the activation has its parameters."""
    parameters = activation.parameters() if isinstance(activation, nn.Module) else iter(())
    device = next((parameter.device for parameter in parameters), torch.device("cpu"))
    with torch.no_grad():
        return float(activation(torch.zeros(1, device=device)))


def _of_block(model: nn.Module, number: int, block: Block) -> Iterator[FeedForward]:
    for last in block.ffn_out:
        firsts = [name for name in block.ffn_in if _parent(name) == _parent(last)]
        if not firsts and len(block.ffn_out) == 1:  # BERT's lie in two modules
            firsts = list(block.ffn_in)
        gates = [name for name in firsts if name in block.ffn_gate]
        ups = [name for name in firsts if name not in gates]
        if len(firsts) == 1:
            inner = linear_shape(_linear(model, last))[0]
            yield FeedForward(number, firsts[0], "", last, linear_shape(_linear(model, firsts[0]))[1] == 2 * inner)
        elif len(gates) == len(ups) == 1:
            yield FeedForward(number, gates[0], ups[0], last, fused=False)


def _linear(model: nn.Module, name: str) -> nn.Module:
    module = model.get_submodule(name)
    while hasattr(module, "base_layer"):
        module = module.get_submodule("base_layer")
    return module


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _say(numbers: list[int]) -> str:
    if not numbers:
        return "of no kind"
    if numbers == list(range(len(numbers))):
        return f"0..{len(numbers) - 1}"
    return ", ".join(map(str, numbers))
