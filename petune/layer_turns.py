"""`LayerTurns`: one run of a layer schedule, whichever trainer it is part of."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from petune.layer_options import LayerOptions
from petune.layer_scheduler import LayerScheduler

Agree = Callable[[Sequence[int] | None], Sequence[int] | None]
"""From what this process chose to what process 0 did."""


class LayerTurns:
    """The blocks that train in each optimizer step of a run, and what a resumed run goes on with.

    A trainer calls `begin` before each batch, trains inside `scheduler.training()`, and calls `end` once the
    optimizer has stepped.

    Args:
        model: a PeftModel or a plain model.
        options: who chooses, and from what.
        state: `state_dict()` of the run to go on with; empty for a new one.

    Raises:
        ValueError: the model cannot be scheduled, or the state is of a run that scheduled other blocks.
    """

    def __init__(self, model: nn.Module, options: LayerOptions, state: Mapping[str, Any]) -> None:
        name = type(options).__name__
        try:
            self.scheduler = LayerScheduler(model, min_layer=options.min_layer)
            options.check(self.scheduler)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        self.policy = options.make_policy()
        self.policy.start(self.scheduler)
        self.history: list[tuple[int, ...]] = []
        """Blocks that trained, of each optimizer step."""
        self.step = -1
        """Optimizer step that the selection was made in."""
        self._resets = options.reset_optimizer
        self._ready = False  # whether the policy has seen the parameters before this step
        if state:
            self._restore(name, state)

    def _restore(self, name: str, state: Mapping[str, Any]) -> None:
        if tuple(state["blocks"]) != self.scheduler.blocks:
            raise ValueError(
                f"{name} scheduled blocks {state['blocks']} when the checkpoint was written, and those that may train "
                f"now are {list(self.scheduler.blocks)}; take the min_layer and the adapter of that run."
            )
        self.policy.load_state_dict(state["policy"])
        if state["active"]:
            self.scheduler.select(state["active"])
        self.step = state["step"]

    def begin(self, step: int, optimizers: Iterable[Optimizer], agree: Agree) -> None:
        """A batch of optimizer step `step` comes: choose, if it is the first of the step.

        Args:
            step: optimizer steps done.
            optimizers: what may have to forget a block.
            agree: what makes the choice the same in all processes.
        """
        if step != self.step:
            self.step, self._ready = step, False
            chosen = agree(self.policy.choose(step))
            if chosen is not None:
                left = self.scheduler.select(chosen)
                if self._resets:
                    self.scheduler.forget(left, optimizers)
            self.history.append(tuple(sorted(self.scheduler.active)))
        if not self._ready:
            self.policy.before_step()
            self._ready = True

    def end(self) -> None:
        """The optimizer has stepped."""
        self.policy.after_step()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with."""
        return {
            "blocks": list(self.scheduler.blocks),
            "active": sorted(self.scheduler.active),
            "step": self.step,
            "policy": self.policy.state_dict(),
        }
