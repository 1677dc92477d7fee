"""Which variant of a kernel runs: one timed trial per shape and GPU, remembered on disk."""

import json
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from filelock import FileLock

logger = logging.getLogger(__name__)

Key = tuple[str | int, ...]
Candidates = Mapping[str, Callable[[], object]]
Entry = dict[str, Any]  # {"choice": name, "times_us": {name: median}}

_SCHEMA = 1
_REPETITIONS = 5
_LOCK_TIMEOUT_S = 10.0  # another process holds the table for milliseconds

_chosen: dict[tuple[torch.device, Key], str] = {}
_tables: dict[Path, dict[str, Entry]] = {}
_said: set[str] = set()
_lock = threading.RLock()  # reentrant: a candidate may have a choice of its own


class Config(NamedTuple):
    """The compile-time shape of one Triton kernel."""

    block_tokens: int
    block_features: int
    num_warps: int
    num_stages: int
    block_inner: int = 0
    """Block of the summed axis; 0 where a kernel has none of its own."""
    form: str = ""
    """How the kernel addresses memory, where there is a choice: pointer or tma."""


def bucket(tokens: int) -> int:
    """The next power of two, which stands for a number of tokens in a key: close sizes share their choice."""
    return 1 << max(0, tokens - 1).bit_length()


def known(key: Key, default: str, device: torch.device) -> str | None:
    """The answer of `choose` where it takes no candidates to give it: one lookup, for the calls after the first."""
    return default if torch.are_deterministic_algorithms_enabled() else _chosen.get((device, key))


def choose(key: Key, candidates: Candidates, default: str, device: torch.device, *, on_cpu: bool = False) -> str:
    """The name of the fastest candidate: known to the process, or to the table on disk, or found by one trial.

    The default is taken with `PETUNE_TUNE=0`, in torch's deterministic mode (a timing, and with it a rounding, may
    differ from run to run), off CUDA, and for what is not known yet while a CUDA graph is captured.

    Args:
        key: what the choice depends on besides the GPU and the versions of torch and triton.
        candidates: by name, a call that launches the variant on real inputs; each runs several times.
        default: the candidate that needs no trial.
        device: of the inputs.
        on_cpu: time on a CPU as well, anew in every process.

    Raises:
        Exception: of the default, where no candidate runs.
        ValueError: PETUNE_TUNE is neither 0 nor 1.
    """
    if len(candidates) < 2 or torch.are_deterministic_algorithms_enabled():
        return default
    choice = _chosen.get((device, key))
    if choice is None or choice not in candidates:
        if on_cpu and device.type == "cpu" and _may_tune():
            choice = _chosen[device, key] = _fastest_on_cpu(candidates)
            return choice
        return _look_up_or_time(key, candidates, default, device)
    return choice


def _look_up_or_time(key: Key, candidates: Candidates, default: str, device: torch.device) -> str:
    if device.type != "cuda" or not _may_tune():
        return default
    with _lock:
        choice = _chosen.get((device, key))  # another thread may have found it meanwhile
        if choice is not None and choice in candidates:
            return choice
        path, name = _table_path(device), " ".join(map(str, key))
        if path not in _tables:
            _tables[path] = _read(path)
        entry = _tables[path].get(name)
        if entry is None or entry["choice"] not in candidates:
            if torch.cuda.is_current_stream_capturing():
                return default
            entry = _trial(name, candidates, default, device, path)
        _chosen[device, key] = entry["choice"]
        return entry["choice"]


def _may_tune() -> bool:
    setting = os.environ.get("PETUNE_TUNE", "1")
    if setting not in ("0", "1"):
        raise ValueError(f"PETUNE_TUNE={setting!r} is neither 0 nor 1; set 0 to take the default of every kernel.")
    return setting == "1"


# --- the trial -----------------------------------------------------------------------------------------------------


