"""`MaskSchedule`: the mask's way through one training, for the callbacks of Lightning and of transformers."""

import warnings

import torch
from torch import Tensor, nn

from petune.adapters.pat.model import PatModel


class MaskSchedule:
    """The active adapter's mask in a training whose optimiser steps a trainer counts.

    The mask goes on from the step that it is at: a resumed training, and a second one, begin where the last ended.

    Args:
        tuner: has an active adapter with a mask.
        step: the trainer's count at the start; above 0 where it resumes.
    """

    def __init__(self, tuner: PatModel, step: int) -> None:
        self.tuner, self.mask = tuner, tuner.mask()
        self.history: list[tuple[int, Tensor]] = []
        """(optimiser steps, M [width] on the CPU) at the start, at each step logged, and when the mask got hard."""
        self._seen, self._warned = step, False

    @property
    def needs_length(self) -> bool:
        """Whether the mask has to be told the length of the training."""
        return self.mask.total_steps is None

    def begin(self, steps: float | None = None) -> None:
        """Start the history.

        Args:
            steps: the trainer's count at the end of the training, for the mask and the adapter's config; None where
                they have their own.
        """
        if steps is not None:
            total = max(1, self.mask.now + int(steps) - self._seen)
            config = self.tuner.peft_config[self.tuner.active_adapters[0]]
            self.mask.total_steps = config.total_steps = total  # pyright: ignore[reportAttributeAccessIssue]
        self._record()

    def advance_to(self, step: int, *, log_every: int) -> bool:
        """Take the mask along to the trainer's step `step`; True where that one is to be logged.

        Raises:
            FloatingPointError: a term of the loss was not finite.
        """
        before, self._seen = self._seen, step
        if step == before:  # gradients are still gathered
            return False
        if not (self.tuner.terms or self._warned):
            self._warned = True
            warnings.warn(
                f"the training's loss leaves out the mask's own, so that nothing leads to {self.mask.kept} channels; "
                "add model.base_model.auxiliary_loss() to it, or train on the loss in the model's output.",
                stacklevel=4,
            )
        was_soft = not self.mask.is_final
        self.tuner.advance(self.mask.now + step - before)
        logs = log_every > 0 and step // log_every > before // log_every
        if was_soft and (logs or self.mask.is_final):
            self._record()
        return logs

    def complete(self, loss: Tensor) -> None:
        """Let the terms of the loss have the task's own, where it was not the model that computed it."""
        terms = self.tuner.terms
        if terms and "task" not in terms:
            terms["task"] = loss.detach() - torch.stack(list(terms.values())).sum()

    @torch.no_grad()
    def scalars(self) -> dict[str, float]:
        """Channels that M lets pass (M ≥ ½), the temperature of a soft mask, and the terms of the last loss."""
        mask, found = self.mask, {"pat/kept_channels": float((self.mask.value() >= 0.5).sum())}
        if not mask.is_final:
            found["pat/temperature"] = mask.current_temperature
        return {**found, **{f"pat/{term}_loss": float(value) for term, value in self.tuner.terms.items()}}

    def finish(self) -> None:
        """Make a mask hard that the training was too short for, and say so."""
        mask = self.mask
        if mask.is_final:
            return
        warnings.warn(
            f"the training ended at step {mask.now}, before the mask was to become hard at step {mask.milestone}: the "
            f"{mask.kept} channels in front are kept from now on, and nothing was trained with them alone; train "
            "longer, or lower PatConfig.milestone or total_steps.",
            stacklevel=3,
        )
        mask.finalize()
        self._record()

    @torch.no_grad()
    def _record(self) -> None:
        self.history.append((self.mask.now, self.mask.value().to("cpu", torch.float32, copy=True)))


def find_tuner(model: nn.Module) -> PatModel | None:
    """The part of `model` that has an active adapter with a mask; None where there is none."""
    tuners = (module for module in model.modules() if isinstance(module, PatModel))
    return next((tuner for tuner in tuners if tuner.live_adapter is not None), None)
