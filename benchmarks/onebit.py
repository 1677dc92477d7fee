"""Does a task in kilobytes cost accuracy? LoRA against 1-bit LoRA and adapters, on two vision and two text tasks.

    python benchmarks/onebit.py --jobs 2      # on two idle cores; writes results/onebit.json

Every side trains for as many steps on the same rows in the same order, under a frozen head that all share, so that the
file is the adapter alone. Learning rate and scale are the best of one grid, the same for all sides, by the mean score
on the validation splits of the first seeds; the chosen setting is trained for every seed, saved, loaded into a fresh
base, and that scores the test split, once. Sizes are those of the saved file (`os.stat`). No adapter drops anything
out, so that only the bits differ: at 1 bit the paper's 0.1 cost a point or two on tasks as small as these.

Gates: 1 bit within 0.5 points of 32 bits at the same rank, and above LoRA of equal bytes, on every task; the start
that is a no-op within 0.5 points of the paper's; the median of a training step <= 1.15 times LoRA's.
"""

import argparse
import copy
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the jobs are the parallelism
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import environment, optimizer_of, quieten, side_by_side, train
from benchmarks.onebit_tasks import Backbone, Digits, Retrieval, Task, WordOrder, batches, noisy_negative, turned
from petune import BiAdapterConfig, BiLoraConfig, FusedLoraConfig

RESULTS = Path(__file__).parent / "results" / "onebit.json"
RANK = 32
# (learning rate, scale): what suited one side or another in trials on single seeds; all sides choose among all
GRID = ((1e-3, 4.0), (3e-3, 4.0), (3e-3, 16.0), (1e-2, 1.0))
WEIGHT_DECAY = 1e-4  # the paper's
POINTS_GATE, STEP_GATE = 0.5, 1.15

T = TypeVar("T")
Make = Callable[[list[str], float], PeftConfig]
"""Query and value projections and a scale to a config."""


def _lora(rank: int) -> Make:
    return lambda targets, scale: FusedLoraConfig(r=rank, lora_alpha=rank * scale, target_modules=targets)  # pyright: ignore[reportArgumentType]


def _bi_lora(bits: int, **fields: Any) -> Make:
    return lambda targets, scale: BiLoraConfig(
        r=RANK, bits=bits, scale=scale, dropout=0.0, target_modules=targets, **fields
    )


def _bi_adapter(bits: int) -> Make:
    return lambda _, scale: BiAdapterConfig(r=RANK, bits=bits, scale=scale, dropout=0.0)


LORA, EQUAL_BYTES, ONE_BIT = "LoRA r=32", "LoRA r=1", "Bi-LoRA 1 bit"
PAPER_START = "Bi-LoRA 1 bit, paper's start"
ADAPTER, ADAPTER_PARENT = "Bi-AdaptFormer 1 bit", "AdaptFormer 32 bits"
SIDES: dict[str, Make] = {
    LORA: _lora(RANK),
    "Bi-LoRA 4 bits": _bi_lora(4),
    "Bi-LoRA 2 bits": _bi_lora(2),
    ONE_BIT: _bi_lora(1),
    PAPER_START: _bi_lora(1, init_weights="paper"),
    EQUAL_BYTES: _lora(1),
    ADAPTER_PARENT: _bi_adapter(32),
    ADAPTER: _bi_adapter(1),
}
TIMED = {LORA: ("Bi-LoRA 4 bits", "Bi-LoRA 2 bits", ONE_BIT), ADAPTER_PARENT: (ADAPTER,)}
"""Whose step is compared with whose."""
TASKS: dict[str, Callable[..., Task]] = {  # the longest first, for --jobs
    "word order": lambda seed, smoke: WordOrder(seed, smoke=smoke),
    "retrieval": lambda seed, smoke: Retrieval(seed, smoke=smoke),
    "turned digits": lambda seed, smoke: Digits(turned, seed, smoke=smoke),
    "noisy negatives": lambda seed, smoke: Digits(noisy_negative, seed, smoke=smoke),
}


ONLY_TIMED: dict[str, Callable[..., Task]] = {"ViT-S/16, 224 px": lambda seed, smoke: Backbone(seed, smoke=smoke)}


def wrap(task: Task, side: str, scale: float, seed: int) -> PeftModel:
    torch.manual_seed(seed)  # of the adapter's weights, and from here on of dropout
    return get_peft_model(copy.deepcopy(task.base), SIDES[side](list(task.targets), scale))  # pyright: ignore


