"""Which experts a routed model uses: load, entropy, and how much of it tasks share."""

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F

from petune.callbacks.expert_counts import Counts, RouterHooks, find_routers, sum_over_processes, total
from petune.state import find_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ALL = "all"  # the task of a batch that names none and comes from no numbered loader


class ExpertUsage(Callback):
    """Count how often each expert of each routed feed-forward is chosen, and log it at the end of every epoch.

        load p(e)      = (token, expert) pairs with expert e / all pairs; 1 / num_experts where use is even
        entropy_bits   = −Σ p(e) log₂ p(e), 0 to log₂ num_experts
        overlap(a, b)  = Σ min(p_a(e), p_b(e)), 0 where tasks a and b share no expert, 1 where they use them alike

    Padding is not counted, nor is the sanity check; the counts of all processes are summed. A router whose top_k is
    num_experts makes no choice and is left out, as is one in a model that was compiled and called before. A batch
    belongs to the task in its entry `task`, else to its loader. Logged: `experts/<stage>/<layer>/` with
    `entropy_bits`, `max_load`, `min_load` and `overlap/<a>/<b>`. Each epoch of a stage (train, val, test or predict)
    begins anew, and the last one is what the methods tell of.

    Args:
        tasks: names of the loaders of validation, test and prediction, in their order; else their numbers.

    Raises:
        MisconfigurationException: the model has no routers; a batch mixes tasks.
    """

    def __init__(self, tasks: Sequence[str] = ()) -> None:
        self.task_names = list(tasks)
        self._counts: dict[str, dict[str, Counts]] = {}  # by stage and task
        self._last = ""  # stage
        self._hooks: RouterHooks | None = None

    # --- what was counted ---

    def tasks(self, stage: str | None = None) -> list[str]:
        """The tasks that were counted in a stage; by default the one that ran last."""
        return list(self._tasks(stage))

    def loads(self, task: str | None = None, stage: str | None = None) -> dict[str, Tensor]:
        """By layer, the share of the pairs that each expert has, float64 [num_experts], on the CPU.

        Args:
            task: None for all of them.
            stage: None for the one that ran last.

        Raises:
            ValueError: no such task or stage was counted.
        """
        by_task = self._tasks(stage)
        if task is not None and task not in by_task:
            raise ValueError(f"ExpertUsage counted no task {task!r}; it counted {', '.join(by_task) or 'none'}.")
        counts = total(by_task.values() if task is None else [by_task[task]])
        return {layer: pairs.double() / pairs.sum() for layer, pairs in counts.items() if pairs.any()}

    def entropy_bits(self, task: str | None = None, stage: str | None = None) -> dict[str, float]:
        """By layer, the entropy of the load; arguments and errors of `loads`."""
        return {layer: _entropy_bits(load) for layer, load in self.loads(task, stage).items()}

    def overlap(self, first: str, second: str, stage: str | None = None) -> dict[str, float]:
        """By layer, how much of their load two tasks share, 0 to 1; errors of `loads`."""
        ours, theirs = self.loads(first, stage), self.loads(second, stage)
        return {layer: torch.minimum(ours[layer], theirs[layer]).sum().item() for layer in ours if layer in theirs}

    def figure(self, task: str | None = None, stage: str | None = None) -> "Figure":
        """A heat map of the load, a row for each layer and a column for each expert; arguments of `loads`.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: nothing was counted.
        """
        loads = self.loads(task, stage)
        if not loads:
            raise ValueError("ExpertUsage has counted nothing to draw; run the trainer, or a model inside `watch`.")
        return _heat_map(loads)

    @contextmanager
    def watch(self, model: nn.Module, task: str = _ALL) -> Generator["ExpertUsage", None, None]:
        """Count what `model` chooses inside the block, without a trainer, on top of what stage "watch" has.

        Raises:
            MisconfigurationException: the model has no routers.
        """
        hooks = _attach(model)
        try:
            hooks.counts = self._place("watch", task)
            yield self
        finally:
            hooks.remove()

    # --- the trainer's hooks ---

    def _start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._hooks is None:  # validation inside a fit has them already
            self._hooks = _attach(pl_module)

    def _begin_epoch(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._counts.pop(_stage(trainer), None)

    def _begin_batch(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = -1
    ) -> None:
        if self._hooks is not None and not trainer.sanity_checking:
            self._hooks.counts = self._place(_stage(trainer), self._task(batch, dataloader_idx))

    def _end_batch(self, *_: Any, **__: Any) -> None:
        if self._hooks is not None:
            self._hooks.counts = None

    def _begin_backward(self, *_: Any, **__: Any) -> None:
        if self._hooks is not None:
            self._hooks.paused = True  # gradient checkpointing runs the forward again

    def _end_backward(self, *_: Any, **__: Any) -> None:
        if self._hooks is not None:
            self._hooks.paused = False

    def _end_epoch(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        stage = _stage(trainer)
        if trainer.sanity_checking:
            return
        self._counts[stage] = sum_over_processes(self._counts.get(stage, {}))
        if not trainer.predicting:  # where Lightning refuses to log
            # the values agree already; without sync_dist Lightning warns that they might not
            pl_module.log_dict(self._scalars(stage), sync_dist=True)

    def _stop(self, *_: Any, **__: Any) -> None:
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None

    on_fit_start = on_validation_start = on_test_start = on_predict_start = _start
    on_train_epoch_start = on_validation_epoch_start = on_test_epoch_start = on_predict_epoch_start = _begin_epoch
    on_train_batch_start = on_validation_batch_start = on_test_batch_start = on_predict_batch_start = _begin_batch
    on_train_batch_end = on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _end_batch
    on_train_epoch_end = on_validation_epoch_end = on_test_epoch_end = on_predict_epoch_end = _end_epoch
    on_before_backward, on_after_backward = _begin_backward, _end_backward
    on_exception = teardown = _stop

    # --- the counts ---

    def _tasks(self, stage: str | None) -> dict[str, Counts]:
        stage = self._last if stage is None else stage
        if stage and stage not in self._counts:
            raise ValueError(
                f"ExpertUsage counted no stage {stage!r}; it counted {', '.join(self._counts) or 'none'}."
            )
        return self._counts.get(stage, {})

    def _place(self, stage: str, task: str) -> Counts:
        self._last = stage
        return self._counts.setdefault(stage, {}).setdefault(task, {})

    def _task(self, batch: Any, loader: int) -> str:
        tag = batch.get("task") if isinstance(batch, Mapping) else None
        names = {tag} if isinstance(tag, str) else set(tag) if isinstance(tag, list | tuple) else set[Any]()
        if len(names) > 1:
            raise MisconfigurationException(
                f"ExpertUsage: a batch holds the tasks {', '.join(sorted(map(str, names)))}; "
                "give batches of one task each."
            )
        if names:
            return str(names.pop())
        if loader < 0:
            return _ALL
        return self.task_names[loader] if loader < len(self.task_names) else str(loader)

    def _scalars(self, stage: str) -> dict[str, float]:
        scalars: dict[str, float] = {}
        for layer, load in self.loads(stage=stage).items():
            scalars[f"{layer}/entropy_bits"] = _entropy_bits(load)
            scalars[f"{layer}/max_load"] = load.max().item()
            scalars[f"{layer}/min_load"] = load.min().item()
        for first, second in combinations(self.tasks(stage), 2):
            for layer, value in self.overlap(first, second, stage).items():
                scalars[f"{layer}/overlap/{first}/{second}"] = value
        return {f"experts/{stage}/{name}": value for name, value in scalars.items()}


def _stage(trainer: L.Trainer) -> str:
    stage = trainer.state.stage
    assert stage is not None  # inside of a run
    return stage.dataloader_prefix or ""


def _attach(module: nn.Module) -> RouterHooks:
    model = find_model(module)
    if not find_routers(model):
        raise MisconfigurationException(
            f"ExpertUsage found no router in {type(model).__name__}; put an EmoeConfig adapter on the model, or leave "
            "the callback out."
        )
    return RouterHooks(model)


def _entropy_bits(load: Tensor) -> float:
    return torch.special.entr(load).sum().item() / math.log(2)


def _heat_map(loads: dict[str, Tensor]) -> "Figure":
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            'ExpertUsage.figure draws with matplotlib, which is not installed; run: pip install "petune[notebooks]"'
        ) from error
    widest = max(map(len, loads.values()))
    rows = [F.pad(load, (0, widest - len(load)), value=math.nan) for load in loads.values()]
    figure, axes = pyplot.subplots(figsize=(8.0, 2.0 + 0.3 * len(rows)), layout="constrained")
    image = axes.imshow(torch.stack(rows), aspect="auto", vmin=0.0, interpolation="nearest")
    axes.set_yticks(range(len(rows)), list(loads))
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("expert")
    figure.colorbar(image, label="load")
    pyplot.close(figure)  # a notebook would show it twice: as what is open, and as what is returned
    return figure
