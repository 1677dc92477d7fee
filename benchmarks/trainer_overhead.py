"""What does a trainer add to a training step?

    python benchmarks/trainer_overhead.py    # on an idle machine; writes results/trainer_overhead.json

The same BERT, LoRA, rows, optimizer and schedule under a bare PyTorch loop, under Lightning with our task and data as
`petune fit` sets them up (CSV log, progress bar, memory report; no checkpoint in the timed steps), and under the
Hugging Face Trainer. Steps are sized to take about 20 ms in the bare loop. The three run in turns, in an order that
changes with the round; a round's time is the median over its steps of the time from one step's end to the next.
Reported are the medians of the rounds and, for the ratios to the bare loop of the same round, median, smallest and
largest.

Gate: our task under Lightning takes at most 1.05 of the bare loop's time.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: one thread has the least spread
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import environment, quieten
from petune import FusedLoraConfig
from petune.callbacks import MemoryReport, ProgressBar
from petune.cli.train import default_loggers
from petune.tasks import TextClassification, TextClassificationData
from petune.tasks.optim import adamw, warmup_schedule

RESULTS = Path(__file__).parent / "results" / "trainer_overhead.json"
GATE = 1.05
WORDS = [f"w{number}" for number in range(100)]
SPECIAL = ["[PAD]", "[UNK]"]
BARE, OURS, HF = "bare loop", "Lightning with our task", "Hugging Face Trainer"


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    steps: int = 120
    """Of a round; the first `warmup` of them are not timed."""
    warmup: int = 20
    rounds: int = 9
    width: int = 192
    blocks: int = 2
    batch_size: int = 8
    tokens: int = 32
    smoke: bool = False


SMOKE = Plan(steps=6, warmup=2, rounds=2, width=32, blocks=1, batch_size=4, tokens=8, smoke=True)


# --- what all three train ------------------------------------------------------------------------------------------


def model(plan: Plan) -> BertForSequenceClassification:
    """A BERT of random weights."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=plan.width,
        num_hidden_layers=plan.blocks,
        num_attention_heads=4,
        intermediate_size=4 * plan.width,
        pad_token_id=0,
    )
    return BertForSequenceClassification(config)


def adapter() -> FusedLoraConfig:
    """LoRA on every linear layer of the blocks."""
    return FusedLoraConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS")


