"""The curriculum of SMoE-Dropout: few experts at first, all of them in the end."""

import math
from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback

from petune.adapters.emoe.layer import EmoeLayer
from petune.adapters.emoe.router import Router
from petune.state import find_model


class TopKSchedule(Callback):
    """Let the experts that a token keeps grow linearly with training (Chen et al. 2023, arXiv 2303.01610).

        top_k(t) = min(end, start + ⌊(end − start + 1) · t / T⌋)

    t is the number of optimizer steps taken and T that of the growth, so that each value from start to end has an
    equal share of T. It is set before every batch on the routers of the adapters that are active when training
    starts, and in their configs, from t alone: a resumed run goes on as one in one go.

    Args:
        start: experts a token at first, 1 to end.
        end: experts a token in the end, start to num_experts; None for num_experts, the dense model.
        ratio: T as a share of the run's optimizer steps, above 0 and at most 1; rounded up.
        steps: T in optimizer steps; None to go by `ratio`.

    Raises:
        ValueError: an argument is out of its range.
        MisconfigurationException: when training starts, if no active adapter has routers, one has fewer experts than
            asked for, or the length of the run is not known.
    """

    def __init__(self, start: int, end: int | None = None, ratio: float = 1.0, steps: int | None = None) -> None:
        if start < 1:
            raise ValueError(f"TopKSchedule.start={start} leaves a token no expert; use 1 or more.")
        if end is not None and end < start:
            raise ValueError(f"TopKSchedule.end={end} is below start={start}; the number of experts can only grow.")
        if not 0.0 < ratio <= 1.0:
            raise ValueError(f"TopKSchedule.ratio={ratio} is no share of the run; use above 0 and at most 1.")
        if steps is not None and steps < 1:
            raise ValueError(f"TopKSchedule.steps={steps} is no length; use 1 or more, or None to go by ratio.")
        self.start, self.end, self.ratio, self.steps = start, end, ratio, steps
        self._growth_steps = 1
        self._routers: list[tuple[Router, Any]] = []  # each with its adapter's config

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Not earlier: the length of a run makes its loaders, and a resumed run gives theirs their state before this.
        self._routers = _active_routers(pl_module)
        for router, _ in self._routers:
            if max(self.start, self.end or 1) > router.num_experts:
                name, value = ("start", self.start) if self.start > router.num_experts else ("end", self.end)
                raise MisconfigurationException(
                    f"TopKSchedule.{name}={value} is more than the num_experts={router.num_experts} of the model's "
                    f"routers; use 1 to {router.num_experts}."
                )
        self._growth_steps = self.steps or math.ceil(self.ratio * _length(trainer))
        self._set(trainer.global_step)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._set(trainer.global_step)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._set(trainer.global_step)

    def top_k(self, step: int, num_experts: int) -> int:
        """Experts that a token keeps after `step` optimizer steps; known once training has started."""
        end = num_experts if self.end is None else self.end
        return min(end, self.start + (end - self.start + 1) * step // self._growth_steps)

    def _set(self, step: int) -> None:
        for router, config in self._routers:
            router.top_k = config.top_k = self.top_k(step, router.num_experts)


def _active_routers(pl_module: L.LightningModule) -> list[tuple[Router, Any]]:
    model: Any = find_model(pl_module)
    found = [
        (router, model.peft_config[name])
        for layer in model.modules()
        if isinstance(layer, EmoeLayer)
        for name in layer.active_adapters
        if isinstance(router := layer.petune_emoe_router._modules.get(name), Router)
    ]
    if not found:
        raise MisconfigurationException(
            f"TopKSchedule found no router of an active adapter in {type(model).__name__}; put an EmoeConfig adapter "
            "on the model and activate it, or leave the callback out."
        )
    return found


def _length(trainer: L.Trainer) -> int:
    total = trainer.estimated_stepping_batches
    if total in (-1, math.inf):
        raise MisconfigurationException(
            "TopKSchedule cannot tell how many optimizer steps the run will take; set max_steps or max_epochs of the "
            "Trainer (max_steps where a loader has no length), or TopKSchedule(steps=...)."
        )
    return int(total)
