"""Adapt a tiny vision transformer to turned digits: a smoke test of the mechanics, with the baseline that beats it."""

import copy
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from petune.card import CardInfo
from petune.demo.metrics import Floats, Interval, bootstrap_mean
from petune.demo.progress import Stages, show_stages
from petune.demo.report import Check, Comparison, DemoResult, Row, environment
from petune.demo.saving import adapter_folder, save_and_check
from petune.demo.trials import Trial, trials

ZERO_SHOT = "as pretrained"
PROBE = "linear probe"
SCRATCH = "from scratch"
PIXELS = "logistic regression on pixels"

PRETRAIN_RATE = 1e-3
ADAPTER_LEARNING_RATE = 5e-3
FULL_LEARNING_RATE = 1e-3
BATCH_SIZE = 32


@dataclass(frozen=True)
class VisionSettings:
    """Sizes of the run."""

    num_pretrain: int = 900
    """Upright images."""
    num_adapt: int = 300
    """Turned images, of those seen upright."""
    pretrain_epochs: int = 15
    adapt_epochs: int = 20


@dataclass(frozen=True)
class _Images:
    """Pixels in 0..1, [images, 1, 8, 8], and digits, [images]."""

    pixels: Tensor
    digits: Tensor

    def turned(self) -> "_Images":
        return replace(self, pixels=torch.rot90(self.pixels, dims=(2, 3)))

    def first(self, count: int) -> "_Images":
        return _Images(self.pixels[:count], self.digits[:count])


@dataclass(frozen=True)
class _Outcome:
    row: Row
    correct: Floats
    checks: tuple[Check, ...] = ()
    folder: Path | None = None


def run_vision(
    *,
    compare: bool = False,
    budget_s: float = 180.0,
    seed: int = 0,
    methods: Sequence[str] | None = None,
    output: Path,
    settings: VisionSettings | None = None,
    started: float | None = None,
    quiet: bool = False,
) -> DemoResult:
    """Pretrain on upright digits, adapt to digits turned by 90 degrees, and compare.

    Args:
        compare: fine-tune the whole model, and train one from scratch, as well.
        budget_s: seconds; what is trained is cut to fit, each row alike.
        seed: of the split, of the training and of the bootstrap.
        methods: short names; None for all that can be trained here.
        output: folder for the adapters.
        settings: sizes of the run.
        started: `time.monotonic()` from which the budget counts; None for now.
        quiet: show no progress.

    Raises:
        ValueError: an unknown method, or one that was asked for and cannot be trained here.
    """
    started = time.monotonic() if started is None else started
    rows, left_out = trials(
        methods,
        make_vit(seed),
        compare=compare,
        adapter_learning_rate=ADAPTER_LEARNING_RATE,
        full_learning_rate=FULL_LEARNING_RATE,
        callbacks=False,
    )
    trained = len(rows) + compare
    run = _Run(settings or VisionSettings(), seed, output, len(rows) - compare)
    with show_stages(8.0 + 5.0 * trained, quiet=quiet) as stages, torch.random.fork_rng(devices=[]):
        with stages.stage("pretraining on upright digits", 7.0):
            run.pretrain()
        with stages.stage("baselines", 1.0):
            outcomes = run.baselines()
        run.plan((budget_s - (time.monotonic() - started)) / trained)
        for trial in rows:
            with stages.stage(f"training: {trial.name}", 5.0):
                outcomes.append(run.train(trial, stages))
        if compare:
            with stages.stage(f"training: {SCRATCH}", 5.0):
                outcomes.append(run.scratch(stages))
    return run.result(outcomes, left_out, time.monotonic() - started)


def make_vit(seed: int) -> ViTForImageClassification:
    """64 wide, 4 blocks, patches of 2 × 2 pixels, random weights."""
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=8,
        patch_size=2,
        num_channels=1,
    )
    config.num_labels = 10
    return ViTForImageClassification(config)


