"""`fit_many`: Lightning runs, each with its own trainer, whose training steps meet in one frozen base."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ProgressBar
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer import call
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from petune.callbacks import ExportAdapter
from petune.many.backbone import JointBackbone, adapted_layers, share
from petune.many.crew import Member, SignalHandlers
from petune.many.engine import Backward, Engine, Trainee
from petune.state import backbone, find_model
from petune.tuner import PetuneTuner

Work = Callable[[list[Callback]], L.Trainer]
"""Trains one run: makes a trainer with these callbacks among its own, fits it, and gives it back."""

_BASES = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d)  # whose output rows are those of their input


@dataclass
class ManyRun:
    """One run of `fit_many`, as it would be trained alone."""

    task: L.LightningModule
    """Its model must be a PeftModel, made in `configure_model` or before."""
    data: Any
    """Data module or loader, as `Trainer.fit` takes it."""
    trainer: L.Trainer
    """With the run's own folder, callbacks, loggers and length; a progress bar is left out among others."""
    seed: int | None = 0
    """For `lightning.seed_everything`; None to go on from the state that the generators have."""
    ckpt_path: str | None = None
    """Checkpoint to go on from."""

    def __call__(self, callbacks: list[Callback]) -> L.Trainer:
        if self.seed is not None:
            L.seed_everything(self.seed, verbose=False)
        trainer: Any = self.trainer
        own = trainer.callbacks
        if callbacks:  # several bars on one terminal write over each other, and Rich allows only one
            own = [callback for callback in own if not isinstance(callback, ProgressBar)]
        trainer.callbacks = [*callbacks, *own]
        data: Any = self.data
        kwargs = {"datamodule": data} if isinstance(data, L.LightningDataModule) else {"train_dataloaders": data}
        trainer.fit(self.task, **kwargs, ckpt_path=self.ckpt_path)
        return trainer


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    name: str
    error: BaseException | None
    """What stopped it; None if it came to its end."""
    steps: int
    """Optimizer steps, those before a resumed checkpoint included; 0 if it failed."""
    seconds: float
    """From its start to its end; others trained in the same time."""
    metrics: dict[str, float] = field(default_factory=lambda: dict[str, float]())
    """What it logged last."""


def fit_many(
    runs: Mapping[str, ManyRun | Work],
    *,
    tokens_per_step: int | None = None,
    together: int | None = None,
    on_end: Callable[[RunResult], object] | None = None,
) -> dict[str, RunResult]:
    """Train many runs on one frozen base, a joint forward and backward pass for all of them in each step.

    Each run is a Lightning run of its own, with its task, head, data, adapter, rate, schedule, length, seed,
    callbacks, folder, log, checkpoints and resume; it trains in a coroutine that takes turns with the others. What
    they share is the base: its weights lie in memory once, and the rows of all runs pass through it together, each row
    with its run's adapter. A run that ends leaves the batch, and the next one enters. A run that fails is reported,
    and the others go on. Validation runs on each run's own model, alone.

    A run's weights are those of training it alone, up to rounding: its rows drop what they drop alone, whatever the
    other runs are. With activation checkpointing the base runs without its own dropout.

    Args:
        runs: name to run. Low-rank adapters (`FusedLoraConfig`, `BiLoraConfig`) share the grouped kernels; other
            adapters of linear layers and embeddings, and `modules_to_save`, are applied one run after the other.
        tokens_per_step: of all runs in a step; None for no limit. Those that have taken part least come first.
        together: runs in memory at a time; None for all.
        on_end: called with each result when a run ends.

    Returns:
        The results by name, in the order of `runs`.

    Raises:
        ValueError: no runs, a limit that is not positive, or two runs that write into one folder.
        torch.OutOfMemoryError: the joint step does not fit; all runs are stopped, and go on from their checkpoints.
    """
    _check(runs, tokens_per_step, together)
    engine = Engine(tokens_per_step)
    waiting = list(runs)
    results: dict[str, RunResult] = {}
    started: dict[str, float] = {}

    def end(trainee: Trainee) -> None:
        result = results[trainee.name] = _result(trainee.member, started[trainee.name])
        if on_end is not None:
            on_end(result)

    base: dict[str, Tensor] = {}
    handlers = SignalHandlers.now()
    try:
        while waiting or engine.members:
            while waiting and len(engine.members) < (together or len(runs)):
                name = waiting.pop(0)
                started[name] = time.perf_counter()
                trainee = engine.start(Member(name, _work(engine, base, runs[name])))
                if trainee.member.finished:
                    end(trainee)
            if engine.members:
                for trainee in engine.round():
                    end(trainee)
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"{len(engine.members)} runs do not fit into one step ({str(error).splitlines()[0]}); give fit_many a "
            "smaller tokens_per_step, or fewer runs at a time (together). Each goes on from its last checkpoint."
        ) from error
    finally:
        engine.stop()
        handlers.put()
    return {name: results[name] for name in runs}


