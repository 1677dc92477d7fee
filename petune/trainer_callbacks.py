"""IST, LISA and FreezeByMotion under `transformers.Trainer` and TRL's trainers."""

import base64
import inspect
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import DistributedType, broadcast_object_list
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from petune.layer_options import ISTOptions, LayerOptions, LISAOptions, MotionOptions
from petune.layer_turns import LayerTurns
from petune.state import find_model

_SINGLE_OR_DDP = {DistributedType.NO} | {kind for kind in DistributedType if kind.value.startswith("MULTI_")}


class LayerScheduleTrainerCallback(LayerOptions, TrainerCallback, ExportableState):
    """What the three callbacks share: a few blocks train in each optimizer step, and the others rest.

    `transformers.Trainer` gives a callback neither the batch nor word of a step that fails, so these need a
    `ScheduledTrainer`, which freezes blocks for the forward and backward pass of a batch and gives them back whatever
    happens in there. The selection changes with the optimizer's step, never within an accumulation; it, the random
    generator and what was learned are in each checkpoint's trainer_state.json, and a resumed run goes on with them.
    The blocks chosen are those of the Lightning callback of the same name for the same seed, data and model.

    Raises:
        ValueError: an argument is out of its range; or when training starts, if the model cannot be scheduled, or
            parameters cannot rest in turns in the way it is trained by several processes.
    """

    def __init__(self, min_layer: int, seed: int, reset_optimizer: bool) -> None:
        super().__init__(min_layer, seed, reset_optimizer)
        self.history: list[tuple[int, ...]] = []
        """Blocks that trained, of each optimizer step of this run."""
        self._turns: LayerTurns | None = None  # while training runs

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into trainer_state.json."""
        names = inspect.signature(type(self).__init__).parameters
        turns = {} if self._turns is None else _to_json(self._turns.state_dict())
        return {
            "args": {name: getattr(self, name) for name in names if name != "self"},
            "attributes": {"saved": turns},
        }

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        assert model is not None
        name = type(self).__name__
        if args.torch_compile:
            warnings.warn(f"{name}: each new choice of blocks compiles the model anew; do not compile.", stacklevel=2)
        # Not by the attribute that the Trainer may set: it does so only if told to restore callbacks (it is not by
        # default), and here what is trained would not fit what was chosen.
        callbacks: Any = state.stateful_callbacks or {}  # by class name, whatever the annotation says
        stored = callbacks.get(name, {}) if state.global_step else {}
        self._turns = LayerTurns(find_model(model), self, _from_json(stored.get("attributes", {}).get("saved", {})))
        self.history = self._turns.history

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._turns is not None and self._turns.step != state.global_step:
            name = type(self).__name__
            raise ValueError(
                f"{name} lets blocks rest inside the training step, which a callback cannot reach; train with "
                "petune.trainer_callbacks.ScheduledTrainer in place of transformers.Trainer, or for another trainer "
                "with `class Scheduled(ScheduledTrainer, SFTTrainer): pass`."
            )

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._turns is not None:
            self._turns.end()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._turns = None

    @contextmanager
    def batch(self, trainer: "ScheduledTrainer", model: nn.Module, inputs: Mapping[str, Any]) -> Generator[None]:
        """Inside, the blocks that rest are frozen. `model` is the trainer's, wrapped as it trains."""
        turns, step = self._turns, trainer.state.global_step
        assert turns is not None  # training has begun
        if step != turns.step:
            _check_processes(type(self).__name__, trainer, model)
            self.before_choice(trainer, model, inputs)
        optimizer: Any = trainer.optimizer
        turns.begin(step, [optimizer], _as_process_0)
        with turns.scheduler.training():
            yield

    def before_choice(self, trainer: "ScheduledTrainer", model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """A step begins with `inputs`; the blocks of the last one are still chosen, and none is frozen."""


class LISATrainerCallback(LISAOptions, LayerScheduleTrainerCallback):
    """`petune.callbacks.LISACallback`, with its arguments, for a `ScheduledTrainer`."""


class FreezeByMotionTrainerCallback(MotionOptions, LayerScheduleTrainerCallback):
    """`petune.callbacks.FreezeByMotion`, with its arguments, for a `ScheduledTrainer`."""


class ISTTrainerCallback(ISTOptions, LayerScheduleTrainerCallback):
    """`petune.callbacks.ISTCallback`, with its arguments, for a `ScheduledTrainer`.

    The loss that blocks are rated by is the trainer's `compute_loss` on the first batch of the step, in eval mode,
    without gradients and without being logged.
    """

    def before_choice(self, trainer: "ScheduledTrainer", model: nn.Module, inputs: Mapping[str, Any]) -> None:
        if self.is_due(trainer.state.global_step):
            self.update(lambda: trainer.loss_aside(model, inputs))


class ScheduledTrainer(Trainer):
    """A `transformers.Trainer` whose batches train the blocks that a `LayerScheduleTrainerCallback` chooses

        ScheduledTrainer(model, args, train_dataset=rows, callbacks=[LISATrainerCallback(layers=1)]).train()

    For another trainer, put it first among the base classes: `class Scheduled(ScheduledTrainer, SFTTrainer): pass`.
    Without such a callback it is the trainer it stands before.

    Raises:
        ValueError: there are several such callbacks.
    """

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor | Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        callbacks: list[Any] = self.callback_handler.callbacks
        schedules = [one for one in callbacks if isinstance(one, LayerScheduleTrainerCallback)]
        if not schedules:
            return super().training_step(model, inputs, num_items_in_batch)
        if len(schedules) > 1:
            names = " and ".join(type(one).__name__ for one in schedules)
            raise ValueError(f"{names} would choose blocks for the same steps; keep one of them.")
        with schedules[0].batch(self, model, inputs):
            return super().training_step(model, inputs, num_items_in_batch)

    def loss_aside(self, model: nn.Module, inputs: Mapping[str, Any]) -> float:
        """`compute_loss` of a batch, the mean over the processes, in eval mode, without gradients and without a trace.

        Args:
            model: wrapped as it trains.
            inputs: the batch.
        """
        prepared: Any = self._prepare_inputs(dict(inputs))
        with _aside(self, model), torch.no_grad(), self.compute_loss_context_manager():
            found: Any = self.compute_loss(model, dict(prepared))  # a copy: trainers put entries in and take some out
            mean: Any = self.accelerator.reduce(found.detach().float(), reduction="mean")
            return float(mean)


def _check_processes(name: str, trainer: Trainer, model: nn.Module) -> None:
    kind = trainer.accelerator.distributed_type
    wrapper = type(model).__name__
    if kind not in _SINGLE_OR_DDP or isinstance(model, nn.DataParallel):
        how = wrapper if kind in _SINGLE_OR_DDP else kind.value
        raise ValueError(
            f"{name} has parameters rest in turns, which {how} cannot, because it groups, shards or copies them; "
            "train on one device, or by DDP with TrainingArguments(ddp_find_unused_parameters=True)."
        )
    if isinstance(model, DistributedDataParallel) and (not model.find_unused_parameters or model.static_graph):
        raise ValueError(
            f"{name} has parameters rest in turns, and DDP waits for the gradient of each; train with "
            "TrainingArguments(ddp_find_unused_parameters=True), and without ddp_static_graph."
        )


def _as_process_0(chosen: Sequence[int] | None) -> Sequence[int] | None:
    return broadcast_object_list([chosen])[0]


@contextmanager
def _aside(trainer: Trainer, model: nn.Module) -> Generator[None]:
    """Eval mode, and nothing is logged; afterwards as before."""
    modes = [(module, module.training) for module in model.modules()]
    counted: Any = trainer.__dict__.get("_metrics", {})  # TRL's trainers note here what the next log is a mean of
    before = {mode: {name: list(values) for name, values in found.items()} for mode, found in counted.items()}
    model.eval()
    trainer.__dict__["log"] = lambda *_, **__: None  # pyright: ignore[reportUnknownLambdaType]
    try:
        yield
    finally:
        del trainer.__dict__["log"]
        for mode, found in before.items():
            counted[mode].clear()
            counted[mode].update(found)
        for module, mode in modes:
            module.training = mode


def _to_json(state: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors of bytes as text, and others as lists, which keep every bit of a float."""
    policy: dict[str, Tensor] = state["policy"]
    plain = {
        name: base64.b64encode(value.numpy().tobytes()).decode() if value.dtype == torch.uint8 else value.tolist()
        for name, value in policy.items()
    }
    return {**state, "policy": plain}


def _from_json(state: Mapping[str, Any]) -> dict[str, Any]:
    if not state:
        return {}
    policy = {
        name: torch.frombuffer(bytearray(base64.b64decode(value)), dtype=torch.uint8)
        if isinstance(value, str)
        else torch.tensor(value)
        for name, value in state["policy"].items()
    }
    return {**state, "policy": policy}
