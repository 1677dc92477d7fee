"""What do many adapters on one base gain over one after the other, and over PEFT's loop?

    python benchmarks/many.py                        # on an idle machine; writes results/many.json
    python benchmarks/many.py --only infer           # keeps the rest

The base is the demo's sentence encoder (6 blocks of 384) with LoRA r=8 on all linear layers, float32.

*Train*: runs of a classifier by `fit_many` together against the same runs by `Trainer.fit` one after the other, from
the first step to the last, loading left out: small steps, which a single run does not fill the machine with, and
steps that do; median of rounds in turns. Memory: the peak of a process that trains them in one way or the other.
Beside it the training step alone, of one batch with the rows of all adapters: PEFT's mixed-batch loop (in eval mode,
the only one that it takes names in) and ours, without a trainer around them.
*Infer*: a forward of 64 rows that take 1, 8 or 64 adapters, PEFT's loop and the grouped operator in turns.
*Serve*: a store of 1-bit adapters r=32 on queries and values of a ViT-B: bytes resident, milliseconds to switch.

Reach: small runs, 8 together, at least twice the tokens/s; large ones never below 0.95; a mixed batch of 8 adapters in
at most half of PEFT's time; 1,000 adapters in at most 160 MB, a switch in at most 1 ms.
"""

import argparse
import json
import logging
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoModelForSequenceClassification, BertConfig, ViTConfig, ViTModel

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import environment, quieten
from petune import BiLoraConfig, FusedLoraConfig, fuse
from petune.demo.retrieval import demo_encoder
from petune.many import ManyRun, fit_many
from petune.quantized.store import write_tasks
from petune.serving import AdapterServer
from petune.tasks.optim import adamw

RESULTS = Path(__file__).parent / "results" / "many.json"
TOGETHER, ONE_BY_ONE = "together", "one after the other"
PEFT, OURS = "PEFT adapter_names", "grouped"


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    sizes: tuple[tuple[str, int, int, int, tuple[int, ...]], ...] = (
        ("tiny", 1, 16, 12, (1, 2, 4, 8, 16, 32)),
        ("small", 2, 16, 12, (1, 2, 4, 8, 16)),
        ("large", 16, 64, 6, (1, 4)),
    )
    """Name, rows and tokens a row of one run's step, steps, and numbers of runs."""
    rounds: int = 3
    memory_runs: tuple[int, ...] = (1, 8)
    adapters: tuple[int, ...] = (1, 8, 64)
    rows: int = 64
    tokens: int = 32
    repeats: int = 9
    tasks: int = 1000
    switches: int = 200
    smoke: bool = False


SMOKE = Plan((("small", 2, 8, 2, (1, 2)),), 1, (), (1, 2), 4, 8, 2, 3, 4, True)


_tiny = False  # in a smoke run


def encoder(auto_class: Any, **options: Any) -> Any:
    """The demo's encoder; of a smoke run, a BERT of two blocks of random weights."""
    if _tiny:
        sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        torch.manual_seed(0)
        return auto_class.from_config(BertConfig(**sizes), **options)  # pyright: ignore[reportArgumentType]
    return auto_class.from_pretrained(demo_encoder(), **options)


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

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.began = time.perf_counter()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.ended = time.perf_counter()


def batch_of(rows: int, tokens: int, seed: int) -> dict[str, Tensor]:
    """Random words, all rows of one length."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(1000, 30_000, (rows, tokens), generator=rng)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(rows) % 2}


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
            times: dict[str, list[float]] = {TOGETHER: [], ONE_BY_ONE: []}
            for number in range(plan.rounds):
                for way in sorted(times, reverse=number % 2 == 1):
                    times[way].append(train_seconds(way, runs, batch, tokens, steps))
            ratios = [alone / joint for joint, alone in zip(times[TOGETHER], times[ONE_BY_ONE], strict=True)]
            row = {"size": size, "rows": batch, "tokens": tokens, "steps": steps, "runs": runs, **speedup(ratios)}
            count = runs * batch * tokens * steps
            row |= {way: round(count / statistics.median(found)) for way, found in times.items()}
            rows.append(row)
            print(json.dumps(row), flush=True)
    memory = [row for runs in plan.memory_runs for row in peak_memory(runs, plan)]
    return {"rounds": plan.rounds, "rows": rows, "memory": memory, "step": measure_step(plan)}


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


def all_cores() -> None:
    """All cores, which is the point; no warnings, bars or messages."""
    quieten()
    torch.set_num_threads(os.cpu_count() or 1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def _peak(way: str, runs: int, rows: int, tokens: int, steps: int) -> tuple[int, int]:
    all_cores()
    before = _largest_mib()
    train_seconds(way, runs, rows, tokens, steps)
    return before, _largest_mib()


def _largest_mib() -> int:
    """Peak resident MiB of this process; not by ru_maxrss, which starts at the size of the parent."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM:")).split()[1]) // 1024


