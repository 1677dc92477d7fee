"""One frozen base for several runs: their adapters' layers meet in a copy of it that shares the weights."""

import copy
from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase as _BatchNorm

from petune.adapters.lora import unfuse
from petune.adapters.lora.group import Group, detach
from petune.many.joint_module import JointModule
from petune.many.plan import Plan, Run
from petune.state import base_parameters


class JointBackbone:
    """A model's backbone in which each row takes the adapters of the run that it belongs to

    Args:
        body: backbone of the first run's model, adapters included; it is not changed, and its frozen tensors are
            those of the joint model.

    Attributes:
        model: the backbone without adapters, where each layer that a run adapts looks up whose rows
            it is given.
    """

    def __init__(self, body: nn.Module) -> None:
        frozen = {id(tensor): tensor for _, _, tensor in base_parameters(body)}
        frozen |= {id(buffer): buffer for buffer in body.buffers()}
        self.model = _without_adapters(copy.deepcopy(body, frozen))
        repeats = any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules())
        self.deviates = repeats or any(isinstance(one, _BatchNorm) for one in self.model.modules())
        """Whether a run's own model in training is something else: with dropout, or with statistics of its batch."""
        self.has_dropout = not repeats and any(rate > 0.0 for *_, rate in _dropouts(self.model))
        """Whether the base's own dropout is on; not where layers run again in backward, and would draw again."""
        (_prepare_to_repeat if repeats else _prepare)(self.model)
        self._plan: Plan | None = None
        self._adapted: dict[str, JointModule] = {}

    @property
    def plan(self) -> Plan:
        """Of the call that runs."""
        assert self._plan is not None
        return self._plan

    @contextmanager
    def running(self, plan: Plan) -> Generator[None]:
        """Inside, the model's rows are those of the plan."""
        self._plan = plan
        with plan.dropout if self.has_dropout else nullcontext():
            try:
                yield
            finally:
                self._plan = None

    def add(self, run: Run, body: nn.Module) -> None:
        """Take a run's adapters in: from now on a plan may have rows of it."""
        for name, layer in adapted_layers(body):
            if name not in self._adapted:
                base = self.model.get_submodule(name)
                joint = self._adapted[name] = JointModule(base, lambda: self.plan)
                _replace(self.model, name, joint)
            self._adapted[name].layers[run] = layer
        self._group()

    def remove(self, run: Run) -> None:
        """Let go of a run's adapters."""
        for name, joint in list(self._adapted.items()):
            joint.layers.pop(run, None)
            if not joint.layers:
                _replace(self.model, name, joint.base)
                del self._adapted[name]
        self._group()

    def _group(self) -> None:
        """Compute together what the runs' own models compute together."""
        for parent in self.model.modules():
            detach(parent)
        found: dict[tuple[str, tuple[str, ...]], None] = {}
        for name, joint in self._adapted.items():
            for layer in joint.layers.values():
                group = layer.__dict__.get("group")
                if isinstance(group, Group):
                    found[name.rpartition(".")[0], group.names] = None
        for prefix, names in found:
            parent = self.model.get_submodule(prefix)
            if all(isinstance(parent._modules.get(name), JointModule) for name in names):
                Group(names).attach(parent)


def _prepare(body: nn.Module) -> None:
    """Training mode, but no running statistics that move."""
    body.train()
    for module in body.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def _prepare_to_repeat(body: nn.Module) -> None:
    """Eval mode, no dropout, and activation checkpointing on where it was asked for."""
    body.eval()
    for module, name, _ in list(_dropouts(body)):
        setattr(module, name, 0.0)
    for module in body.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True  # transformers looks at both; the layers below stay in eval mode


def _dropouts(body: nn.Module) -> Iterator[tuple[nn.Module, str, float]]:
    """(module, attribute, rate) of what models call a dropout."""
    for module in body.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or (name == "p" and isinstance(module, nn.Dropout))):
                yield module, name, value


def adapted_layers(body: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, layer) of every layer of the body that a run has a version of its own of, the outermost alone."""
    found: list[str] = []
    for name, module in body.named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not name.startswith(tuple(found)):
            found.append(f"{name}.")
            yield name, module


def _without_adapters(body: nn.Module) -> nn.Module:
    unfuse(body)
    for name, module in list(adapted_layers(body)):
        _replace(body, name, module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module)
    return body


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def share(model: nn.Module, body: nn.Module, base: dict[str, Tensor]) -> None:
    """Have a run's model hold the tensors of the joint base in the place of its own.

    Args:
        model: of the run; its frozen head is shared too, where it is the same.
        body: its backbone.
        base: frozen parameters by their names in the model; those of this model are added.

    Raises:
        ValueError: the backbone trains, or is not the one that the others have.
    """
    inside = {id(tensor) for _, _, tensor in base_parameters(body)}
    shared: dict[int, Tensor] = {}
    for name, _, tensor in base_parameters(model):
        if tensor.requires_grad:
            if id(tensor) in inside:
                raise ValueError(
                    f"{name} of the base trains, and runs that train together share a frozen one; train an adapter "
                    "alone, or this run on its own by `petune fit`."
                )
            continue
        known = base.setdefault(name, tensor)
        if known is tensor:
            continue
        if known.shape == tensor.shape and known.dtype == tensor.dtype and torch.equal(known, tensor):
            shared[id(tensor)] = known
        elif id(tensor) in inside:
            raise ValueError(
                f"{name} is not the same in this run's base and in that of the first run; give all runs one base "
                "model, in one dtype."
            )
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in shared:
                module._parameters[name] = shared[id(parameter)]  # pyright: ignore[reportArgumentType]
