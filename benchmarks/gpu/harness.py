"""What every GPU benchmark needs: where it runs, how long it may, what it has found so far, and a clock."""

import argparse
import importlib
import json
import platform
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu", "driver_version")
PACKAGES = ("petune", "torch", "triton", "peft", "transformers")


def arguments(question: str, budget_s: int) -> argparse.ArgumentParser:
    """The options that both GPU benchmarks have."""
    parser = argparse.ArgumentParser(description=question, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget-s", type=float, default=budget_s, help="no row starts after this many seconds")
    parser.add_argument("--out", type=Path, help="JSON file; by default benchmarks/results/<gpu>/<benchmark>.json")
    parser.add_argument("--unsloth", type=Path, help="Unsloth's wheel or unpacked wheel; else an installed one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on any device: tests the script, not speed")
    return parser


def place(name: str, args: argparse.Namespace) -> tuple[torch.device, Path]:
    """The device to run on and the file to write; ends the program with one sentence where there is no GPU."""
    if args.smoke:
        out = args.out or Path(tempfile.mkdtemp()) / f"{name}.json"
        if RESULTS in out.resolve().parents:
            raise SystemExit(f"{name}: a smoke run measures nothing, so it may not write {out}; leave --out away.")
        return torch.device("cuda" if torch.cuda.is_available() else "cpu"), out
    if not torch.cuda.is_available():
        print(f"{name} measures a CUDA device and torch finds none; run it on one, or test the script with --smoke.")
        raise SystemExit(2)
    gpu = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return torch.device("cuda"), args.out or RESULTS / gpu / f"{name}.json"


def environment(device: torch.device) -> dict[str, Any]:
    """The device, the software and the commit, as far as they can be read."""
    hardware: dict[str, Any] = {"device": "cpu", "machine": platform.machine()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        hardware = {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_mib": properties.total_memory // 2**20,
            "cuda": torch.version.cuda,
            "tf32": torch.backends.cuda.matmul.allow_tf32,
        }
    return {**hardware, "versions": versions(), "commit": commit()}


def versions() -> dict[str, str]:
    found = {name: _version(name) for name in PACKAGES}
    return {**{name: version for name, version in found.items() if version}, "python": platform.python_version()}


def _version(name: str) -> str:
    try:
        return importlib.import_module(name).__version__
    except ImportError:  # triton on a machine without a GPU
        return ""


def commit() -> str:
    """HEAD, with a + where tracked files differ from it; "unknown" outside of a git checkout."""
    git = shutil.which("git")
    if git is None:
        return "unknown"
    head, changed = (
        subprocess.run([git, *words], cwd=ROOT, capture_output=True, text=True, check=False)
        for words in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
    )
    return "unknown" if head.returncode else head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def clocks() -> dict[str, str]:
    """What nvidia-smi reads now, changing nothing; empty where it is missing."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return {}
    query = [smi, f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    lines = answer.stdout.strip().splitlines()
    return dict(zip(CLOCKS, lines[0].split(", "), strict=False)) if answer.returncode == 0 and lines else {}


class Budget:
    """Seconds of wall clock that a run may take."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left_s(self) -> float:
        return self._end - time.monotonic()


class Results:
    """A JSON file that is whole after every row, so that a run that is killed keeps what it has."""

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {**header, "complete": False, "left_out": [], "rows": []}
        path.parent.mkdir(parents=True, exist_ok=True)
        self.flush()

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.content["rows"]

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.flush()

    def flush(self) -> None:
        """Write what a row has got since it was added."""
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.content, indent=1) + "\n")
        part.replace(self.path)

    def leave_out(self, what: str, why: str) -> None:
        self.content["left_out"].append({"what": what, "why": why})
        self.flush()

    def finish(self, **summary: Any) -> None:
        self.content.update(summary, complete=True, clocks_after=clocks())
        self.flush()


class Clock:
    """Marks in the device's own time line: CUDA events, or the host's clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between_us(self, start: Any, end: Any) -> float:
        """Both marks must have been reached: call `settle` before."""
        return 1e3 * start.elapsed_time(end) if self._cuda else 1e6 * (end - start)

    def settle(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()


class Timing(NamedTuple):
    """One figure of one side, in microseconds."""

    median_us: float
    p10_us: float
    p90_us: float
    noise_ratio: float
    """How far the medians of the repetitions of the whole block lie apart, over their mean."""


def timing(blocks: Sequence[Sequence[float]]) -> Timing:
    """Summary of the samples of every repetition."""
    samples = sorted(sample for block in blocks for sample in block)
    medians = [statistics.median(block) for block in blocks]
    last = len(samples) - 1
    return Timing(
        median_us=statistics.median(samples),
        p10_us=samples[round(0.1 * last)],
        p90_us=samples[round(0.9 * last)],
        noise_ratio=(max(medians) - min(medians)) / statistics.mean(medians),
    )


class Plan(NamedTuple):
    """How often everything is measured."""

    warm_up: int
    timed: int
    repetitions: int


FULL, SMOKE = Plan(warm_up=10, timed=50, repetitions=2), Plan(warm_up=1, timed=1, repetitions=2)


def interleaved(
    samplers: Mapping[str, Callable[[int], Mapping[str, float]]], plan: Plan
) -> dict[str, dict[str, dict[str, float]]]:
    """Per sampler and quantity the timing of samples taken in turn: A B C A B C, the whole block repeated.

    A sampler gets the number of its call, so that it can rotate its inputs, and returns microseconds by quantity.
    """
    found: dict[str, dict[str, list[list[float]]]] = {name: {} for name in samplers}
    for _ in range(plan.repetitions):
        for blocks in found.values():
            for block in blocks.values():
                block.append([])
        for step in range(plan.warm_up + plan.timed):
            for name, sampler in samplers.items():
                for quantity, microseconds in sampler(step).items():
                    blocks = found[name].setdefault(quantity, [[]])
                    if step >= plan.warm_up:
                        blocks[-1].append(microseconds)
    return {
        name: {quantity: timing(blocks)._asdict() for quantity, blocks in quantities.items()}
        for name, quantities in found.items()
    }
