"""Count what the run costs: parameters, bytes, tokens a second."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table
from torch import Tensor

from petune.callbacks.out_of_memory import advise
from petune.fsdp2 import is_sharded
from petune.memory import SavedBytes, count_parameters

_MIB = 2**20


class MemoryReport(Callback):
    """Measure one forward pass and the whole fit, log the numbers, and print them when the fit ends.

    Afterwards `report` has: trainable_parameters, total_parameters, adapter_bytes, saved_for_backward_bytes (of the
    first batch, each storage once, parameters and buffers not counted; with non-reentrant gradient checkpointing, what
    lies outside the checkpointed blocks; not under FSDP2, whose gathered weights would count), peak_memory_bytes (of
    the CUDA allocator, or the process's resident set), tokens_per_second (padding not counted, data loading counted,
    validation and the first batch not).

    A training step that runs out of memory has its message end in the smallest change that would fit.

    Args:
        print_table: print a table on the first process.
    """

    def __init__(self, print_table: bool = True) -> None:
        self.print_table = print_table
        self.report: dict[str, float] = {}
        self._saved: SavedBytes | None = None
        self._last_end: float | None = None
        self._seconds = 0.0
        self._tokens = 0
        self._batch: Any = None  # that is being trained on

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        counts = count_parameters(pl_module)
        self.report = {
            "trainable_parameters": counts["trainable"],
            "total_parameters": counts["total"],
            "adapter_bytes": counts["adapter_bytes"],
        }
        self._last_end, self._seconds, self._tokens = None, 0.0, 0
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch = batch
        if "saved_for_backward_bytes" not in self.report and not is_sharded(pl_module):
            self._saved = SavedBytes([*pl_module.parameters(), *pl_module.buffers()]).__enter__()

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        self._end_measurement()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._end_measurement()  # a step without backward
        self._batch = None
        now = time.monotonic()
        if self._last_end is not None:
            self._seconds += now - self._last_end
            self._tokens += count_tokens(batch)
        self._last_end = now

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._end_measurement()
        if isinstance(exception, torch.OutOfMemoryError) and self._batch is not None:
            # in place: Lightning raises what it caught
            exception.args = (advise(pl_module, self._batch, exception, trainer.accumulate_grad_batches),)
        self._batch = None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._last_end = None

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._last_end = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        peak = peak_memory_bytes(pl_module.device)
        if peak is not None:
            self.report["peak_memory_bytes"] = peak
        if self._seconds and self._tokens:
            self.report["tokens_per_second"] = self._tokens / self._seconds
        for logger in trainer.loggers:
            logger.log_metrics({f"cost/{name}": value for name, value in self.report.items()}, trainer.global_step)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.print_table and trainer.is_global_zero:
            Console().print(self.table())

    def table(self) -> Table:
        """The report as a table."""
        table = Table(title="What the run cost")
        table.add_column("")
        table.add_column("", justify="right")
        for name, value in self.report.items():
            label = name.removesuffix("_bytes").replace("_", " ")
            text = f"{value / _MIB:,.2f} MiB" if name.endswith("_bytes") else f"{value:,.0f}"
            table.add_row(label, text)
        return table

    def _end_measurement(self) -> None:
        if self._saved is not None:
            self._saved.__exit__(None, None, None)
            self.report["saved_for_backward_bytes"] = self._saved.total
            self._saved = None


def count_tokens(batch: Any) -> int:
    """Tokens in a batch, without padding where it has attention masks; 0 for a batch that is not text."""
    if not isinstance(batch, Mapping):
        return 0
    if isinstance(mask := batch.get("attention_mask"), Tensor):
        return int(mask.sum())
    if isinstance(ids := batch.get("input_ids"), Tensor):
        return ids.numel()
    return sum(count_tokens(part) for part in batch.values())


def peak_memory_bytes(device: torch.device) -> int | None:
    """Most that was allocated on a CUDA device, or the process's largest resident set; None where it is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    if sys.platform == "linux":
        # not ru_maxrss: across fork and exec that starts at the size of the parent, which may be a notebook's kernel
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # POSIX only

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024  # macOS counts bytes, Linux KiB