def _work(engine: Engine, base: dict[str, Tensor], run: ManyRun | Work) -> Callable[[Member], L.Trainer]:
    return lambda member: run([_JoinedSteps(engine, member, base)])


class _JoinedSteps(Callback):
    """Sends a run's training passes through the joint base."""

    def __init__(self, engine: Engine, member: Member, base: dict[str, Tensor]) -> None:
        self._engine, self._member, self._base = engine, member, base
        self._body: nn.Module | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        # now, before the model is moved: a base of its own is on the device for no moment
        call._call_configure_model(trainer)
        model = find_model(pl_module)
        try:
            _check_model(model)
            body = backbone(model)
            share(model, body, self._base)
        except ValueError as error:
            raise MisconfigurationException(f"{self._member.name}: {error}") from error
        if self._engine.joint is None:
            self._engine.joint = JointBackbone(body)
        self._engine.joint.add(self._member, body)
        self._join(body)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self._engine.joint is not None
        self._engine.joint.model.to(pl_module.device)  # buffers; the parameters are the runs' own

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._member.pause(Backward())

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._body is not None:
            del self._body.__dict__["forward"]
            self._body = None

    def _join(self, body: nn.Module) -> None:
        alone = body.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if body.training and torch.is_grad_enabled():
                return self._engine.ask(self._member, body, alone, args, kwargs)
            return alone(*args, **kwargs)

        self._body = body
        body.__dict__["forward"] = forward


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"{type(model).__name__} has no adapter, and only adapters train together; set train: adapter."
        )
    kind = type(next(iter(model.peft_config.values()))).__name__
    tuner = model.base_model
    ours = isinstance(tuner, PetuneTuner) and not hasattr(tuner.tuner_layer_cls, "operands")
    if ours or not isinstance(tuner, BaseTuner) or tuner.uses_shared_state:
        raise ValueError(
            f"{kind} is more than adapters of single layers, so its runs cannot share a batch; train it by petune fit."
        )
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError("a compiled model cannot hand its rows to a joint batch; set compile: false.")
    for name, layer in adapted_layers(backbone(model)):
        base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else None
        if base is not None and not isinstance(base, _BASES):
            raise ValueError(
                f"{kind} adapts {name}, a {type(base).__name__}, whose rows cannot be told apart; runs that train "
                "together adapt linear layers and embeddings; train it by petune fit."
            )


def _check(runs: Mapping[str, ManyRun | Work], tokens_per_step: int | None, together: int | None) -> None:
    if not runs:
        raise ValueError("fit_many was given no runs; pass at least one.")
    for name, value in (("tokens_per_step", tokens_per_step), ("together", together)):
        if value is not None and value < 1:
            raise ValueError(f"fit_many: {name}={value} lets nothing train; use 1 or more, or None for no limit.")
    owners: dict[Path, str] = {}
    for name, run in runs.items():
        if isinstance(run, ManyRun):
            check_strategy(name, run.trainer)
            for folder in set(_folders(run.trainer)):
                other = owners.setdefault(folder, name)
                if other != name:
                    raise ValueError(
                        f"the runs {other!r} and {name!r} both write into {folder}; give each a folder of its own."
                    )


def check_strategy(name: str, trainer: L.Trainer) -> None:
    """Refuse a trainer that is to run on several devices, before it starts processes.

    Raises:
        ValueError: names the run and its strategy.
    """
    if not isinstance(trainer.strategy, SingleDeviceStrategy):
        raise ValueError(
            f"{name}: runs that train together share one device, and {type(trainer.strategy).__name__} is for "
            "several; leave strategy out and set devices=1."
        )


def _folders(trainer: L.Trainer) -> Iterator[Path]:
    """Where a run will write."""
    if trainer.log_dir is not None and trainer.loggers:
        yield Path(trainer.log_dir).resolve()
    callbacks: Any = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    for callback in callbacks:
        if isinstance(callback, ExportAdapter):
            yield Path(callback.directory or trainer.log_dir or trainer.default_root_dir).resolve()
        if isinstance(callback, ModelCheckpoint):
            yield Path(callback.dirpath or trainer.default_root_dir).resolve()


def _result(member: Member, started: float) -> RunResult:
    seconds = time.perf_counter() - started
    if member.error is not None:
        return RunResult(member.name, member.error, 0, seconds)
    trainer: Any = member.result
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return RunResult(member.name, None, trainer.global_step, seconds, metrics)
