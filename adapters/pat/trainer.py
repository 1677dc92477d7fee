"""`PruningTrainerCallback`: the schedule of the mask under `transformers.Trainer`."""

from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from petune.adapters.pat.schedule import MaskSchedule, find_tuner


class PruningTrainerCallback(TrainerCallback):
    """Advance the mask after each optimiser step of a `transformers.Trainer`: `Trainer(..., callbacks=[this])`.

    Sets the adapter's `total_steps`, where it has none, to the steps of the training; a mask that is soft in the end
    is made hard, with a warning. What the Trainer logs of a training step gets the channels kept, the temperature
    and the terms of the loss: in `trainer.state.log_history`, and for the callbacks that come after this one.

    Raises:
        ValueError: when training starts, if the model has no active adapter with a mask.
        FloatingPointError: a term of the loss is not finite.
    """

    def __init__(self) -> None:
        self.history: list[tuple[int, Tensor]] = []
        """(optimiser steps, M [width] on the CPU) at the start, at each step logged, and when the mask got hard."""
        self._schedule: MaskSchedule | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        tuner = None if model is None else find_tuner(model)
        if tuner is None:
            raise ValueError(
                f"PruningTrainerCallback found no mask of an active adapter in {type(model).__name__}; put a "
                "PatConfig adapter on the model and activate it, or leave the callback out."
            )
        self._schedule = MaskSchedule(tuner, state.global_step)
        self._schedule.begin(state.max_steps if self._schedule.needs_length else None)
        self.history = self._schedule.history

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert self._schedule is not None  # training has begun
        self._schedule.advance_to(state.global_step, log_every=state.logging_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if self._schedule is not None and logs is not None and "loss" in logs:  # evaluation and the summary have none
            scalars = self._schedule.scalars()
            logs.update(scalars)
            state.log_history[-1].update(scalars)  # the Trainer has put a copy there already

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._schedule is not None:
            self._schedule.finish()