def _trial(name: str, candidates: Candidates, default: str, device: torch.device, path: Path) -> Entry:
    # compiling the variants may take a minute, so the line is one that shows by default
    _say_once("trial", "petune times its kernels once for this GPU and keeps the choices in %s", path)
    working: dict[str, Callable[[], object]] = {}
    failure: Exception | None = None
    lasting = True  # whether another process would find the same
    for candidate, run in candidates.items():
        try:
            run()  # compiles
            torch.cuda.synchronize(device)
        except torch.AcceleratorError:  # the context is lost, and with it every candidate
            raise
        except Exception as error:  # whatever a compiler raises, too little shared memory, out of memory …
            lasting &= not isinstance(error, torch.OutOfMemoryError)
            failure = error if candidate == default or failure is None else failure
            logger.warning("%s: petune leaves out the variant %s, which fails here (%r)", name, candidate, error)
        else:
            working[candidate] = run
    if failure is not None and not working:
        raise failure
    times = _times(working, device)
    entry: Entry = {
        "choice": min(times, key=times.__getitem__),
        "times_us": {candidate: round(time, 2) for candidate, time in times.items()},
    }
    if lasting:
        _store(path, name, entry)
    return entry


def _times(candidates: Candidates, device: torch.device) -> dict[str, float]:
    """Median microseconds of each candidate by CUDA events.

    The repetitions are interleaved, so that a change of clocks meets every candidate, and queued without waiting, as
    in a training step: what is bound by its launches is timed as such.
    """
    spans: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in candidates}
    with torch.cuda.device(device):
        for _ in range(_REPETITIONS):
            for name, run in candidates.items():
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                run()
                end.record()
                spans[name].append((start, end))
        torch.cuda.synchronize()
    return {name: 1e3 * median(start.elapsed_time(end) for start, end in pairs) for name, pairs in spans.items()}


def _fastest_on_cpu(candidates: Candidates) -> str:
    spans: dict[str, list[float]] = {name: [] for name in candidates}
    with torch.no_grad():
        for _ in range(_REPETITIONS + 1):
            for name, run in candidates.items():
                start = time.perf_counter()
                run()
                spans[name].append(time.perf_counter() - start)
    return min(spans, key=lambda name: median(spans[name][1:]))  # the first call warms up


# --- the table on disk ---------------------------------------------------------------------------------------------


def _table_path(device: torch.device) -> Path:
    try:
        triton = version("triton")
    except PackageNotFoundError:  # built into torch by some distributors
        triton = "unknown"
    words = f"{torch.cuda.get_device_name(device)} torch {torch.__version__} triton {triton}"
    return _folder() / f"{re.sub(r'[^A-Za-z0-9.]+', '-', words)}.json"


def _folder() -> Path:
    if folder := os.environ.get("PETUNE_CACHE_DIR"):
        return Path(folder)
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches) / "petune"
    try:
        return Path.home() / ".cache" / "petune"
    except RuntimeError:  # a container's user without a home
        return Path(tempfile.gettempdir()) / "petune"


def _read(path: Path) -> dict[str, Entry]:
    """The entries of a table; none, with a warning, where it cannot be read or is not ours."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != _SCHEMA:
            raise ValueError(f"schema {content['schema']} instead of {_SCHEMA}")
        return {name: {**entry, "choice": str(entry["choice"])} for name, entry in content["choices"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        _say_once("read", "petune cannot use its table of choices %s and begins anew: %r", path, error)
        return {}


def _store(path: Path, name: str, entry: Entry) -> None:
    """Add an entry to the table, which may have grown by those of other processes."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=_LOCK_TIMEOUT_S):
            _tables[path] = _read(path) | {name: entry}
            _replace(path, json.dumps({"schema": _SCHEMA, "choices": _tables[path]}, indent=1, sort_keys=True))
    except OSError as error:  # read-only, full, or no locks there
        _say_once("store", "petune cannot keep its choices of kernels in %s: %r", path, error)


def _replace(path: Path, text: str) -> None:
    handle, incoming = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text + "\n")
        Path(incoming).replace(path)
    except BaseException:
        Path(incoming).unlink(missing_ok=True)
        raise


def _say_once(what: str, message: str, *args: object) -> None:
    if what not in _said:
        _said.add(what)
        logger.warning(message, *args)
