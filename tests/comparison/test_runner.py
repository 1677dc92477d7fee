"""What becomes of a run that ends badly, and what counts as seconds of training."""

import os
import signal
import threading
from types import SimpleNamespace

import pytest
import torch

from petune.comparison import run_in_processes, runner, worker
from petune.comparison.plan import Trial
from petune.comparison.record import read_record
from petune.comparison.worker import Stopwatch, has_split


@pytest.fixture
def trial(tmp_path) -> Trial:
    return Trial("lora", seed=0, rate=None, folder=tmp_path, arguments=(), digest="")


def outcome(trial: Trial, monkeypatch, program: str) -> str:
    """What a run that is this program is said to have failed with."""
    monkeypatch.setattr(runner, "_WORKER", ("-c", program))
    ((same, failure),) = run_in_processes([trial])
    assert same is trial
    assert read_record(trial.folder) is None
    return failure


def test_the_sentence_of_a_failed_run_is_its_own_last_one(trial, monkeypatch):
    program = "print('petune: error: one'); print('petune: error: out of memory'); raise SystemExit(1)"
    assert outcome(trial, monkeypatch, program) == "out of memory"
    assert (trial.folder / "log.txt").read_text().startswith("petune: error: one")


def test_an_error_that_is_no_sentence_points_at_its_traceback(trial, monkeypatch):
    program = "print('petune: error: KeyError: 1. Run again with --debug for the traceback.'); raise SystemExit(1)"
    assert outcome(trial, monkeypatch, program) == f"KeyError: 1. {trial.folder / 'log.txt'} has the traceback."


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import os; os.kill(os.getpid(), 9)", "ended by SIGKILL, as the system does where memory runs out; "),
        ("import os; os.kill(os.getpid(), 6)", "ended by SIGABRT; "),
        ("raise SystemExit(3)", "ended with exit code 3 and without a result; "),
        ("", "ended with exit code 0 and without a result; "),
    ],
)
def test_a_run_that_dies_without_a_word_is_told_by_its_exit_code(trial, monkeypatch, program, said):
    failure = outcome(trial, monkeypatch, program)
    assert said in failure
    assert failure.endswith("log.txt has what it said.")


@pytest.mark.parametrize("stubborn", [False, True])
def test_an_interrupt_ends_the_run_that_is_under_way(trial, monkeypatch, stubborn):
    ignore = "signal.signal(signal.SIGTERM, signal.SIG_IGN);" if stubborn else ""
    program = f"import os, signal, time; {ignore} print(os.getpid(), flush=True); time.sleep(60)"
    monkeypatch.setattr(runner, "_WORKER", ("-c", program))
    monkeypatch.setattr(runner, "_GRACE_S", 0.3)
    log = trial.folder / "log.txt"

    def interrupt():
        while not (log.exists() and log.read_text().endswith("\n")):
            threading.Event().wait(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which background jobs, and Lightning, ignore
    try:
        with pytest.raises(KeyboardInterrupt):
            list(run_in_processes([trial]))
    finally:
        signal.signal(signal.SIGINT, before)
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)


def trainer(**more) -> SimpleNamespace:
    return SimpleNamespace(world_size=1, **more)


def test_validation_is_no_training_time_and_an_interrupted_run_keeps_its_seconds(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(worker.time, "monotonic", lambda: now[0])
    module = SimpleNamespace(device=torch.device("cpu"))
    batch = {"input_ids": torch.zeros(5, 3)}

    def passes(seconds: float) -> None:
        now[0] += seconds

    first = Stopwatch(own_process=False)
    first.on_validation_start(trainer(), module)  # Lightning's look at the data
    passes(7)
    first.on_validation_end(trainer(), module)
    passes(7)
    first.on_train_start(trainer(), module)
    passes(3)
    first.on_train_batch_end(trainer(), module, None, batch, 0)
    first.on_validation_start(trainer(), module)
    passes(50)
    first.on_validation_end(trainer(), module)
    passes(2)
    saved = first.state_dict()
    passes(1000)  # lost with the process

    second = Stopwatch(own_process=False)
    second.load_state_dict(saved)
    second.on_train_start(trainer(), module)
    passes(4)
    second.on_train_batch_end(trainer(), module, None, batch, 1)
    second.on_train_end(trainer(), module)
    passes(9)
    second.on_validation_start(trainer(), module)
    passes(9)
    second.on_validation_end(trainer(), module)
    passes(9)
    assert second.state_dict()["seconds"] == 3 + 2 + 4
    assert second.rows["train"] == 10
    assert second.peak_bytes is None


def test_a_data_module_of_the_users_is_asked_for_its_loaders():
    import lightning as L

    class Mine(L.LightningDataModule):
        def val_dataloader(self):
            return []

    assert has_split(Mine(), "validation")
    assert not has_split(Mine(), "test")
