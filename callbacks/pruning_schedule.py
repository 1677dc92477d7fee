"""The schedule of pruning-aware tuning: a mask that hardens while the model trains."""

import math
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from petune.adapters.pat.schedule import MaskSchedule, find_tuner


class PruningSchedule(Callback):
    """Advance the mask of the active PatConfig adapter after each optimizer step.

    Sets the adapter's `total_steps`, where it has none, to the optimizer steps of the run; a mask that is soft in the
    end is made hard, with a warning. The mask's step is in every checkpoint, so that a resumed run goes on as one
    in one go. Every `log_every_n_steps` of the Trainer, its loggers get `pat/kept_channels`, `pat/temperature` and
    `pat/<term>_loss`.

    Raises:
        MisconfigurationException: when training starts, if the model has no active adapter with a mask, there are
            several optimizers, or the length of the run is not known.
        FloatingPointError: a term of the loss is not finite.
    """

    def __init__(self) -> None:
        self.history: list[tuple[int, Tensor]] = []
        """(optimizer steps, M [width] on the CPU) at the start, at each step logged, and when the mask got hard."""
        self._schedule: MaskSchedule | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Not earlier: the length of a run makes its loaders, and a resumed run gives theirs their state before this.
        tuner = find_tuner(pl_module)
        if tuner is None:
            raise MisconfigurationException(
                f"PruningSchedule found no mask of an active adapter in {type(pl_module).__name__}; put a PatConfig "
                "adapter on the model and activate it, or leave the callback out."
            )
        if len(trainer.optimizers) > 1:
            raise MisconfigurationException(
                f"PruningSchedule counts optimizer steps, and {type(pl_module).__name__} has several optimizers that "
                "step one by one; use one with parameter groups, or leave the callback out and call "
                "model.base_model.advance() yourself."
            )
        self._schedule = MaskSchedule(tuner, trainer.global_step)
        self._schedule.begin(_length(trainer) if self._schedule.needs_length else None)
        self.history = self._schedule.history

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._schedule is not None  # training has started
        if pl_module.automatic_optimization and isinstance(outputs, Mapping) and "loss" in outputs:
            self._schedule.complete(outputs["loss"] * trainer.accumulate_grad_batches)  # Lightning has divided by it
        every: int = trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        if self._schedule.advance_to(trainer.global_step, log_every=every):
            for logger in trainer.loggers:  # not self.log: a model card would list them among the metrics
                logger.log_metrics(self._schedule.scalars(), step=trainer.global_step)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._schedule is not None:
            self._schedule.finish()


def _length(trainer: L.Trainer) -> float:
    total = trainer.estimated_stepping_batches
    if total in (-1, math.inf):
        raise MisconfigurationException(
            "PruningSchedule cannot tell how many optimizer steps the run will take; set max_steps or max_epochs of "
            "the Trainer (max_steps where a loader has no length), or PatConfig.total_steps."
        )
    return total
