"""Lightning's loop counters, set right where going on from them would train something else (Lightning 2.6.6).

Three places of Lightning part a resumed run from an unbroken one. `FitLoop.reset` leaves out the validation and the
end of the epoch when the checkpoint was taken on the last batch, and counts that epoch as never begun.
`FitLoop.restarting` is true whenever `max_steps` is set, so that an epoch that is over is entered again. A run that
`max_steps` or `max_time` stopped inside an epoch counts that epoch as trained.
"""

from enum import Enum
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops.evaluation_loop import RestartStage
from lightning.pytorch.loops.progress import _ProcessedTracker


class Taken(Enum):
    """When a checkpoint was taken."""

    AFTER_BATCH = "inside an epoch, before the validation that may follow a batch"
    AFTER_VALIDATION = "inside an epoch, after a validation"
    AFTER_STOP = "inside an epoch that max_steps or max_time cut short"
    AT_EPOCH_END = "at the end of an epoch, before a plateau schedule took its step"
    BETWEEN_EPOCHS = "after an epoch with all that belongs to it"

    @property
    def inside_epoch(self) -> bool:
        return self in (Taken.AFTER_BATCH, Taken.AFTER_VALIDATION, Taken.AFTER_STOP)


def mend(checkpoint: dict[str, Any]) -> Taken | None:
    """Change the counters in a loaded checkpoint to what they mean.

    Args:
        checkpoint: as Lightning loaded it; `checkpoint["loops"]` is changed in place.

    Returns:
        When it was taken; None without counters, or for one taken while an epoch was being started.
    """
    state = checkpoint.get("loops", {}).get("fit_loop")
    if not state:
        return None
    epoch, batch = state["epoch_progress"], state["epoch_loop.batch_progress"]
    if epoch["current"]["ready"] != epoch["current"]["started"]:
        return None
    taken = _when(epoch["current"], batch["current"], last_batch=batch["is_last_batch"])
    if taken is Taken.AFTER_BATCH:
        for count in (batch["total"], batch["current"]):
            count["completed"] = count["processed"]
    elif taken is Taken.AFTER_STOP:
        for count in (epoch["total"], epoch["current"]):
            count["processed"] -= 1
            count["completed"] = count["processed"]
    elif not taken.inside_epoch:
        state["state_dict"].pop("combined_loader", None)  # the next epoch has the loader begin
    return taken


def _when(epoch: dict[str, int], batch: dict[str, int], last_batch: bool) -> Taken:
    if epoch["processed"] < epoch["started"]:
        return Taken.AFTER_BATCH if batch["completed"] < batch["processed"] else Taken.AFTER_VALIDATION
    if batch["ready"] and not last_batch:
        return Taken.AFTER_STOP
    return Taken.AT_EPOCH_END if epoch["completed"] < epoch["processed"] else Taken.BETWEEN_EPOCHS


def go_on(trainer: L.Trainer, taken: Taken) -> None:
    """Set the loops to go on where the checkpoint was taken; for `on_train_start`, which precedes the epoch loop."""
    for saver in trainer.checkpoint_callbacks:
        if isinstance(saver, ModelCheckpoint) and saver._every_n_train_steps >= 1:
            # It has saved at this step; again on the next batch, it would save half of the gradients' accumulation.
            saver._last_global_step_saved = trainer.global_step
    if taken.inside_epoch:
        _into_epoch(trainer, taken)
    else:
        _to_next_epoch(trainer, taken)


def _into_epoch(trainer: L.Trainer, taken: Taken) -> None:
    loop = trainer.fit_loop.epoch_loop
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    validates = loop._should_check_val_fx(fetcher)
    if taken is Taken.AFTER_BATCH and validates:
        loop.val_loop._restarting = False
        loop.val_loop._restart_stage = RestartStage.RESTARTED_MID_EVALUATION  # the one stage that validates first
    elif taken is Taken.AFTER_BATCH and not loop._should_accumulate():
        loop._batches_that_stepped += 1  # counted after the checkpoint was taken
    if loop._num_ready_batches_reached() and not validates:
        loop.val_loop._has_run = True  # else the epoch loop asks for a batch more


def _to_next_epoch(trainer: L.Trainer, taken: Taken) -> None:
    fit_loop = trainer.fit_loop
    total, current = fit_loop.epoch_progress.total, fit_loop.epoch_progress.current
    assert isinstance(total, _ProcessedTracker)
    assert isinstance(current, _ProcessedTracker)
    if taken is Taken.AT_EPOCH_END:
        current.completed = current.processed - 1  # the number of the epoch, for schedules with a frequency
        fit_loop.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
    total.completed, current.completed = total.processed, current.processed
    _not_restarting(trainer)
    fit_loop.reset_restart_stage()


def end_epoch(trainer: L.Trainer) -> None:
    """Have the end of the epoch that was gone on with be that of any other; for `on_train_epoch_end`."""
    if trainer.fit_loop._restarting:
        _not_restarting(trainer)
        trainer.fit_loop.epoch_loop.val_loop._has_run = False


def _not_restarting(trainer: L.Trainer) -> None:
    # not by the property `restarting`: with max_steps it makes True of False
    fit_loop = trainer.fit_loop
    for loop in (fit_loop, fit_loop.epoch_loop, fit_loop.epoch_loop.val_loop):
        loop._restarting = False


def plateau_metrics(trainer: L.Trainer) -> dict[str, float]:
    """The metrics that plateau schedules watch, as far as they are known."""
    watched = [config.monitor for config in trainer.lr_scheduler_configs if config.reduce_on_plateau]
    return {name: float(trainer.callback_metrics[name]) for name in watched if name in trainer.callback_metrics}