def tokenizer() -> PreTrainedTokenizerFast:
    """Words to numbers."""
    vocabulary = {word: number for number, word in enumerate(SPECIAL + WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", model_max_length=512)


def data(plan: Plan) -> TextClassificationData:
    """Random texts, all of one length; the rows of one round."""
    rng = torch.Generator().manual_seed(0)
    words = torch.randint(len(WORDS), (plan.steps * plan.batch_size, plan.tokens), generator=rng)
    rows = [
        {"text": " ".join(WORDS[word] for word in row), "label": "ab"[number % 2]}
        for number, row in enumerate(words.tolist())
    ]
    return TextClassificationData(
        tokenizer(),
        dataset={"train": rows},
        max_length=plan.tokens,
        batch_size=plan.batch_size,
        validation_split=0,
    )


class Clock:
    """The times at which steps end."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def tick(self) -> None:
        """A step has ended."""
        self.ends.append(time.perf_counter())

    def step_ms(self, plan: Plan) -> float:
        """Median time of the steps behind the warm-up, in ms."""
        times = [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)]
        return 1000 * statistics.median(times[plan.warmup :])


# --- the three -----------------------------------------------------------------------------------------------------


def run_bare(plan: Plan, clock: Clock) -> list[float]:
    """The loop that one writes by hand; returns the losses, as the others do."""
    module = data(plan)
    module.setup("fit")
    net = get_peft_model(model(plan), adapter()).train()
    optimizer = adamw([one for one in net.parameters() if one.requires_grad], lr=5e-4)
    schedule = warmup_schedule(optimizer, "linear", plan.steps, 0.1)
    losses: list[torch.Tensor] = []
    for batch in module.train_dataloader():
        loss = net(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
        clock.tick()
    return [loss.item() for loss in losses]


class _Ticks(Callback):
    def __init__(self, clock: Clock) -> None:
        self.clock, self.losses = clock, list[torch.Tensor]()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"].detach())
        self.clock.tick()


def run_ours(plan: Plan, clock: Clock) -> list[float]:
    """As `petune fit` trains."""
    task = TextClassification(model(plan), tokenizer=tokenizer(), labels=["a", "b"], adapter=adapter())
    ticks = _Ticks(clock)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=1,
            gradient_clip_val=1.0,
            callbacks=[ProgressBar(), MemoryReport(print_table=False), ticks],
            logger=default_loggers(Path(folder)),
            log_every_n_steps=10,
            enable_checkpointing=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(task, datamodule=data(plan))
    return [loss.item() for loss in ticks.losses]


class _HfTicks(TrainerCallback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.tick()


class _HfTrainer(Trainer):
    """Reads the batches of our data, so that all three train on the same."""

    losses: list[torch.Tensor]

    def get_train_dataloader(self) -> Any:
        return self.train_dataset

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss)
        return loss


def run_hf(plan: Plan, clock: Clock) -> list[float]:
    """The Hugging Face Trainer with its defaults, logging as often as ours."""
    module = data(plan)
    module.setup("fit")
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=plan.steps,
            learning_rate=5e-4,
            weight_decay=0.01,
            warmup_steps=round(0.1 * plan.steps),
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            max_grad_norm=1.0,
            per_device_train_batch_size=plan.batch_size,
        )
        rows: Any = module.train_dataloader()
        trainer = _HfTrainer(
            get_peft_model(model(plan), adapter()), arguments, train_dataset=rows, callbacks=[_HfTicks(clock)]
        )
        trainer.losses = []
        trainer.train()
    return [loss.item() for loss in trainer.losses]


RUNS: dict[str, Callable[[Plan, Clock], list[float]]] = {BARE: run_bare, OURS: run_ours, HF: run_hf}


# --- the measurement -----------------------------------------------------------------------------------------------


def measure(plan: Plan) -> dict[str, Any]:
    """Times of every round, and what they come to."""
    times: dict[str, list[float]] = {name: [] for name in RUNS}
    losses: dict[str, list[float]] = {}
    names = list(RUNS)
    for number in range(plan.rounds):
        for name in names[number % 3 :] + names[: number % 3]:
            clock = Clock()
            losses[name] = RUNS[name](plan, clock)
            times[name].append(clock.step_ms(plan))
    return {"smoke": plan.smoke, "last_losses": {name: found[-1] for name, found in losses.items()}, **summary(times)}


def summary(times: Mapping[str, list[float]]) -> dict[str, Any]:
    """Medians, and the ratios to the bare loop of the same round."""
    rows: list[dict[str, Any]] = []
    for name, found in times.items():
        ratios = [one / bare for one, bare in zip(found, times[BARE], strict=True)]
        rows.append(
            {
                "trainer": name,
                "step_ms": round(statistics.median(found), 3),
                "ratio": round(statistics.median(ratios), 4),
                "ratio_min": round(min(ratios), 4),
                "ratio_max": round(max(ratios), 4),
            }
        )
    value = next(row["ratio"] for row in rows if row["trainer"] == OURS)
    return {"rows": rows, "gate": {"limit": GATE, "value": value, "passed": value <= GATE}}


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """The table."""
    for row in result["rows"]:
        spread = f"{row['ratio_min']:.3f} to {row['ratio_max']:.3f}"
        yield f"{row['trainer']:<26}{row['step_ms']:>9.2f} ms  {row['ratio']:.3f} ({spread})"
    verdict = "passed" if result["gate"]["passed"] else "missed"
    yield f"gate: {result['gate']['value']:.3f} <= {result['gate']['limit']} {verdict}"


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a few tiny steps, to see that it runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON to write")
    options = parser.parse_args(argv)
    if options.smoke and options.out == RESULTS:
        parser.error("a smoke run measures nothing; give it another --out")
    quieten()
    result = {**environment(), **measure(SMOKE if options.smoke else Plan())}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(lines(result)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
