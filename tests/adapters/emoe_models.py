"""What the tests of emergent experts share: routed models, what their routers choose, the paper's equations."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from petune.adapters.emoe import EmoeConfig, EmoeLayer, Router
from tests.families import FAMILIES, Head

FIELDS: Mapping[str, Any] = {"num_experts": 4, "top_k": 2, "layers": "all", "r": 3, "lora_dropout": 0.0}
Choice = tuple[Tensor, Tensor]


def config(**fields: Any) -> EmoeConfig:
    return EmoeConfig(**{**FIELDS, **fields})


def head_of(family: str) -> Head:
    return "cls" if "cls" in FAMILIES[family].heads else "lm"


def adapted(family: str = "bert", head: Head | None = None, start: int = 1, **fields: Any) -> PeftModel:
    """In eval mode, LoRA at random where fields do not say otherwise."""
    base = FAMILIES[family].build(head=head or head_of(family))
    torch.manual_seed(start)
    return get_peft_model(base, config(**{"init_weights": False, **fields})).eval()


def routed_layers(model: nn.Module) -> dict[str, EmoeLayer]:
    """Name in the base model -> layer with a router."""
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): module
        for name, module in model.named_modules()
        if isinstance(module, EmoeLayer) and module.petune_emoe_router
    }


def routers(model: nn.Module) -> list[Router]:
    return [module for module in model.modules() if isinstance(module, Router)]


@contextmanager
def choices(model: nn.Module) -> Iterator[list[list[Choice]]]:
    """Scores and chosen experts of every call, router by router."""
    found: list[list[Choice]] = []
    handles: list[torch.utils.hooks.RemovableHandle] = []
    for router in routers(model):
        mine: list[Choice] = []
        handles.append(
            router.register_forward_hook(lambda _, args, out, mine=mine: mine.append((args[0].detach(), out)))
        )
        found.append(mine)
    yield found
    for handle in handles:
        handle.remove()


def chosen_by(model: nn.Module, batch: Mapping[str, Tensor]) -> list[Tensor]:
    """The experts that each router which was called chose for a batch, [rows, tokens, top_k]."""
    with choices(model) as found, torch.no_grad():
        model(**batch)
    return [mine[-1][1] for mine in found if mine]


@contextmanager
def calls(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """What goes into a module and what comes out, call by call."""
    found: list[tuple[Tensor, Tensor]] = []
    handle = module.register_forward_hook(lambda _, args, out: found.append((args[0].detach(), out.detach())))
    yield found
    handle.remove()


# --- the equations, token by token and expert by expert ---


def mean_by_expert(rows: Tensor, labels: Tensor) -> Tensor:
    """[neurons, ...] to [experts, ...]"""
    return torch.stack([rows[labels == expert].mean(0) for expert in range(int(labels.max()) + 1)])


def kept(scores: Tensor, labels: Tensor, top_k: int) -> Tensor:
    """Which neurons a token keeps, bool [tokens, neurons], of scores [tokens, experts]."""
    best = scores.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    return torch.stack([torch.isin(labels, experts) for experts in best])


def sum_of_experts(
    x: Tensor,
    keys: Tensor,
    key_bias: Tensor | None,
    ups: Tensor | None,
    values: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    top_k: int,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """y(x) = Σ_e FFN_e(x) over the experts e of largest x · mean(keys of e), each with its share bias / top_k

    Args:
        x: [tokens, d].
        keys: K, [neurons, d]; key_bias [neurons].
        ups: of a gated feed-forward, [neurons, d].
        values: V, [neurons, d]; bias [d].
        labels: expert of each neuron.
    """
    zero = torch.zeros(())
    gate = mean_by_expert(keys, labels)
    y = torch.zeros(len(x), values.shape[1])
    for t, row in enumerate(x):
        for expert in (gate @ row).topk(top_k).indices:
            own = labels == expert
            inner = activation(keys[own] @ row + (zero if key_bias is None else key_bias[own]))
            inner = inner if ups is None else inner * (ups[own] @ row)
            y[t] += inner @ values[own] + (zero if bias is None else bias / top_k)
    return y