class _Run:
    """What the rows of one run share."""

    def __init__(self, settings: VisionSettings, seed: int, output: Path, adapters: int) -> None:
        self.settings = settings
        self.seed = seed
        self.output = output
        self.adapters = adapters
        self.upright, test = _digits(settings.num_pretrain, seed)
        self.adapt = self.upright.first(settings.num_adapt).turned()
        self.test = test.turned()
        self.planned = settings.adapt_epochs * _batches(settings.num_adapt)
        self.steps = self.planned
        self.step_s = 0.0
        self.base: ViTForImageClassification = make_vit(seed)

    def pretrain(self) -> None:
        steps = self.settings.pretrain_epochs * _batches(self.settings.num_pretrain)
        start = time.monotonic()
        _fit(self.base, self.upright, steps, PRETRAIN_RATE, self.seed)
        self.step_s = (time.monotonic() - start) / steps

    def baselines(self) -> list[_Outcome]:
        """The pretrained model as it is, a new head on it, and logistic regression that sees the pixels only."""
        start = time.monotonic()
        found = [self._outcome(ZERO_SHOT, "baseline", _predict(self.base, self.test), start)]
        states = [_states(self.base, images.pixels) for images in (self.adapt, self.test)]
        pixels = [images.pixels.flatten(1) for images in (self.adapt, self.test)]
        for name, (train, test) in ((PROBE, states), (PIXELS, pixels)):
            start = time.monotonic()
            regression = LogisticRegression(max_iter=2000).fit(train.numpy(), self.adapt.digits.numpy())
            predicted = torch.from_numpy(regression.predict(test.numpy()))
            size = regression.coef_.size + regression.intercept_.size
            found.append(self._outcome(name, "baseline", predicted, start, parameters=size))
        return found

    def plan(self, share_s: float) -> None:
        """Cut the training steps to what the budget leaves each row, by the speed just measured."""
        self.steps = max(1, min(self.planned, int(share_s / (1.5 * self.step_s))))

    def train(self, trial: Trial, stages: Stages) -> _Outcome:
        """Fine-tune a copy of the pretrained model, save and check the adapter."""
        start = time.monotonic()
        torch.manual_seed(self.seed)
        model: nn.Module = copy.deepcopy(self.base)
        if trial.adapter is not None:
            # No task type: that of PEFT's classifiers is for texts, and the head keeps to the ten digits it knows.
            model = get_peft_model(copy.deepcopy(self.base), trial.adapter)
        _fit(model, self.adapt, self.steps, trial.learning_rate, self.seed, stages)
        predicted = _predict(model, self.test)
        kind = "full" if trial.adapter is None else "adapter"
        found = self._outcome(trial.name, kind, predicted, start, parameters=_trained(model), steps=self.steps)
        return self._save(model, found) if isinstance(model, PeftModel) else found

    def scratch(self, stages: Stages) -> _Outcome:
        """A fresh model, trained on the turned digits only."""
        start = time.monotonic()
        model = make_vit(self.seed)
        _fit(model, self.adapt, self.steps, FULL_LEARNING_RATE, self.seed, stages)
        predicted = _predict(model, self.test)
        return self._outcome(SCRATCH, "full", predicted, start, parameters=_trained(model), steps=self.steps)

    def _save(self, model: PeftModel, found: _Outcome) -> _Outcome:
        folder = adapter_folder(self.output, found.row.name, self.adapters)
        card = CardInfo(
            task="image classification",
            data=f"{self.settings.num_adapt} of scikit-learn's digits, turned by 90 degrees",
            metrics=found.row.scores,
            seed=self.seed,
        )
        size, checks = save_and_check(
            model,
            folder,
            base=copy.deepcopy(self.base),
            outputs=lambda some: _logits(some, self.test.pixels[:64]),
            run_config={"demo": asdict(self.settings), "seed_everything": self.seed},
            card=card,
        )
        return replace(found, row=replace(found.row, saved_bytes=size), checks=tuple(checks), folder=folder)

    def _outcome(
        self,
        name: str,
        kind: Literal["baseline", "adapter", "full"],
        predicted: Tensor,
        start: float,
        *,
        parameters: int = 0,
        steps: int = 0,
    ) -> _Outcome:
        correct = (predicted == self.test.digits).double().numpy()
        row = Row(
            name,
            kind,
            {"accuracy": float(correct.mean())},
            self._interval(correct),
            trainable_parameters=parameters,
            saved_bytes=4 * parameters,
            steps=steps,
            seconds=time.monotonic() - start,
        )
        return _Outcome(row, correct)

    def _interval(self, values: Floats) -> Interval:
        return bootstrap_mean(values, [f"{image:04d}" for image in range(len(values))], seed=self.seed)

    def result(self, outcomes: list[_Outcome], left_out: list[str], seconds: float) -> DemoResult:
        """Everything side by side; the pretrained model as it is is the reference."""
        reference, *others = outcomes
        baselines = [found for found in outcomes if found.row.kind == "baseline"]
        trained = [found for found in outcomes if found.row.kind != "baseline"]
        best = max(baselines, key=lambda found: found.row.interval.mean)
        rows = [reference.row]
        rows += [replace(found.row, gain=self._interval(found.correct - reference.correct)) for found in others]
        return DemoResult(
            task="vision",
            title=(
                f"Which digit, turned by 90 degrees? A tiny ViT pretrained on {self.settings.num_pretrain} upright "
                f"digits, adapted with {self.settings.num_adapt} turned ones, {len(self.test.digits)} held out"
            ),
            settings={"seed": self.seed, **asdict(self.settings)},
            reference=ZERO_SHOT,
            rows=rows,
            comparisons=[
                Comparison(found.row.name, best.row.name, self._interval(found.correct - best.correct))
                for found in trained
            ],
            checks=[check for found in trained for check in found.checks],
            adapters={found.row.name: str(found.folder) for found in trained if found.folder},
            notes=[*self._notes(outcomes), *left_out],
            environment=environment(),
            seconds=seconds,
        )

    def _notes(self, outcomes: list[_Outcome]) -> list[str]:
        accuracy = {found.row.name: found.row.scores["accuracy"] for found in outcomes}
        networks = {name: value for name, value in accuracy.items() if name != PIXELS}
        better = [name for name, value in networks.items() if value >= accuracy[PIXELS]]
        verdict = f"is matched or beaten by {', '.join(better)}" if better else "beats every network in the table"
        notes = [f"A smoke test: {PIXELS} ({accuracy[PIXELS]:.3f}) {verdict}."]
        if self.steps < self.planned:
            notes.append(f"The time budget cut the training from {self.planned} to {self.steps} steps.")
        return notes


