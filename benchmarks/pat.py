"""What does pruning the residual stream while tuning cost in quality, and what does it save, against pruning first?

    python benchmarks/pat.py --only quality --jobs 2     # writes results/pat.json
    python benchmarks/pat.py --only latency step         # on an idle machine; keeps the rest

*Quality*: every side trains for as many steps on the same rows in the same order, and as many parameters: LoRA on the
dense model; PAT; and LoRA on the model whose channels of least norm were cut off before. The learning rate is the best
of one grid, by the validation rows of the first seeds, of each method at 25 % and kept for its other ratios. Each seed
is exported to a stock checkpoint, loaded by plain transformers, and that scores the test rows, once. *Latency*: the
reloaded stock model over the dense one. *Step*: a training step of PAT over one of LoRA. Both with random weights, in
turns, by medians.

Gates: PAT at 25 % above pruning first by more than two standard deviations of the difference, and within 1.5 points of
LoRA on the dense model; its latency <= 0.85 of dense; logits of the export within 1e-5 of the trained model's; a step
<= 1.25 of LoRA's.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the jobs are the parallelism

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import environment, quieten, side_by_side
from benchmarks.onebit_tasks import batches
from benchmarks.pat_tasks import Digits, Prose, shapes
from petune import FusedLoraConfig, PatConfig
from petune.adapters.pat import PatModel
from petune.topology import find_topology

RESULTS = Path(__file__).parent / "results" / "pat.json"
RATIOS = (0.1, 0.25, 0.4)
RANK, SCALE = 2, 2.0  # of PAT's LoRA, 1.6 % of the width; the rank of the others follows from the parameters
RATES = (3e-3, 1e-2, 3e-2)
GATED = 0.25
POINTS_GATE, LATENCY_GATE, LOGITS_GATE, STEP_GATE = 1.5, 0.85, 1e-5, 1.25

Task = Prose | Digits
TASKS: dict[str, Callable[..., Task]] = {"docstrings": Prose, "tilted digits": Digits}  # the longest first, for --jobs


class Side(NamedTuple):
    """What is trained: LoRA alone, PAT, or LoRA after pruning."""

    method: Literal["LoRA", "PAT", "pruned first"]
    ratio: float
    """Share of the residual channels that is pruned."""

    def __str__(self) -> str:
        return f"{self.method} {100 * self.ratio:g} %"


LORA = Side("LoRA", 0.0)
SIDES = (LORA, *(Side("PAT", ratio) for ratio in RATIOS), *(Side("pruned first", ratio) for ratio in RATIOS))
PAT, FIRST = Side("PAT", GATED), Side("pruned first", GATED)


@dataclass(frozen=True)
class Plan:
    """How much to run."""

    seeds: int = 5
    tuning_seeds: int = 1
    """Seeds whose validation rows choose."""
    rates: tuple[float, ...] = RATES
    rounds: int = 7
    """Of the timing: turns of a repetition."""
    repetitions: int = 5
    smoke: bool = False


# --- the sides -----------------------------------------------------------------------------------------------------


def pat_config(base: Any, ratio: float, steps: int, rank: int = RANK) -> PatConfig:
    heads: int = base.config.num_attention_heads  # a Llama's config wants them to divide the width
    lora = {"r": rank, "lora_alpha": SCALE * rank, "lora_dropout": 0.0}
    return PatConfig(target_ratio=ratio, round_to=heads, total_steps=steps, **lora)  # pyright: ignore


def with_lora(base: nn.Module, parameters: int) -> PeftModel:
    """LoRA on every linear of the blocks, of the rank that comes closest to a number of trained parameters."""
    targets = list(find_topology(base).linears)

    def made(rank: int, model: nn.Module) -> PeftModel:
        return get_peft_model(
            model, FusedLoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=targets)
        )  # pyright: ignore[reportArgumentType]

    return made(max(1, round(parameters / trained_parameters(made(1, copy.deepcopy(base))))), base)


def prune_first(base: nn.Module, ratio: float) -> nn.Module:
    """The stock model without the channels that embeddings and residual writers write with the least norm.

    A hybrid module that was not trained is the identity, so this is PAT's export with a mask set by hand.
    """
    model = get_peft_model(copy.deepcopy(base), pat_config(base, ratio, steps=1, rank=0))  # pyright: ignore
    tuner: Any = model.base_model
    with torch.no_grad():
        tuner.mask().logits.copy_(channel_norms(base))
    tuner.finalize()
    return tuner.merge_and_unload(export="stock")


def channel_norms(base: nn.Module) -> Tensor:
    """Norm of the weights that write each residual channel, [width]."""
    total = torch.zeros(())
    for name in find_topology(base).residual_writers:
        module = base.get_submodule(name)
        weight: Any = module.weight
        rows = weight.T if isinstance(module, nn.Embedding) else weight.flatten(1)
        total = total + (rows**2).sum(dim=1)
    return total.sqrt()


def trained_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def adapted(base: nn.Module, side: Side, steps: int, seed: int) -> PeftModel:
    """`side` before training, on a copy of the base."""
    torch.manual_seed(seed)
    pat = get_peft_model(copy.deepcopy(base), pat_config(base, side.ratio or GATED, steps))  # pyright: ignore
    if side.method == "PAT":
        return pat
    return with_lora(prune_first(base, side.ratio) if side.ratio else copy.deepcopy(base), trained_parameters(pat))


def fit(task: Task, side: Side, learning_rate: float, seed: int) -> PeftModel:
    """Train for all of the task's steps; the rate rises for a tenth of them and falls along a cosine."""
    model = adapted(task.base, side, task.steps, seed).train()
    tuner: Any = model.base_model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=task.steps + 1, pct_start=0.1, cycle_momentum=False
    )
    for batch in batches(task.rows("train"), task.batch_size, task.steps, seed):
        task.loss(model, batch).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if side.method == "PAT":
            tuner.advance()
    return model.eval()


