"""Lightning's Rich progress bar with loss, learning rate and the time left of the whole run."""

import time
from datetime import timedelta
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from typing_extensions import override

_SHORTEST_S = 0.1  # between two updates: an eye sees no more, and finding what they show takes time of every step


class ProgressBar(RichProgressBar):
    """`RichProgressBar` that also shows the learning rate of the first group and when the run will be done.

    Rich's own column counts down the epoch; `eta` is for all that is left of training, from the mean time of the
    optimizer steps taken since this fit began (validation included, once there was one). Training steps are shown ten
    times a second at most, and the last of an epoch always.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._started: tuple[float, int] | None = None  # seconds on the clock, optimizer steps already taken
        self._shown = 0.0  # seconds on the clock

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._started = (time.monotonic(), trainer.global_step)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        if trainer.is_last_batch or now - self._shown >= _SHORTEST_S:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            self._shown = now

    @override
    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        if trainer.training and trainer.optimizers:
            metrics["lr"] = f"{trainer.optimizers[0].param_groups[0]['lr']:.1e}"
            metrics["eta"] = self._time_left(trainer)
        return metrics

    def _time_left(self, trainer: L.Trainer) -> str:
        """h:mm:ss to the last optimizer step; `?` where the number of steps is not known or none is done yet."""
        total = trainer.estimated_stepping_batches
        if self._started is None or total in (-1, float("inf")):
            return "?"
        start, first_step = self._started
        done = trainer.global_step - first_step
        if done <= 0:
            return "?"
        seconds = (time.monotonic() - start) / done * max(0, total - trainer.global_step)
        return str(timedelta(seconds=round(seconds)))