def _digits(num_train: int, seed: int) -> tuple[_Images, _Images]:
    """scikit-learn's 1797 digits, split by class in equal shares."""
    digits: Any = load_digits()
    pixels = (digits.images / 16.0).astype(np.float32)[:, None]
    split = train_test_split(pixels, digits.target, train_size=num_train, stratify=digits.target, random_state=seed)
    train, test, train_digits, test_digits = (torch.from_numpy(np.ascontiguousarray(part)) for part in split)
    return _Images(train, train_digits), _Images(test, test_digits)


def _batches(images: int) -> int:
    return -(-images // BATCH_SIZE)


def _fit(
    model: nn.Module, images: _Images, steps: int, learning_rate: float, seed: int, stages: Stages | None = None
) -> None:
    """AdamW with a rate that rises and falls once, for exactly `steps` steps."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps + 1)
    order = torch.Generator().manual_seed(seed)
    model.train()
    done = 0
    while done < steps:
        for batch in torch.randperm(len(images.digits), generator=order).split(BATCH_SIZE)[: steps - done]:
            logits = model(pixel_values=images.pixels[batch]).logits
            nn.functional.cross_entropy(logits, images.digits[batch]).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            done += 1
            if stages is not None:
                stages.within(5.0 * done / steps)
    model.eval()


@torch.no_grad()
def _logits(model: nn.Module, pixels: Tensor) -> Tensor:
    return model.eval()(pixel_values=pixels).logits


@torch.no_grad()
def _states(model: ViTForImageClassification, pixels: Tensor) -> Tensor:
    """The class token's final state, [images, hidden_size]."""
    return model.eval().vit(pixel_values=pixels).last_hidden_state[:, 0]


def _predict(model: nn.Module, images: _Images) -> Tensor:
    return _logits(model, images.pixels).argmax(dim=-1)


def _trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