# --- quality -------------------------------------------------------------------------------------------------------


class Reloaded(NamedTuple):
    """An exported model as plain transformers loads it."""

    model: nn.Module
    file_bytes: int


def reload(model: Any) -> Reloaded:
    """Save a stock model, and load it by its class."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = Path(folder, "model.safetensors").stat().st_size
        return Reloaded(type(model).from_pretrained(folder).eval(), size)


def flops(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """Of one forward, matrix products only."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(**inputs)
    return counter.get_total_flops()


@torch.no_grad()
def logits_difference(first: nn.Module, second: nn.Module, inputs: Mapping[str, Tensor]) -> float:
    """Norm of the difference of the logits over the norm of the first."""
    left, right = (model(**inputs).logits for model in (first, second))
    return ((left - right).norm() / left.norm()).item()


def measure(task: Task, model: PeftModel) -> dict[str, Any]:
    """Export, load again, and score the test rows."""
    trained = trained_parameters(model)
    tuner: Any = copy.deepcopy(model).base_model
    pruned = isinstance(tuner, PatModel)
    loaded, size = reload(tuner.merge_and_unload(**({"export": "stock"} if pruned else {})))
    inputs = {name: rows[:32] for name, rows in task.inputs("test").items()}
    return {
        "scores": task.scores(loaded, "test"),
        "trained_parameters": trained,
        "parameters": sum(parameter.numel() for parameter in loaded.parameters()),
        "flops": flops(loaded, {name: rows[:1] for name, rows in inputs.items()}),
        "file_bytes": size,
        "logits_difference": logits_difference(model, loaded, inputs),
    }


def choose(tasks: Sequence[Task], side: Side, rates: Sequence[float]) -> dict[float, float]:
    """Mean validation accuracy of every learning rate, the best one first."""
    found = dict[float, float]()
    for rate in rates:
        models = [fit(task, side, rate, seed) for seed, task in enumerate(tasks)]
        found[rate] = statistics.mean(
            task.scores(model, "validation")["accuracy"] for task, model in zip(tasks, models, strict=True)
        )
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def run_task(name: str, plan: Plan) -> dict[str, Any]:
    """All sides of one task, and the frozen model."""
    quieten()
    start = time.monotonic()
    tasks = [TASKS[name](seed, smoke=plan.smoke) for seed in range(plan.seeds)]
    tried = {side.method: choose(tasks[: plan.tuning_seeds], side, plan.rates) for side in (LORA, PAT, FIRST)}
    sides = dict[str, dict[str, Any]]()
    for side in SIDES:
        rate = next(iter(tried[side.method]))
        rows = [measure(task, fit(task, side, rate, seed)) for seed, task in enumerate(tasks)]
        scores = {metric: [row["scores"][metric] for row in rows] for metric in tasks[0].metrics}
        worst = max(row["logits_difference"] for row in rows)
        sides[str(side)] = {**rows[0], "learning_rate": rate, "scores": scores, "logits_difference": worst}
        print(name, side, json.dumps(sides[str(side)]), flush=True)
    frozen = [task.scores(task.base, "test") for task in tasks]
    return {
        "rows": {part: tasks[0].rows(part) for part in ("train", "validation", "test")},
        "steps": tasks[0].steps,
        "width": tasks[0].width,
        "validation": {method: [*found.items()] for method, found in tried.items()},
        "frozen": {metric: [score[metric] for score in frozen] for metric in tasks[0].metrics},
        "sides": sides,
        "seconds": time.monotonic() - start,
    }