def fit(task: Task, side: str, learning_rate: float, scale: float, seed: int) -> PeftModel:
    """Train for all of the task's steps."""
    model = wrap(task, side, scale, seed)
    steps = batches(task.rows("train"), task.batch_size, task.steps, seed)
    return train(model, task, steps, task.steps, learning_rate, WEIGHT_DECAY)


def reloaded(task: Task, model: PeftModel) -> tuple[PeftModel, int]:
    """The adapter in a fresh base, from its file, and the file's size in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = Path(folder, "adapter_model.safetensors").stat().st_size
        return PeftModel.from_pretrained(copy.deepcopy(task.base), folder), size  # pyright: ignore


class Setting(NamedTuple):
    learning_rate: float
    scale: float


@dataclass(frozen=True)
class Plan:
    """How much to run."""

    seeds: int = 5
    tuning_seeds: int = 1
    """Seeds whose validation splits choose."""
    grid: tuple[Setting, ...] = tuple(Setting(*pair) for pair in GRID)
    repetitions: int = 5
    """Of the timing."""
    timed_steps: int = 20
    smoke: bool = False


SMOKE = Plan(seeds=1, tuning_seeds=1, grid=(Setting(1e-2, 1.0),), repetitions=1, timed_steps=1, smoke=True)


def choose(
    tasks: Sequence[Task], side: str, grid: Sequence[Setting]
) -> tuple[list[tuple[Setting, float]], list[PeftModel]]:
    """Every setting with its validation score, mean over the tasks, best first; and the models of the best."""
    found: list[tuple[Setting, float]] = []
    kept: list[PeftModel] = []
    for setting in grid:
        models = [fit(task, side, *setting, seed) for seed, task in enumerate(tasks)]
        score = statistics.mean(
            first_score(task.scores(model, "validation")) for task, model in zip(tasks, models, strict=True)
        )
        if not found or score > max(score for _, score in found):
            kept = models
        found.append((setting, score))
    return sorted(found, key=lambda pair: -pair[1]), kept


def run_side(tasks: Sequence[Task], side: str, plan: Plan) -> dict[str, Any]:
    """Choose by validation, train the other seeds, then save, load and test every seed."""
    start = time.monotonic()
    tried, models = choose(tasks[: plan.tuning_seeds], side, plan.grid)
    best = tried[0][0]
    models += [fit(tasks[seed], side, *best, seed) for seed in range(len(models), len(tasks))]
    loaded = [reloaded(task, model) for task, model in zip(tasks, models, strict=True)]
    scores = [task.scores(model, "test") for task, (model, _) in zip(tasks, loaded, strict=True)]
    return {
        **best._asdict(),
        "validation": [{**setting._asdict(), "score": score} for setting, score in tried],
        "scores": {metric: [score[metric] for score in scores] for metric in scores[0]},
        "file_bytes": loaded[0][1],
        "seconds": time.monotonic() - start,
    }


def run_task(name: str, plan: Plan) -> dict[str, Any]:
    """All sides of one task, and the frozen model without an adapter."""
    quieten()
    tasks = [TASKS[name](seed, plan.smoke) for seed in range(plan.seeds)]
    sides = dict[str, dict[str, Any]]()
    for side in SIDES:
        sides[side] = run_side(tasks, side, plan)
        print(name, side, json.dumps({k: v for k, v in sides[side].items() if k != "validation"}), flush=True)
    frozen = [task.scores(task.base, "test") for task in tasks]
    return {
        "rows": {part: tasks[0].rows(part) for part in ("train", "validation", "test")},
        "steps": tasks[0].steps,
        "frozen": {metric: [score[metric] for score in frozen] for metric in frozen[0]},
        "sides": sides,
    }


def step_seconds(task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> float:
    start = time.perf_counter()
    task.loss(model, batch).backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start


def time_rows(names: Sequence[str], plan: Plan) -> list[dict[str, Any]]:
    """Ratio of the medians of interleaved steps, per task and pair of sides; one ratio a repetition."""
    rows: list[dict[str, Any]] = []
    for name, (parent, others) in product(names, TIMED.items()):
        task = {**TASKS, **ONLY_TIMED}[name](0, plan.smoke)
        sides = (parent, *others)
        models = {side: wrap(task, side, 1.0, 0).train() for side in sides}
        optimizers = {side: optimizer_of(model, 1e-4, WEIGHT_DECAY) for side, model in models.items()}
        medians: dict[str, list[float]] = {side: [] for side in sides}
        for repetition in range(plan.repetitions):
            seconds: dict[str, list[float]] = {side: [] for side in sides}
            for step, batch in enumerate(
                batches(task.rows("train"), task.batch_size, plan.timed_steps + 2, repetition)
            ):
                for side in sides if step % 2 else reversed(sides):
                    seconds[side].append(step_seconds(task, models[side], optimizers[side], batch))
            for side in sides:
                medians[side].append(statistics.median(seconds[side][2:]))  # two steps warm up
        for side in others:
            ratios = [ours / theirs for ours, theirs in zip(medians[side], medians[parent], strict=True)]
            rows.append(
                {
                    "task": name,
                    "side": side,
                    "parent": parent,
                    "ratio": statistics.median(ratios),
                    "ratio_min": min(ratios),
                    "ratio_max": max(ratios),
                    "side_ms": 1e3 * statistics.median(medians[side]),
                    "parent_ms": 1e3 * statistics.median(medians[parent]),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def first_score(scores: Mapping[str, T]) -> T:
    """The metric that settings are chosen and sides compared by."""
    return next(iter(scores.values()))


def differences(task: Mapping[str, Any], better: str, worse: str) -> list[float]:
    """`better` less `worse` in points on the task's first score, seed by seed."""
    left, right = (first_score(task["sides"][side]["scores"]) for side in (better, worse))
    return [a - b for a, b in zip(left, right, strict=True)]


