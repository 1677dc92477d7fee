"""The files that a run leaves for the comparison: what it is, what was measured, what it said."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from petune.atomic import replacing_file

TRIAL_FILE, RECORD_FILE, LOG_FILE = "trial.json", "run.json", "log.txt"
CUDA, RESIDENT = "CUDA allocator", "resident set of the process"


@dataclass(frozen=True)
class Record:
    """What was measured in a run."""

    metrics: dict[str, float]
    """val/… and test/… of the trained model on all rows."""
    rows: dict[str, int]
    """train: rows of all steps together; val and test: rows measured on; as batches have them, which are windows where
    a long context is cut."""
    adapter: str
    """Its configuration, as `petune fit` prints it."""
    learning_rate: float
    trainable_parameters: int
    weights_bytes: int
    """Of the files of weights in the adapter folder; of the trained tensors where there is no adapter."""
    peak_memory_bytes: int | None
    """Of the training; None where the system does not tell."""
    memory: str
    """Which memory that is: of CUDA's allocator, or the process's resident set with all its libraries."""
    saved_for_backward_bytes: int | None
    """What autograd keeps for the backward pass of the first batch; None where it was not measured."""
    seconds: float
    """Of the training: steps, reading and checkpoints; neither loading nor validation. Of runs that trained at the
    same time, this one's share."""
    steps: int
    """Optimizer steps."""
    device: str
    together: int = 1
    """Runs that trained at the same time, this one included."""


def write_record(folder: Path, record: Record) -> None:
    """Write it into the folder of the run, which is finished by that."""
    with replacing_file(folder / RECORD_FILE) as path:
        path.write_text(json.dumps(asdict(record), indent=2), encoding="utf-8")


def read_record(folder: Path) -> Record | None:
    """What the finished run in a folder measured; None where it is not finished."""
    path = folder / RECORD_FILE
    return Record(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def write_trial(folder: Path, digest: str, arguments: list[str]) -> None:
    """Say in the folder of a run what it is.

    Args:
        folder: of the run.
        digest: of its resolved arguments.
        arguments: of `petune fit`, to make it again.
    """
    with replacing_file(folder / TRIAL_FILE) as path:
        content = {"digest": digest, "command": ["petune", "fit", *arguments]}
        path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def read_digest(folder: Path) -> str | None:
    """The digest of what is in the folder of a run; None where nothing was begun."""
    path = folder / TRIAL_FILE
    return json.loads(path.read_text(encoding="utf-8"))["digest"] if path.is_file() else None
