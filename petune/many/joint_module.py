"""`JointModule`: one layer of the frozen base for the rows of all runs, with each run's adapter for its own."""

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from petune.kernels.grouped_lora import grouped_lora_projections
from petune.low_rank import Operands
from petune.many.plan import Plan


class JointModule(nn.Module):
    """The base layer for all rows, and beside it each run's adapter for its own

    Low-rank updates go through `grouped_lora_projections`; any other layer of a run is called with the run's rows.

    Args:
        base: the frozen layer.
        plan: gives the plan of the call that runs.
    """

    def __init__(self, base: nn.Module, plan: Callable[[], Plan]) -> None:
        super().__init__()
        self.base = base
        self.layers: dict[Any, nn.Module] = {}  # a plain dictionary: they belong to the runs' own models
        self._plan = plan

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plan = self._plan()
        y, done = None, dict[Any, Operands]()
        if not args and not kwargs:
            with torch._C.DisableTorchFunction():  # the mode that draws dropout would look at thousands of attributes
                y, done = self._low_rank(plan, x)
        if y is not None and all(part.run in done or part.run not in self.layers for part in plan.parts):
            return y
        return self._by_runs(plan, x, y, done, args, kwargs)

    def _low_rank(self, plan: Plan, x: Tensor) -> tuple[Tensor | None, Container[Any]]:
        """The output by `grouped_lora_projections`, and the runs whose adapters are in it; None without any."""
        group = self.__dict__.get("group")
        y = None if group is None else group.take(self, x, _together, plan)
        if y is not None:
            return y, self.layers
        operands = _low_rank(self.adapted(plan), x)
        return _grouped(plan, x, [operands], self.layers)[0] if operands else None, operands

    def adapted(self, plan: Plan) -> dict[Any, nn.Module]:
        """The layers of the runs of this call that adapt it, in the order of their rows."""
        return {part.run: self.layers[part.run] for part in plan.parts if part.run in self.layers}

    def __getattr__(self, name: str) -> Any:
        if name == "base" or name.startswith("_"):
            return super().__getattr__(name)
        return getattr(self.base, name)  # models ask for a layer's weight, or its dtype

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


def _low_rank(layers: Mapping[Any, nn.Module], x: Tensor) -> dict[Any, Operands]:
    """What `grouped_lora` needs of each run's layer, without those that must be called."""
    found: dict[Any, Operands] = {}
    for run, layer in layers.items():
        operands: Callable[[Tensor], Operands | None] | None = getattr(layer, "operands", None)
        own = None if operands is None else operands(x)
        if own is not None:
            found[run] = own
    return found


def _together(siblings: Sequence[Any], x: Tensor) -> Sequence[Tensor] | None:
    """The outputs of joint modules that all runs compute together; None where one of them does not."""
    plan: Plan = siblings[0]._plan()
    layers: list[dict[Any, Any]] = [sibling.adapted(plan) for sibling in siblings]
    operands: list[dict[Any, Operands]] = []
    for own in layers:
        operands.append(_low_rank(own, x))
        if not own or operands[-1].keys() != layers[0].keys() or own.keys() != layers[0].keys():
            return None
    for run in layers[0]:
        found = [own[run] for own in operands]
        kinds = {(one.dropout_p, one.rank_dropout_p, one.a.dtype, one.b.dtype) for one in found}
        if len(kinds) > 1 or found[0].rank_dropout_p:
            return None
        groups = [own[run].__dict__.get("group") for own in layers]
        if found[0].dropout_p and (groups[0] is None or any(one is not groups[0] for one in groups)):
            return None  # alone each of them draws a mask of its own
    return _grouped(plan, x, operands, layers[0])


def _grouped(
    plan: Plan, x: Tensor, projections: Sequence[Mapping[Any, Operands]], layers: Mapping[Any, nn.Module]
) -> tuple[Tensor, ...]:
    """The outputs of projections of x that the same runs adapt.

    Args:
        plan: of the call.
        x: of all rows.
        projections: what each run brings to it.
        layers: of the first one, to find the seeds.
    """
    runs = list(projections[0])
    columns = [[own[run] for run in runs] for own in projections]
    first = columns[0]
    dropouts = [one.dropout_p for one in first]
    seeds = token_index = None
    if any(dropouts):
        seeds = [plan.seed(run, layers[run], x.device) if p else 0 for run, p in zip(runs, dropouts, strict=True)]
        token_index = plan.token_index(x.numel() // x.shape[-1], x.device)
    ranks = {run: (len(one.a), one.rank_dropout_p) for run, one in zip(runs, first, strict=True)}
    return grouped_lora_projections(
        x,
        [own[0].weight for own in columns],
        [own[0].bias for own in columns],
        [[one.a for one in own] for own in columns],
        [[one.b for one in own] for own in columns],
        [[one.scale for one in own] for own in columns],
        plan.groups(tuple(runs)),
        dropout_p=dropouts,
        seeds=seeds,
        token_index=token_index,
        rank_mask=plan.rank_mask(x, ranks) if any(p for _, p in ranks.values()) else None,
    )