def adapted(config: Callable[[], LoraConfig], adapters: int) -> PeftModel:
    """The encoder with some adapters of random weights, in eval mode."""
    torch.manual_seed(0)
    model: Any = get_peft_model(encoder(AutoModel, add_pooling_layer=False), config(), "0")
    for number in range(1, adapters):
        model.add_adapter(str(number), config())
    model.set_requires_grad([str(number) for number in range(adapters)])
    return model.eval()


CONFIGS: dict[str, Callable[[], LoraConfig]] = {
    PEFT: lambda: LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False),
    OURS: lambda: FusedLoraConfig(r=8, init_lora_weights=False),
}


def in_turns(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, one after the other, `repeats` times after one that is not timed."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(repeats + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if number:
                times[name].append(time.perf_counter() - began)
    return times


def compared(times: Mapping[str, list[float]]) -> dict[str, Any]:
    """Milliseconds, and ours over PEFT's."""
    ratios = [ours / theirs for ours, theirs in zip(times[OURS], times[PEFT], strict=True)]
    return {
        "peft_ms": round(1000 * statistics.median(times[PEFT]), 2),
        "ours_ms": round(1000 * statistics.median(times[OURS]), 2),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
    }


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


# --- inference -----------------------------------------------------------------------------------------------------


def measure_infer(plan: Plan) -> dict[str, Any]:
    """A forward of `plan.rows` rows, their adapters mixed as they come."""
    found: list[dict[str, Any]] = []
    batch = batch_of(plan.rows, plan.tokens, 0)
    del batch["labels"]
    for adapters in plan.adapters:
        order = torch.randperm(plan.rows, generator=torch.Generator().manual_seed(0)) % adapters
        names = [str(int(number)) for number in order]
        models = {side: adapted(config, adapters) for side, config in CONFIGS.items()}

        @torch.inference_mode()
        def forward(model: nn.Module, names: list[str] = names) -> Tensor:
            return model(**batch, adapter_names=names).last_hidden_state

        torch.testing.assert_close(forward(models[PEFT]), forward(models[OURS]), rtol=1e-3, atol=1e-3)
        times = in_turns({side: lambda m=m: forward(m) for side, m in models.items()}, plan.repeats)
        found.append({"adapters": adapters, **compared(times)})
        print(json.dumps(found[-1]), flush=True)
    return {"rows": plan.rows, "tokens": plan.tokens, "by_adapters": found}


# --- serving -------------------------------------------------------------------------------------------------------


def vision_base(smoke: bool) -> ViTModel:
    """A ViT-B of random weights."""
    torch.manual_seed(0)
    small: dict[str, int] = {"hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 64, "image_size": 32}
    return ViTModel(ViTConfig(**(small if smoke else {})), add_pooling_layer=False).eval()  # pyright: ignore[reportArgumentType]


def random_tasks(base: nn.Module, count: int) -> Iterator[tuple[str, PeftModel]]:
    """The same model with one random 1-bit adapter after the other."""
    model: Any = get_peft_model(base, BiLoraConfig(r=32, init_weights=False))
    factors = [one for name, one in model.named_parameters() if "petune_bilora" in name]
    for number in range(count):
        torch.manual_seed(number)
        with torch.no_grad():
            for one in factors:
                one.normal_(0.0, 0.02)
        yield f"task{number}", model


def measure_serve(plan: Plan) -> dict[str, Any]:
    """Bytes of all tasks resident, and milliseconds to activate one: from the file, and resident already."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tasks.safetensors"
        report = write_tasks(path, random_tasks(vision_base(plan.smoke), plan.tasks))
        base = vision_base(plan.smoke)
        before = _resident()
        with AdapterServer(base, path) as server:
            names = [f"task{number}" for number in range(plan.tasks)]
            cold = [_timed(lambda name=name: server.activate([name])) for name in names]
            rng = torch.Generator().manual_seed(0)
            order = torch.randint(plan.tasks, (plan.switches,), generator=rng).tolist()
            warm = [_timed(lambda number=number: server.activate([names[number]])) for number in order]
            counted, grown = server.resident_bytes, _resident() - before
    return {
        "tasks": plan.tasks,
        "file_bytes": report.size,
        "resident_bytes": counted,
        "process_grew_bytes": grown,
        "from_file_ms": _spread(cold),
        "resident_ms": _spread(warm),
    }


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - began)


def _spread(times: Sequence[float]) -> dict[str, float]:
    ordered = sorted(times)
    found = {"median": statistics.median(ordered), "p90": ordered[int(0.9 * (len(ordered) - 1))], "most": ordered[-1]}
    return {name: round(value, 4) for name, value in found.items()}


def _resident() -> int:
    """Resident bytes of this process, those of mapped files included."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


# --- all of it -----------------------------------------------------------------------------------------------------

PARTS = {"train": measure_train, "infer": measure_infer, "serve": measure_serve}


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
    global _tiny
    _tiny = args.smoke
    result: dict[str, Any] = {"question": "what do many adapters on one base gain in time and memory"}
    if args.out.exists():
        result = json.loads(args.out.read_text())
    for part in args.only:
        found = PARTS[part](SMOKE if args.smoke else Plan())
        result[part] = {"smoke": args.smoke, **environment(), **found}
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
