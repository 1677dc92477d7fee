"""Train a set of runs, one after the other, each in a process of its own."""

import logging
import signal
import subprocess
import sys
import traceback
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Protocol

from petune.cli.errors import one_line
from petune.comparison.plan import Trial
from petune.comparison.record import LOG_FILE, RECORD_FILE
from petune.comparison.worker import measured_fit

_GRACE_S = 20.0  # for an interrupted run to leave its batch and its checkpoint whole
_SAYS = "petune: error: "
_AGAIN = "Run again with --debug for the traceback."  # of errors that are no sentence
_WORKER = ("-m", "petune.comparison")


class Runner(Protocol):
    """Trains runs in their folders, which exist, and gives each as soon as it is done, in any order.

    A run that succeeded leaves a `petune.comparison.record.Record` in its folder, and the text given with it is ""; of
    one that failed it is a sentence that says why. A failed run ends no other.
    """

    def __call__(self, trials: Iterable[Trial], /) -> Iterator[tuple[Trial, str]]: ...


def run_in_processes(trials: Iterable[Trial], /) -> Iterator[tuple[Trial, str]]:
    """One after the other, each as its own `petune fit`, which goes on from its last checkpoint; see `Runner`."""
    for trial in trials:
        yield trial, _run(trial)


def run_in_this_process(trials: Iterable[Trial], /) -> Iterator[tuple[Trial, str]]:
    """One after the other in this process, where loading the libraries would take longer than a run; see `Runner`.

    The peak memory of a run on a CPU is not known then, and a crash of one ends all.
    """
    for trial in trials:
        failure = ""
        with said_to(trial.folder / LOG_FILE):
            try:
                measured_fit(trial.fit_arguments, own_process=False)
            except Exception as error:
                traceback.print_exception(error)
                failure = _sentence(one_line(error), trial.folder / LOG_FILE)
        yield trial, failure


@contextmanager
def said_to(path: Path) -> Generator[None]:
    """Have a file take what is printed, and what Lightning logs to the stream that it found at its import."""
    names = ("lightning.pytorch", "lightning.fabric")
    handlers = [handler for name in names for handler in logging.getLogger(name).handlers]
    streams = [handler for handler in handlers if isinstance(handler, logging.StreamHandler)]
    with path.open("w", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log), ExitStack() as stack:
        for handler in streams:
            stack.callback(handler.setStream, handler.stream)
            handler.setStream(log)
        yield


def _run(trial: Trial) -> str:
    command, log = [sys.executable, *_WORKER, *trial.fit_arguments], trial.folder / LOG_FILE
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
        try:
            code = process.wait()
        except BaseException:  # the terminal's interrupt reaches the run as well, another's does not
            _end(process)
            raise
    return "" if (trial.folder / RECORD_FILE).is_file() else _why(log, code)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _sentence(said: str, log: Path) -> str:
    return said.replace(_AGAIN, f"{log} has the traceback.")


def _why(log: Path, code: int) -> str:
    """The sentence that the run ended with, or what its exit code says."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line.removeprefix(_SAYS) for line in lines if line.startswith(_SAYS)]
    if said:
        return _sentence(said[-1], log)
    if code < 0:
        memory = ", as the system does where memory runs out" if -code == getattr(signal, "SIGKILL", 9) else ""
        return f"the process was ended by {signal.Signals(-code).name}{memory}; {log} has what it said."
    return f"the process ended with exit code {code} and without a result; {log} has what it said."
