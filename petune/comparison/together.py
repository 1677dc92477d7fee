"""Train the runs of low-rank methods at the same time, on one base."""

from collections.abc import Callable, Iterable, Iterator

from lightning.pytorch import Callback, Trainer

from petune.cli.arguments import resolve_recipes
from petune.cli.errors import one_line
from petune.cli.quiet import quiet
from petune.comparison.plan import Trial
from petune.comparison.record import LOG_FILE
from petune.comparison.runner import run_in_processes, said_to
from petune.comparison.worker import MeasuredFit
from petune.many import RunResult, fit_many


class _JoinedFit(MeasuredFit):
    """A measured fit whose training steps are those of a group."""

    def __init__(self, arguments: list[str], callbacks: list[Callback], together: int) -> None:
        self._joined = callbacks
        super().__init__(arguments, own_process=False, together=together)

    def _missing_callbacks(self, given: list[Callback]) -> Iterator[Callback]:
        yield from self._joined
        yield from super()._missing_callbacks(given)


def run_together(trials: Iterable[Trial], /) -> Iterator[tuple[Trial, str]]:
    """Those that can share a base at the same time, the others as `run_in_processes` does; see `Runner`.

    The memory of a run is not known then, and its seconds are its share of all. A crash of the process
    ends all that train together; they go on from their checkpoints.
    """
    found = list(trials)
    joint = [trial for trial in found if trial.joins]
    yield from run_in_processes(trial for trial in found if not trial.joins)
    if not joint:
        return
    failures: dict[str, str] = {}

    def end(result: RunResult) -> None:
        failures[result.name] = "" if result.error is None else one_line(result.error)

    works = {str(trial.folder): _work(trial, len(joint)) for trial in joint}
    with said_to(joint[0].folder / LOG_FILE), quiet():
        fit_many(works, on_end=end)
    yield from ((trial, failures[str(trial.folder)]) for trial in joint)


def _work(trial: Trial, together: int) -> Callable[[list[Callback]], Trainer]:
    def train(callbacks: list[Callback]) -> Trainer:
        arguments = [*resolve_recipes(trial.fit_arguments), "--trainer.enable_progress_bar=false"]
        return _JoinedFit(arguments, callbacks, together).trainer

    return train
