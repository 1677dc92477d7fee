"""What do many adapters on one base gain over one after the other, and over PEFT's loop?

    python benchmarks/many.py                        # on an idle machine; writes results/many.json
    python benchmarks/many.py --only infer           # keeps the rest

The base is the demo's sentence encoder (6 blocks of 384) with LoRA r=8 on all linear layers, float32.

*Train*: runs of a classifier by `fit_many` together against the same runs by `Trainer.fit` one after the other, from
the first step to the last, loading left out: steps of one and of two short rows, with which a single run reaches a
fraction of the machine's tokens/s, and large steps; median of rounds in turns. *fills* is that fraction, the tokens/s
of one run by itself over those with large steps: no gain can be above its inverse. Memory: the peak of a process that
trains them in one way or the other. Threads that wait for work stay awake (OMP_WAIT_POLICY=active), in both ways; one
case is also measured with threads that fall asleep after a while, as libgomp's do unless told.
Beside it the training step alone, of one batch with the rows of all adapters: PEFT's mixed-batch loop (in eval mode,
the only one that it takes names in) and ours, without a trainer around them.
*Infer*: rows that take 1, 8 or 64 adapters, PEFT's loop and the grouped operator in turns: a forward of the encoder,
and `generate` with a cache by a causal model of 30 blocks of 576 (the shape of SmolLM2-135M, random weights), where
each pass has one token a row.
*Serve*: a store of 1-bit adapters r=32 on queries and values of a ViT-B: bytes resident, milliseconds to switch.

Reach: small runs, 8 together, at least twice the tokens/s; large ones never below 0.95; a mixed batch of 8 adapters in
at most half of PEFT's time; 1,000 adapters in at most 160 MB, a switch in at most 1 ms.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "active")  # read when torch is imported

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import environment
from benchmarks.many_infer import measure_infer, measure_serve
from benchmarks.many_parts import (
    CONFIGS,
    SMOKE,
    SMOKE_VARIABLE,
    Plan,
    adapted,
    all_cores,
    batch_of,
    compared,
    encoder,
    in_turns,
    is_smoke,
)
from petune import FusedLoraConfig, fuse
from petune.many import ManyRun, fit_many
from petune.tasks.optim import adamw

RESULTS = Path(__file__).parent / "results" / "many.json"
TOGETHER, ONE_BY_ONE = "together", "one after the other"


# --- training ------------------------------------------------------------------------------------------------------


class Classifier(L.LightningModule):
    """The encoder with a head of two classes and a LoRA."""

    def configure_model(self) -> None:
        if "model" not in self._modules:
            base = encoder(AutoModelForSequenceClassification)
            self.model = get_peft_model(base, FusedLoraConfig(r=8, task_type="SEQ_CLS"))
            fuse(self.model)
            self.train()

    def on_fit_start(self) -> None:
        self.train()

    def training_step(self, batch: Mapping[str, Tensor], _: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw([one for one in self.parameters() if one.requires_grad], lr=1e-3)


class Clock(Callback):
    """When training began and ended."""

    began = ended = 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.began = self.began or time.perf_counter()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.ended = time.perf_counter()


def make_run(seed: int, rows: int, tokens: int, steps: int, folder: str) -> tuple[ManyRun, Clock]:
    """A run of `steps` steps, and its clock."""
    clock = Clock()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    batches = [batch_of(rows, tokens, 1000 * seed + step) for step in range(steps)]
    return ManyRun(Classifier(), DataLoader(batches, batch_size=None), trainer, seed=seed), clock


def train_seconds(way: str, runs: int, rows: int, tokens: int, steps: int) -> float:
    """Of all steps of all runs."""
    with tempfile.TemporaryDirectory() as folder:
        made = {str(seed): make_run(seed, rows, tokens, steps, folder) for seed in range(runs)}
        if way == TOGETHER:
            for result in fit_many({name: run for name, (run, _) in made.items()}).values():
                if result.error is not None:
                    raise result.error
            clocks = [clock for _, clock in made.values()]
            return max(clock.ended for clock in clocks) - max(clock.began for clock in clocks)
        seconds = 0.0
        for run, clock in made.values():
            run([])
            seconds += clock.ended - clock.began
            run.task._modules.clear()  # or N bases would be in memory, which nobody would do
        return seconds


def measure_train(plan: Plan) -> dict[str, Any]:
    """Tokens/s of both ways, for each size of a step and number of runs."""
    rows: list[dict[str, Any]] = []
    for size, batch, tokens, steps, numbers in plan.sizes:
        for runs in numbers:
            case = {"size": size, "rows": batch, "tokens": tokens, "steps": steps, "runs": runs}
            rows.append(case | gain(plan.rounds, runs, batch, tokens, steps))
            print(json.dumps(rows[-1]), flush=True)
    most = max(row[ONE_BY_ONE] for row in rows if row["size"] == "large")
    rows = [row | {"fills": round(row[ONE_BY_ONE] / most, 3)} for row in rows]
    memory = [row for runs in plan.memory_runs for row in peak_memory(runs, plan)]
    return {"rounds": plan.rounds, "rows": rows, "memory": memory, "step": measure_step(plan)}


def gain(rounds: int, runs: int, rows: int, tokens: int, steps: int) -> dict[str, float]:
    """Of runs together over one after the other, and the tokens/s of both."""
    times: dict[str, list[float]] = {TOGETHER: [], ONE_BY_ONE: []}
    for number in range(rounds):
        for way in sorted(times, reverse=number % 2 == 1):
            times[way].append(train_seconds(way, runs, rows, tokens, steps))
    ratios = [alone / joint for joint, alone in zip(times[TOGETHER], times[ONE_BY_ONE], strict=True)]
    count = runs * rows * tokens * steps
    return speedup(ratios) | {way: round(count / statistics.median(found)) for way, found in times.items()}


def measure_asleep(plan: Plan) -> dict[str, Any]:
    """The gain of small runs in a process whose waiting threads spin as long as libgomp lets them by default.

    It comes before anything else starts a thread in this process, which would then be awake beside it.
    """
    size, rows, tokens, steps, numbers = plan.sizes[0]
    runs = 8 if 8 in numbers else numbers[-1]
    case = plan.rounds, runs, rows, tokens, steps
    if is_smoke():
        found = gain(*case)
    else:
        os.environ["GOMP_SPINCOUNT"] = "300000"
        try:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found = pool.apply(_gain_in_child, case)
        finally:
            del os.environ["GOMP_SPINCOUNT"]
    row = {"size": size, "rows": rows, "tokens": tokens, "steps": steps, "runs": runs, **found}
    print(json.dumps(row), flush=True)
    return {"rounds": plan.rounds, **row}


def _gain_in_child(*case: int) -> dict[str, float]:
    all_cores()
    return gain(*case)


def speedup(ratios: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest of the rounds' ratios."""
    found = {"gain": statistics.median(ratios), "gain_min": min(ratios), "gain_max": max(ratios)}
    return {name: round(value, 3) for name, value in found.items()}


