"""One progress bar for the whole run, and quiet libraries below it."""

import logging
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import datasets
import lightning as L
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers.utils import logging as transformers_logging


class Stages:
    """A bar over stages of known weight, so that its time left is that of the run and not of the stage.

    Args:
        progress: where the bar is drawn.
        total: sum of the weights of all stages; a weight is about the stage's seconds on two cores.
    """

    def __init__(self, progress: Progress, total: float) -> None:
        self._progress = progress
        self._bar = progress.add_task("", total=total)
        self._done = 0.0

    @contextmanager
    def stage(self, name: str, weight: float) -> Generator[None]:
        """Show the name while the stage runs, and count its weight when it is done."""
        self._progress.update(self._bar, description=name)
        yield
        self._done += weight
        self._progress.update(self._bar, completed=self._done)

    def within(self, share: float) -> None:
        """Show a part of the running stage, in units of weight."""
        self._progress.update(self._bar, completed=self._done + share)


class StepsDone(L.Callback):
    """Advance the bar with every training batch."""

    def __init__(self, stages: Stages, weight: float, steps: int) -> None:
        self._stages, self._weight, self._steps = stages, weight, steps

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._stages.within(self._weight * min(1.0, trainer.global_step / self._steps))


@contextmanager
def show_stages(total: float, *, quiet: bool) -> Generator[Stages]:
    """A bar with the time left, gone when the run ends; with `quiet` none.

    Only a terminal gets one: a log file would keep every frame.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    hidden = quiet or not (console.is_terminal or console.is_jupyter)
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress, _quiet_libraries():
        yield Stages(progress, total)


@contextmanager
def _quiet_libraries() -> Generator[None]:
    """Silence what loading and training print on their own; everything is put back afterwards."""
    verbosity = transformers_logging.get_verbosity()
    load_bars = transformers_logging.is_progress_bar_enabled()
    data_bars = datasets.are_progress_bars_disabled()
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if load_bars:
            transformers_logging.enable_progress_bar()
        if not data_bars:
            datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
