"""FrozenBlock: what runs without a graph, in which mode, what follows it, and what a tape does to it."""

import warnings
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from petune.config import PetuneConfig
from petune.frozen_block import Backbone, Call, FrozenBlock


class Pair(NamedTuple):
    hidden: Tensor
    bias: Tensor | None


class Block(nn.Module):
    """Hidden states, alone or in the form that is asked for."""

    def __init__(self, form: Any = None) -> None:
        super().__init__()
        self.linear, self.dropout, self.form = nn.Linear(3, 3), nn.Dropout(0.5), form
        self.runs = 0

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None, *, scale: float = 1.0, **_: Any) -> Any:
        self.runs += 1
        y = self.dropout(self.linear(hidden_states)) * scale
        return y if self.form is None else self.form(y)


class Doubling(FrozenBlock):
    """Gives on twice what the block gives, and remembers its call."""

    adapter_layer_names = ("factor",)
    call: Call

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.factor = nn.ParameterDict({"default": torch.tensor(2.0)})
        self.backbone, self.index, self.path = Backbone(), 4, "blocks.4"
        self.set_adapter("default")

    def create(self, name: str, config: PetuneConfig) -> None:
        raise NotImplementedError

    def follow(self, name: str, call: Call, y: Tensor) -> Tensor:
        self.call = call
        assert not y.requires_grad or self.is_recorded(name, call.x)
        return self.factor[name] * y


class Tape:
    """Replays ones, once it is full."""

    def __init__(self) -> None:
        self.kept: list[tuple[int, Tensor]] = []
        self.is_full = False

    def replay(self, index: int, x: Tensor) -> Tensor | None:
        return torch.ones_like(x) if self.is_full else None

    def record(self, index: int, y: Tensor) -> None:
        self.kept.append((index, y))


def frozen(form: Any = None) -> Doubling:
    torch.manual_seed(0)
    block = Block(form)
    block.requires_grad_(False)
    return Doubling(block).train()


X = torch.arange(6.0).reshape(1, 2, 3)


def test_the_block_runs_in_eval_mode_and_what_follows_it_is_recorded():
    layer = frozen()
    y = layer(X)
    assert torch.equal(y, 2 * layer.base_layer.linear(X))  # no dropout
    assert layer.training
    assert not layer.base_layer.dropout.training
    y.sum().backward()
    assert layer.factor["default"].grad == layer.base_layer.linear(X).sum()


def test_without_a_gradient_asked_for_nothing_is_recorded():
    with torch.no_grad():
        assert not frozen()(X).requires_grad


def test_a_disabled_adapter_leaves_the_block_with_its_graph():
    layer = frozen()
    layer.enable_adapters(False)
    x = X.clone().requires_grad_(True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(layer(X), layer.base_layer(X))


def test_arguments_are_known_by_name_however_they_come():
    layer, mask = frozen(), torch.ones(2)
    layer(X, mask, scale=3.0, more=4)
    assert layer.call.x is X
    assert layer.call.tensor("mask") is mask
    assert layer.call.tensor("scale") is None
    assert (layer.call.named["scale"], layer.call.named["more"]) == (3.0, 4)
    layer(hidden_states=X)
    assert layer.call.x is X
    assert layer.call.tensor("mask") is None


def test_a_hook_on_the_block_sees_what_follows():
    layer, seen = frozen(), []
    layer.base_layer.register_forward_hook(lambda _, __, output: seen.append(output))
    assert layer(X) is seen[0]


FORMS: dict[str, Any] = {
    "tensor": None,
    "tuple": lambda y: (y, torch.zeros(1)),
    "list": lambda y: [y, torch.zeros(1)],
    "named": lambda y: Pair(y, torch.zeros(1)),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_tape_stands_in_for_the_block_in_the_form_of_its_output(form):
    layer, tape = frozen(FORMS[form]), Tape()
    layer.backbone.tape = tape
    first = layer(X)
    ((index, kept),) = tape.kept
    assert index == 4
    assert torch.equal(kept, layer.base_layer.linear(X))
    tape.is_full = True
    again = layer(X)
    assert layer.base_layer.runs == 1
    assert len(tape.kept) == 1
    assert type(again) is type(first)
    hidden = again if form == "tensor" else again[0]
    assert torch.equal(hidden, 2 * torch.ones_like(X))
    assert form == "tensor" or again[1] is None


def test_a_block_runs_once_before_a_tape_stands_in_for_it_to_show_the_form_of_its_output():
    layer, tape = frozen(FORMS["tuple"]), Tape()
    layer.backbone.tape, tape.is_full = tape, True
    assert torch.equal(layer(X)[0], 2 * layer.base_layer.linear(X))
    assert torch.equal(layer(X)[0], 2 * torch.ones_like(X))


def test_the_first_parameter_that_trains_is_named_once_and_recorded_through():
    layer = frozen()
    layer.base_layer.linear.weight.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"memory saving inactive: 'blocks\.4\.linear\.weight' requires grad"):
        layer(X).sum().backward()
    assert layer.base_layer.linear.weight.grad is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(X)


def test_its_update_is_no_function_of_the_block_alone():
    with pytest.raises(NotImplementedError, match="Doubling: the update comes from a network beside the model"):
        frozen().delta("default", X, X)