def peak_memory(runs: int, plan: Plan) -> Iterator[dict[str, Any]]:
    """Peak resident bytes of a process that trains in one way, and what of them it had before."""
    _, batch, tokens, *_ = plan.sizes[0]
    for way in (TOGETHER, ONE_BY_ONE):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            before, peak = pool.apply(_peak, (way, runs, batch, tokens, 3))
        row = {"way": way, "runs": runs, "peak_mib": peak, "before_mib": before}
        print(json.dumps(row), flush=True)
        yield row


def _peak(way: str, runs: int, rows: int, tokens: int, steps: int) -> tuple[int, int]:
    all_cores()
    before = _largest_mib()
    train_seconds(way, runs, rows, tokens, steps)
    return before, _largest_mib()


def _largest_mib() -> int:
    """Peak resident MiB of this process; not by ru_maxrss, which starts at the size of the parent."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM:")).split()[1]) // 1024


def measure_step(plan: Plan) -> list[dict[str, Any]]:
    """Forward and backward of one batch with rows of all adapters."""
    found: list[dict[str, Any]] = []
    for size, rows, tokens, _, numbers in plan.sizes:
        for adapters in numbers:
            batch = batch_of(rows * adapters, tokens, 0)
            del batch["labels"]
            names = [str(number) for number in range(adapters) for _ in range(rows)]

            def step(model: nn.Module, batch: Any = batch, names: list[str] = names) -> None:
                model(**batch, adapter_names=names).last_hidden_state.sum().backward()
                model.zero_grad()

            models = {side: adapted(config, adapters) for side, config in CONFIGS.items()}
            times = in_turns({side: lambda m=m: step(m) for side, m in models.items()}, plan.repeats)
            found.append({"size": size, "adapters": adapters, **compared(times)})
            print(json.dumps(found[-1]), flush=True)
    return found


# --- all of it -----------------------------------------------------------------------------------------------------

PARTS = {"asleep": measure_asleep, "train": measure_train, "infer": measure_infer, "serve": measure_serve}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure anew")
    parser.add_argument("--smoke", action="store_true", help="a little of everything, in seconds: no measurement")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if args.smoke and args.out == RESULTS:
        parser.error(f"a smoke run measures nothing, so it may not write {RESULTS.name}; give another --out.")
    all_cores()
    if args.smoke:
        os.environ[SMOKE_VARIABLE] = "1"
    result: dict[str, Any] = {"question": "what do many adapters on one base gain in time and memory"}
    if args.out.exists():
        result = json.loads(args.out.read_text())
    for part in args.only:
        found = PARTS[part](SMOKE if args.smoke else Plan())
        place = environment()
        place["hardware"] |= {"omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default")}
        result[part] = {"smoke": args.smoke, **place, **found}
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