def gates(tasks: Mapping[str, Mapping[str, Any]], times: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Every gate with its value: name to {value, limit, passed}. A loss of points is positive."""
    verdicts = dict[str, tuple[float, float]]()
    for name, task in tasks.items():
        for parent, side, limit in (
            (LORA, ONE_BIT, POINTS_GATE),
            (EQUAL_BYTES, ONE_BIT, 0.0),
            (ADAPTER_PARENT, ADAPTER, POINTS_GATE),
            (PAPER_START, ONE_BIT, POINTS_GATE),
        ):
            verdicts[f"{name}: {parent} − {side}, points"] = (statistics.mean(differences(task, parent, side)), limit)
        sizes = [task["sides"][side]["file_bytes"] for side in (ONE_BIT, EQUAL_BYTES)]
        verdicts[f"{name}: {ONE_BIT} / {EQUAL_BYTES}, file"] = (sizes[0] / sizes[1], 1.0)
    for row in times:
        verdicts[f"{row['task']}: {row['side']} / {row['parent']}, step"] = (row["ratio"], STEP_GATE)
    return {name: {"value": v, "limit": limit, "passed": v <= limit} for name, (v, limit) in verdicts.items()}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=Plan.seeds)
    parser.add_argument("--tuning-seeds", type=int, default=Plan.tuning_seeds, help="seeds whose validation chooses")
    parser.add_argument("--jobs", type=int, default=1, help="tasks at a time, one thread each")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, in seconds: no measurement")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if args.smoke and args.out == RESULTS:
        parser.error(f"a smoke run measures nothing, so it may not write {RESULTS.name}; give another --out.")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    quieten()
    plan = SMOKE if args.smoke else Plan(args.seeds, args.tuning_seeds)
    result: dict[str, Any] = {
        "question": "what do 1, 2 and 4 bits a weight cost in accuracy, in bytes and in time, against fp32 LoRA",
        "smoke": plan.smoke,
        **environment(),
        "settings": {"rank": RANK, "weight_decay": WEIGHT_DECAY, **asdict(plan)},
        "tasks": {},
    }
    for name, found in zip(args.tasks, side_by_side(run_task, args.tasks, plan, args.jobs), strict=True):
        result["tasks"][name] = found
        args.out.write_text(json.dumps(result, indent=1) + "\n")  # hours may lie behind
    result["time"] = time_rows([*args.tasks, *ONLY_TIMED], plan)
    result["gates"] = gates(result["tasks"], result["time"])
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, verdict in result["gates"].items():
        print(f"{'ok  ' if verdict['passed'] else 'MISS'} {name}: {verdict['value']:.3f} <= {verdict['limit']}")
    return 0 if args.smoke or all(verdict["passed"] for verdict in result["gates"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
