"""One frozen base for several runs: their adapters' layers meet in a copy of it that shares the weights."""

import copy
from collections.abc import Callable, Container, Generator, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase as _BatchNorm

from petune.adapters.lora import unfuse
from petune.kernels.grouped_lora import RowGroups, grouped_lora
from petune.low_rank import Operands, rank_mask
from petune.many.calls import Span, part_of
from petune.many.dropout import DropoutByRun
from petune.state import base_parameters


class Run(Protocol):
    """Whose rows they are."""

    name: str

    def generators(self) -> AbstractContextManager[None]:
        """Inside, what is drawn comes from the run's own random generators."""
        ...

    def draws(self) -> AbstractContextManager[None]:
        """As `generators`, of torch's alone."""
        ...


class Part(NamedTuple):
    """The rows of one run in a joint call."""

    run: Hashable
    span: Span


class Plan:
    """Whose rows are where, in one joint call, and what was drawn for their dropout.

    A call that activation checkpointing repeats in its backward is given the same seeds.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        self.rows = parts[-1].span.stop
        self.dropout = DropoutByRun(self.parts)
        self._groups: dict[tuple[Hashable, ...], RowGroups] = {}
        self._seeds: dict[tuple[Hashable, int], Tensor] = {}
        self._indices: dict[tuple[int, torch.device], Tensor | None] = {}

    def groups(self, runs: tuple[Hashable, ...]) -> RowGroups:
        """The rows of these runs as 0, 1, …; those of the others have no adapter."""
        if runs not in self._groups:
            order = {run: index for index, run in enumerate(runs)}
            ids = [order.get(part.run, -1) for part in self.parts for _ in range(part.span.start, part.span.stop)]
            self._groups[runs] = RowGroups.of(ids, len(runs))
        return self._groups[runs]

    def seed(self, run: Any, layer: nn.Module, device: torch.device) -> Tensor:
        """Of the dropout of a run's layer, as the layer would draw it alone: projections of one input share theirs."""
        key = (run, id(layer.__dict__.get("group") or layer))
        if key not in self._seeds:
            with run.draws():
                self._seeds[key] = torch.randint(2**63 - 1, (1,), device=device)
        return self._seeds[key]

    def rank_mask(self, x: Tensor, ranks: Mapping[Any, tuple[int, float]]) -> Tensor:
        """Dropout of s = x Aᵀ as each run draws it alone: 0 or 1 / (1 − p), [tokens, largest rank].

        Args:
            x: of all rows together.
            ranks: of each run with an adapter, and its p; the others drop nothing.
        """
        widest = max(rank for rank, _ in ranks.values())
        per_row = x.numel() // (x.shape[-1] * self.rows)
        mask = x.new_ones(self.rows, per_row, widest)
        for run, span in self.parts:
            rank, p = ranks.get(run, (0, 0.0))
            if p:
                own = part_of(mask[span.start : span.stop, :, :rank], span)
                with run.draws():  # pyright: ignore[reportAttributeAccessIssue]
                    own.copy_(rank_mask(own, rank, p).view_as(own))
        return mask.view(-1, widest)

    def token_index(self, tokens: int, device: torch.device) -> Tensor | None:
        """Which token each is among those of its run alone, where padding has moved them; else None.

        Args:
            tokens: of all rows together.
        """
        key = (tokens, device)
        if key not in self._indices:
            self._indices[key] = self._token_index(tokens // self.rows, device)
        return self._indices[key]

    def _token_index(self, tokens_per_row: int, device: torch.device) -> Tensor | None:
        spans = [part.span for part in self.parts]
        if all(span.length == span.padded or span.padded != tokens_per_row for span in spans):
            return None
        indices: list[Tensor] = []
        for span in spans:
            rows, columns = torch.arange(span.stop - span.start)[:, None], torch.arange(span.padded)[None]
            own = rows * span.length + columns
            # what is padded stands behind the run's own tokens
            beyond = len(rows) * span.length + rows * (span.padded - span.length) + columns - span.length
            indices.append(torch.where(columns < span.length, own, beyond).flatten())
        return torch.cat(indices).to(device)


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
        self._adapted: dict[str, _JointModule] = {}

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
                joint = self._adapted[name] = _JointModule(base, self)
                _replace(self.model, name, joint)
            self._adapted[name].layers[run] = layer

    def remove(self, run: Run) -> None:
        """Let go of a run's adapters."""
        for name, joint in list(self._adapted.items()):
            joint.layers.pop(run, None)
            if not joint.layers:
                _replace(self.model, name, joint.base)
                del self._adapted[name]


class _JointModule(nn.Module):
    """The base layer for all rows, and beside it each run's adapter for its own

    Low-rank updates go through `grouped_lora`; any other layer of a run is called with the run's rows.
    """

    def __init__(self, base: nn.Module, joint: JointBackbone) -> None:
        super().__init__()
        self.base = base
        self.layers: dict[Any, nn.Module] = {}  # a plain dictionary: they belong to the runs' own models
        self._joint = (joint,)  # in a tuple, so that no cycle of modules comes about

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plan = self._joint[0].plan
        mine = {part.run: self.layers[part.run] for part in plan.parts if part.run in self.layers}
        low_rank: dict[Any, Operands] = {}
        if not args and not kwargs:
            low_rank = {run: found for run, layer in mine.items() if (found := _operands(layer, x)) is not None}
        y = self._grouped(plan, x, low_rank) if low_rank else None
        if y is not None and len(low_rank) == len(mine):
            return y
        return self._by_runs(plan, x, y, low_rank, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "base" or name.startswith("_"):
            return super().__getattr__(name)
        return getattr(self.base, name)  # models ask for a layer's weight, or its dtype

    def _grouped(self, plan: Plan, x: Tensor, low_rank: dict[Any, Operands]) -> Tensor:
        operands = list(low_rank.values())
        ranks = {run: (len(one.a), one.rank_dropout_p) for run, one in low_rank.items()}
        dropouts = [one.dropout_p for one in operands]
        seeds = token_index = None
        if any(dropouts):
            seeds = [
                plan.seed(run, self.layers[run], x.device) if one.dropout_p else 0 for run, one in low_rank.items()
            ]
            token_index = plan.token_index(x.numel() // x.shape[-1], x.device)
        return grouped_lora(
            x,
            operands[0].weight,
            operands[0].bias,
            [one.a for one in operands],
            [one.b for one in operands],
            [one.scale for one in operands],
            plan.groups(tuple(low_rank)),
            dropout_p=dropouts,
            seeds=seeds,
            token_index=token_index,
            rank_mask=plan.rank_mask(x, ranks) if any(p for _, p in ranks.values()) else None,
        )

    def _by_runs(
        self,
        plan: Plan,
        x: Tensor,
        y: Tensor | None,
        done: Container[Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """y, with the rows of each run that is not done taken from its own layer; without y, those of the base too."""
        rows = [len(x) // plan.rows * (part.span.stop - part.span.start) for part in plan.parts]
        outputs = [None] * len(rows) if y is None else list(y.split(rows))
        for index, (part, own) in enumerate(zip(plan.parts, x.split(rows), strict=True)):
            layer: Any = self.layers.get(part.run)
            if layer is not None and part.run not in done:
                with part.run.generators(), plan.dropout.passing():  # pyright: ignore[reportAttributeAccessIssue]
                    outputs[index] = layer(own, *args, **kwargs)
            elif outputs[index] is None:
                outputs[index] = self.base(own, *args, **kwargs)
        return torch.cat(cast("list[Tensor]", outputs))


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


def _operands(layer: nn.Module, x: Tensor) -> Operands | None:
    """What `grouped_lora` needs of a layer, or None where the layer must be called."""
    operands: Callable[[Tensor], Operands | None] | None = getattr(layer, "operands", None)
    return None if operands is None else operands(x)


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