def measure_quality(plan: Plan, jobs: int) -> dict[str, Any]:
    tasks = dict(zip(TASKS, side_by_side(run_task, list(TASKS), plan, jobs), strict=True))
    settings = {"rank": RANK, "rates": plan.rates, "seeds": plan.seeds, "tuning_seeds": plan.tuning_seeds}
    return {"settings": settings, "tasks": tasks}


# --- time ----------------------------------------------------------------------------------------------------------


def rounds_of(calls: Mapping[str, Callable[[], Any]], plan: Plan) -> dict[str, list[float]]:
    """Median ms of every call, one a repetition; the calls take turns."""
    medians: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(plan.repetitions):
        ms: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(plan.rounds + 2):
            for name in calls if turn % 2 else reversed([*calls]):
                start = time.perf_counter()
                calls[name]()
                ms[name].append(1e3 * (time.perf_counter() - start))
        for name in calls:
            medians[name].append(statistics.median(ms[name][2:]))  # two turns warm up
    return medians


def ratio_row(medians: Mapping[str, list[float]], side: str, parent: str) -> dict[str, float]:
    """Median and range of side over parent, repetition by repetition, and both in ms."""
    ratios = [ours / theirs for ours, theirs in zip(medians[side], medians[parent], strict=True)]
    return {
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "side_ms": statistics.median(medians[side]),
        "parent_ms": statistics.median(medians[parent]),
    }


def pruned_at(base: nn.Module, ratio: float) -> nn.Module:
    """What PAT exports at a ratio, of a model that was not trained."""
    tuner: Any = adapted(base, Side("PAT", ratio), 1, 0).base_model
    tuner.finalize()
    return reload(tuner.merge_and_unload(export="stock")).model


def measure_latency(plan: Plan, _: int) -> dict[str, Any]:
    """A forward of the reloaded stock model over that of the dense one."""
    rows: list[dict[str, Any]] = []
    for shape in shapes(plan.smoke):
        sides = {str(Side("PAT", ratio)): pruned_at(shape.model, ratio) for ratio in RATIOS}
        inputs = {name: tensor for name, tensor in shape.inputs.items() if name != "labels"}

        def call(model: nn.Module, inputs: dict[str, Tensor] = inputs) -> Callable[[], Any]:
            return torch.inference_mode()(lambda: model(**inputs))

        medians = rounds_of({name: call(model) for name, model in {"dense": shape.model, **sides}.items()}, plan)
        dense = flops(shape.model, inputs)
        for side, model in sides.items():
            row = {"model": shape.name, "side": side, "flops_ratio": flops(model, inputs) / dense}
            rows.append({**row, **ratio_row(medians, side, "dense")})
            print(json.dumps(rows[-1]), flush=True)
    return {"title": "a forward of the reloaded model", "beside": "flops_ratio", "rows": rows}


