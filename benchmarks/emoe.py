"""Do experts that emerge in a dense feed-forward help in and out of domain, and does routing to them pay?

    python benchmarks/emoe.py                 # on an idle machine; writes results/emoe.json
    python benchmarks/emoe.py --only speed    # measures this part anew and keeps the others

*Accuracy*: every side trains for as many steps on the same rows in the same order, LoRA alike, under a frozen head
that all share. Number of experts, experts a token keeps and blocks are the paper's. The learning rate is the best of
one grid, the same for all sides, by the mean accuracy on the validation rows of the first seeds. Each seed is saved,
loaded into a fresh base, and tested once: in-domain, and on other packages. *Invariance*: what a token is routed to in
a batch and alone; beside it, the same with the capacity of the authors' code. *Speed*: a feed-forward of random
weights after `sparsify()` over the stock one, on random tokens, which use the experts about evenly.

Gates: every routing decision alike, and logits within float error; time <= 0.5 of dense from 256 tokens on, and
nowhere above 1.03.
"""

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import environment, train
from benchmarks.emoe_routing import capacity, compare, time_rows
from benchmarks.emoe_tasks import IN_DOMAIN, SHIFTED, WordOrder
from benchmarks.onebit_tasks import batches
from petune import EmoeConfig, FusedLoraConfig

RESULTS = Path(__file__).parent / "results" / "emoe.json"
NUM_EXPERTS, TOP_K, LAYERS = 64, 16, "last_even:2"  # the paper's for LoRA, which has top_k 16 and 32
RATES = (2e-3, 4e-3, 8e-3)
WEIGHT_DECAY = 1e-4
BATCH = 64  # of the invariance
CAPACITY = 1.5  # the factor of the authors' code
ROUTINGS = ((64, 16), (16, 4))
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
LOGITS_GATE = 1e-5
FAST_GATE, FAST_TOKENS, SLOW_GATE = 0.5, 256, 1.03

LORA, EMOE, RANDOM = "LoRA", "LoRA + EMoE", "LoRA + random clusters"
DENSE = "EMoE trained, dense at test"
SIDES: dict[str, Callable[[int], PeftConfig]] = {
    LORA: lambda seed: FusedLoraConfig(**_lora()),
    EMOE: lambda seed: EmoeConfig(**_routing(seed), cluster="balanced_kmeans", **_lora()),
    RANDOM: lambda seed: EmoeConfig(**_routing(seed), cluster="random", **_lora()),
}
"""What is trained."""


