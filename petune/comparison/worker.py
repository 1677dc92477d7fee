"""`python -m petune.comparison …`: `petune fit` with these arguments, measured; run.json in its folder tells.

A process of its own for each run, so that the peak memory is that run's, and a crash ends no other run.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.model_helpers import is_overridden

from petune.callbacks import ExportAdapter, MemoryReport
from petune.callbacks.memory_report import peak_memory_bytes
from petune.cli.arguments import resolve_recipes
from petune.cli.describe import adapter_line
from petune.cli.errors import UsageError, report
from petune.cli.quiet import quiet
from petune.cli.train import PetuneCLI
from petune.comparison.record import CUDA, RESIDENT, Record, write_record
from petune.memory import count_parameters
from petune.tasks.file_data import FileData
from petune.tasks.text_data import SplitName, TextData


class Stopwatch(Callback):
    """Seconds, rows and peak memory of the training, the parts of an interrupted run together."""

    def __init__(self, own_process: bool) -> None:
        self.own_process = own_process
        self.seconds = 0.0
        self.rows = {"train": 0}
        """Of all training steps; by val and test those of the last evaluation."""
        self.peak_bytes: int | None = None
        self._since: float | None = None  # on the clock, while it runs
        self._validating = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._count("train", batch, trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.rows["val"] = 0
        self._validating = self._since is not None  # and not a look at the data before, or a measurement after
        self._stop()

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._count("val", batch, trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._validating:
            self._since = time.monotonic()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.rows["test"] = 0

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._count("test", batch, trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()
        self._look_at_memory(pl_module.device)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._look_at_memory(pl_module.device)

    def state_dict(self) -> dict[str, Any]:
        running = 0.0 if self._since is None else time.monotonic() - self._since
        seen = {"train_rows": self.rows["train"], "peak_bytes": self.peak_bytes}
        return {"seconds": self.seconds + running, **seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds, self.rows["train"] = state_dict["seconds"], state_dict["train_rows"]
        self.peak_bytes = state_dict["peak_bytes"]

    def _stop(self) -> None:
        if self._since is not None:
            self.seconds += time.monotonic() - self._since
            self._since = None

    def _count(self, split: str, batch: Any, trainer: L.Trainer) -> None:
        self.rows[split] += extract_batch_size(batch) * trainer.world_size

    def _look_at_memory(self, device: torch.device) -> None:
        if device.type == "cuda" or self.own_process:  # CUDA's is counted from the start of the fit
            self.peak_bytes = max(self.peak_bytes or 0, peak_memory_bytes(device) or 0) or None


class MeasuredFit(PetuneCLI):
    """`petune fit`, and then all metrics of the trained model; writes a `Record` into the folder of the run.

    Args:
        arguments: of fit, recipes resolved.
        own_process: this process does nothing else.
        together: runs that train at the same time, this one included.
    """

    def __init__(self, arguments: list[str], *, own_process: bool, together: int = 1) -> None:
        self.stopwatch, self.together = Stopwatch(own_process), together
        super().__init__(["fit", *arguments])

    def _missing_callbacks(self, given: list[Callback]) -> Iterator[Callback]:
        for callback in super()._missing_callbacks(given):
            if isinstance(callback, MemoryReport):
                callback.print_table = False  # the comparison has one
            if self.model.trained == "adapter" or not isinstance(callback, ExportAdapter):  # a whole model a run
                yield callback
        yield self.stopwatch

    def after_fit(self) -> None:
        """Measure, and write what was found.

        Raises:
            UsageError: there is nothing to measure on.
        """
        metrics = self._evaluate()
        if self.trainer.is_global_zero:
            write_record(self.run_folder, self._record(metrics))

    def _evaluate(self) -> dict[str, float]:
        """Of the last weights, on all rows: a run of max_steps may end without a validation."""
        metrics: dict[str, float] = {}
        loops: dict[SplitName, Any] = {"validation": self.trainer.validate, "test": self.trainer.test}
        for split, evaluate in loops.items():
            if has_split(self.datamodule, split):
                found = evaluate(self.model, datamodule=self.datamodule, verbose=False)
                metrics |= {name: float(value) for part in found for name, value in part.items()}
        if not metrics:
            raise UsageError("there is neither validation nor test data to measure on; give one of them to the data.")
        return metrics

    def _record(self, metrics: dict[str, float]) -> Record:
        counts, device = count_parameters(self.model), self.model.device
        costs = [callback.report for callback in self.trainer.callbacks if isinstance(callback, MemoryReport)]  # pyright: ignore[reportAttributeAccessIssue]
        alone = self.together == 1  # what a step takes together is no run's own
        saved = costs[0].get("saved_for_backward_bytes") if costs and alone else None
        return Record(
            metrics=metrics,
            rows=self.stopwatch.rows,
            adapter=adapter_line(self.model).removeprefix("adapter: "),
            learning_rate=self.model.learning_rate,
            trainable_parameters=counts["trainable"],
            weights_bytes=_weights_bytes(self.run_folder / "adapter") or counts["trainable_bytes"],
            peak_memory_bytes=self.stopwatch.peak_bytes if alone else None,
            memory=CUDA if device.type == "cuda" else RESIDENT,
            saved_for_backward_bytes=None if saved is None else int(saved),
            seconds=self.stopwatch.seconds / self.together,
            together=self.together,
            steps=self.trainer.global_step,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        )


def has_split(data: Any, split: SplitName) -> bool:
    """Whether a data module has rows of a split; one of the user's, whether it has the loader."""
    if isinstance(data, TextData | FileData):
        given = data.source(split) is not None if isinstance(data, TextData) else data.given(split)
        return given or (split == "validation" and data._has_validation())
    return is_overridden("val_dataloader" if split == "validation" else f"{split}_dataloader", data)


def _weights_bytes(adapter: Path) -> int:
    return sum(path.stat().st_size for pattern in ("*.safetensors", "*.bin") for path in adapter.glob(pattern))


def measured_fit(arguments: list[str], *, own_process: bool) -> None:
    """Train and measure one run.

    Args:
        arguments: of `petune fit`.
        own_process: this process does nothing else, so that its peak memory is the run's.

    Raises:
        UsageError: an argument is wrong, or there is nothing to measure on; and whatever the fit raises.
    """
    with quiet():
        MeasuredFit([*resolve_recipes(arguments), "--trainer.enable_progress_bar=false"], own_process=own_process)


def main() -> int:
    """Run it; the traceback of an error goes to stderr, its sentence below."""
    try:
        measured_fit(sys.argv[1:], own_process=True)
    except (Exception, KeyboardInterrupt) as error:
        return report(error, debug=True)
    return 0