def measure_step(plan: Plan, _: int) -> dict[str, Any]:
    """A training step of PAT over one of LoRA with as many parameters, while the mask is soft and once it is hard."""
    rows: list[dict[str, Any]] = []
    for shape in shapes(plan.smoke):
        models = {name: adapted(shape.model, side, 10**6, 0).train() for name, side in STEPS.items()}
        tuner: Any = models["PAT, hard mask"].base_model
        tuner.finalize()
        for name in ("PAT, soft mask", "PAT, hard mask"):
            soft: Any = models[name].base_model
            soft.advance()
        medians = rounds_of({name: stepper(model, shape.inputs) for name, model in models.items()}, plan)
        counts = {name: trained_parameters(model) for name, model in models.items()}
        for side in list(STEPS)[1:]:
            row = {"model": shape.name, "side": side, "parameters_ratio": counts[side] / counts["LoRA"]}
            rows.append({**row, **ratio_row(medians, side, "LoRA")})
            print(json.dumps(rows[-1]), flush=True)
    return {"title": "a training step", "beside": "parameters_ratio", "rows": rows}


STEPS = {"LoRA": LORA, "PAT, soft mask": PAT, "PAT, hard mask": PAT}


def stepper(model: nn.Module, inputs: Mapping[str, Tensor]) -> Callable[[], None]:
    """One optimizer step on the same rows."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


# --- what it comes to ----------------------------------------------------------------------------------------------


PARTS = {"quality": measure_quality, "latency": measure_latency, "step": measure_step}


def differences(task: Mapping[str, Any], better: Side, worse: Side) -> list[float]:
    """`better` less `worse`, points of accuracy, seed by seed."""
    left, right = (task["sides"][str(side)]["scores"]["accuracy"] for side in (better, worse))
    return [a - b for a, b in zip(left, right, strict=True)]


def gates(result: Mapping[str, Any]) -> dict[str, Any]:
    """Every gate of the parts that were measured: name to {value, limit, passed}."""
    verdicts = dict[str, tuple[float, float]]()
    for name, task in result.get("quality", {"tasks": {}})["tasks"].items():
        gained = differences(task, PAT, FIRST)
        deviation = statistics.stdev(gained) if len(gained) > 1 else 0.0
        lost = statistics.mean(differences(task, LORA, PAT))
        worst = max(side["logits_difference"] for side in task["sides"].values())
        verdicts[f"{name}: {FIRST} − {PAT} + 2 sd, points"] = (2 * deviation - statistics.mean(gained), 0.0)
        verdicts[f"{name}: {LORA} − {PAT}, points"] = (lost, POINTS_GATE)
        verdicts[f"{name}: logits of the export, relative"] = (worst, LOGITS_GATE)
    for row in result.get("latency", {"rows": ()})["rows"]:
        if row["side"] == str(PAT):
            verdicts[f"{row['model']}: {PAT} / dense, latency"] = (row["ratio"], LATENCY_GATE)
    for row in result.get("step", {"rows": ()})["rows"]:
        verdicts[f"{row['model']}: {row['side']} / LoRA, step"] = (row["ratio"], STEP_GATE)
    return {name: {"value": v, "limit": limit, "passed": v <= limit} for name, (v, limit) in verdicts.items()}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure anew")
    parser.add_argument("--seeds", type=int, default=Plan.seeds)
    parser.add_argument("--tuning-seeds", type=int, default=Plan.tuning_seeds, help="seeds whose validation chooses")
    parser.add_argument("--jobs", type=int, default=1, help="tasks at a time, one thread each")
    parser.add_argument("--smoke", action="store_true", help="a little of everything, in seconds: no measurement")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if args.smoke and args.out == RESULTS:
        parser.error(f"a smoke run measures nothing, so it may not write {RESULTS.name}; give another --out.")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    quieten()
    plan = Plan(args.seeds, args.tuning_seeds)
    if args.smoke:
        plan = Plan(1, 1, rates=RATES[:1], rounds=1, repetitions=1, smoke=True)
    result: dict[str, Any] = {"question": "what does pruning while tuning cost in quality, and what does it save"}
    if args.out.exists():
        result = json.loads(args.out.read_text())
    for part in args.only:
        found = PARTS[part](plan, args.jobs)
        result[part] = {"smoke": plan.smoke, **environment(), **found}
        result["gates"] = gates(result)
        args.out.write_text(json.dumps(result, indent=1) + "\n")  # the better part of an hour may lie behind
    for name, verdict in result["gates"].items():
        print(f"{'ok  ' if verdict['passed'] else 'MISS'} {name}: {verdict['value']:.3g} <= {verdict['limit']:g}")
    return 0 if args.smoke or all(verdict["passed"] for verdict in result["gates"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