def _lora() -> dict[str, Any]:
    return {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": list(WordOrder.targets)}


def _routing(seed: int) -> dict[str, Any]:
    return {"num_experts": NUM_EXPERTS, "top_k": TOP_K, "layers": LAYERS, "seed": seed}


@dataclass(frozen=True)
class Plan:
    """How much to run."""

    seeds: int = 5
    tuning_seeds: int = 2
    """Seeds whose validation rows choose."""
    rates: tuple[float, ...] = RATES
    tokens: tuple[int, ...] = TOKENS
    rounds: int = 15
    """Of the timing."""
    threads: int = 1
    """Of the timing; accuracy and invariance take one."""
    smoke: bool = False


# --- accuracy ------------------------------------------------------------------------------------------------------


def fit(task: WordOrder, side: str, learning_rate: float, seed: int) -> PeftModel:
    """Train for all of the task's steps."""
    torch.manual_seed(seed)  # of the adapter's weights, and from here on of dropout
    model = get_peft_model(copy.deepcopy(task.base), SIDES[side](seed))
    steps = batches(task.rows("train"), task.batch_size, task.steps, seed)
    return train(model, task, steps, task.steps, learning_rate, WEIGHT_DECAY)


def reloaded(task: WordOrder, model: PeftModel) -> PeftModel:
    """The adapter in a fresh base, from its file."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return PeftModel.from_pretrained(copy.deepcopy(task.base), folder).eval()


def accuracy(task: WordOrder, model: nn.Module, part: Any) -> float:
    return task.scores(model, part)["accuracy"]


def choose(
    tasks: Sequence[WordOrder], side: str, rates: Sequence[float]
) -> tuple[dict[float, float], list[PeftModel]]:
    """Mean validation accuracy of every learning rate, the best one first; and the models of that one."""
    found, kept = dict[float, float](), list[PeftModel]()
    for rate in rates:
        models = [fit(task, side, rate, seed) for seed, task in enumerate(tasks)]
        score = statistics.mean(accuracy(*pair, "validation") for pair in zip(tasks, models, strict=True))
        if not found or score > max(found.values()):
            kept = models
        found[rate] = score
    return dict(sorted(found.items(), key=lambda pair: -pair[1])), kept


def run_side(tasks: Sequence[WordOrder], side: str, plan: Plan) -> tuple[dict[str, Any], list[PeftModel]]:
    """Choose by validation, train the other seeds, then save, load and test every seed: result and models."""
    start = time.monotonic()
    tried, models = choose(tasks[: plan.tuning_seeds], side, plan.rates)
    best = next(iter(tried))
    models += [fit(tasks[seed], side, best, seed) for seed in range(len(models), len(tasks))]
    loaded = [reloaded(*pair) for pair in zip(tasks, models, strict=True)]
    result = {
        "learning_rate": best,
        "validation": [{"learning_rate": rate, "accuracy": score} for rate, score in tried.items()],
        "scores": test(tasks, loaded),
        "seconds": time.monotonic() - start,
    }
    return result, loaded


def test(tasks: Sequence[WordOrder], models: Sequence[nn.Module]) -> dict[str, list[float]]:
    """Accuracy of each seed on both test splits."""
    pairs = list(zip(tasks, models, strict=True))
    return {part: [accuracy(*pair, part) for pair in pairs] for part in (IN_DOMAIN, SHIFTED)}


def measure_accuracy(plan: Plan) -> dict[str, Any]:
    """All sides, and the frozen model without an adapter."""
    tasks = [WordOrder(seed, smoke=plan.smoke) for seed in range(plan.seeds)]
    sides = dict[str, dict[str, Any]]()
    for side in SIDES:
        sides[side], models = run_side(tasks, side, plan)
        print(side, json.dumps(sides[side]), flush=True)
        if side == EMOE:
            dense = test(tasks, [model.merge_and_unload() for model in models])
            sides[DENSE] = {"learning_rate": sides[side]["learning_rate"], "scores": dense}
    return {
        "settings": {"num_experts": NUM_EXPERTS, "top_k": TOP_K, "layers": LAYERS, "weight_decay": WEIGHT_DECAY},
        "seeds": plan.seeds,
        "tuning_seeds": plan.tuning_seeds,
        "rows": {part: tasks[0].rows(part) for part in tasks[0].parts},
        "steps": tasks[0].steps,
        "frozen": test(tasks, [task.base for task in tasks]),
        "sides": sides,
    }


# --- invariance and speed ------------------------------------------------------------------------------------------


def measure_invariance(plan: Plan) -> dict[str, Any]:
    """Some test rows alone and in one batch, dropless and under the authors' capacity; by a model of seed 0."""
    task = WordOrder(0, smoke=plan.smoke)
    model = fit(task, EMOE, RATES[1], 0)
    rows = task.parts[IN_DOMAIN][: 9 if plan.smoke else BATCH]
    result: dict[str, Any] = {"rows": len(rows), "learning_rate": RATES[1], "capacity_factor": CAPACITY}
    result["dropless"] = compare(task, model, rows)
    with capacity(model, CAPACITY):
        result["capacity"] = compare(task, model, rows)
    print(json.dumps(result), flush=True)
    return result


def measure_speed(plan: Plan) -> dict[str, Any]:
    """On the CPU in float32, and in bfloat16 on a GPU where there is one."""
    torch.set_num_threads(plan.threads)
    places = [(torch.device("cpu"), torch.float32)]
    if torch.cuda.is_available():
        places.append((torch.device("cuda"), torch.bfloat16))
    rows = [
        row for place in places for routing in ROUTINGS for row in time_rows(routing, *place, plan.tokens, plan.rounds)
    ]
    return {"rounds": plan.rounds, "rows": rows}


# --- what it comes to ----------------------------------------------------------------------------------------------


PARTS = {"accuracy": measure_accuracy, "invariance": measure_invariance, "speed": measure_speed}


def gates(result: Mapping[str, Any]) -> dict[str, Any]:
    """Every gate of the parts that were measured: name to {value, limit, passed}."""
    verdicts = dict[str, tuple[float, float]]()
    if "invariance" in result:
        found = result["invariance"]["dropless"]
        verdicts["routing decisions that a batch changes"] = (1 - found["same_ratio"], 0.0)
        verdicts["logits in a batch less alone"] = (found["logits_difference"], LOGITS_GATE)
    for row in result.get("speed", {"rows": ()})["rows"]:
        name = f"{row['device']} {row['dtype']}, {row['top_k']} of {row['num_experts']}, {row['tokens']} tokens, time"
        verdicts[name] = (row["sparse"]["ratio"], FAST_GATE if row["tokens"] >= FAST_TOKENS else SLOW_GATE)
    return {name: {"value": v, "limit": limit, "passed": v <= limit} for name, (v, limit) in verdicts.items()}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure anew")
    parser.add_argument("--seeds", type=int, default=Plan.seeds)
    parser.add_argument("--tuning-seeds", type=int, default=Plan.tuning_seeds, help="seeds whose validation chooses")
    parser.add_argument("--smoke", action="store_true", help="a little of everything, in seconds: no measurement")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if args.smoke and args.out == RESULTS:
        parser.error(f"a smoke run measures nothing, so it may not write {RESULTS.name}; give another --out.")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    plan = Plan(args.seeds, args.tuning_seeds, threads=torch.get_num_threads())
    if args.smoke:
        plan = Plan(1, 1, rates=RATES[:1], tokens=(5, 300), rounds=1, threads=plan.threads, smoke=True)
    result: dict[str, Any] = {"question": "do emergent experts help in and out of domain, and does routing pay"}
    if args.out.exists():
        result = json.loads(args.out.read_text())
    for part in args.only:
        torch.set_num_threads(1)
        found = PARTS[part](plan)
        result[part] = {"smoke": plan.smoke, **environment(), **found}
        result["gates"] = gates(result)
        args.out.write_text(json.dumps(result, indent=1) + "\n")  # the better part of an hour may lie behind
    for name, verdict in result["gates"].items():
        print(f"{'ok  ' if verdict['passed'] else 'MISS'} {name}: {verdict['value']:.3g} <= {verdict['limit']:g}")
    return 0 if args.smoke or all(verdict["passed"] for verdict in result["gates"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
