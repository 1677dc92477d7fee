"""What the callbacks that train a few blocks a step share: when blocks are frozen, and what is kept for resuming."""

from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn

from petune.layer_options import LayerOptions
from petune.layer_scheduler import LayerScheduler
from petune.layer_turns import LayerTurns
from petune.state import find_model


class LayerSchedule(LayerOptions, Callback):
    """Train a few blocks in each optimizer step, and let the others rest: `petune.layer_scheduler`.

    Blocks are frozen from the start of a batch to its end, and as they were at all other times, so that checkpoints,
    exports and validation see the model whole. The selection changes with the optimizer's step, never within an
    accumulation; it, the random generator and what was learned are in each checkpoint, so that a resumed run goes on
    as one in one go. Process 0 chooses for all. Each step's blocks are in `history` while training runs.

    Args:
        min_layer: index of the lowest block that may train, which sets the memory that activations take.
        seed: of the choice.
        reset_optimizer: have the optimizer forget a block when its turn ends, which frees the memory of its state;
            a block then begins anew with its next turn.

    Raises:
        ValueError: an argument is out of its range.
        MisconfigurationException: when training starts, if the strategy cannot have parameters rest in turns, there
            are several optimizers, or the model cannot be scheduled.
    """

    def __init__(self, min_layer: int, seed: int, reset_optimizer: bool) -> None:
        super().__init__(min_layer, seed, reset_optimizer)
        self.history: list[tuple[int, ...]] = []
        """Blocks that trained, of each optimizer step of this run."""
        self._turns: LayerTurns | None = None  # while training runs
        self._loaded: dict[str, Any] = {}
        self._last: dict[str, Any] = {}  # when training ended: a checkpoint may be written after that

    @property
    def scheduler(self) -> LayerScheduler | None:
        """While training runs."""
        return None if self._turns is None else self._turns.scheduler

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            _check_strategy(type(self).__name__, trainer.strategy)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        model = find_model(pl_module)
        if len(trainer.optimizers) > 1:
            raise MisconfigurationException(
                f"{type(self).__name__} counts optimizer steps, and {type(pl_module).__name__} has several optimizers "
                "that step one by one; use one with parameter groups."
            )
        if getattr(model, "_compiled_call_impl", None) is not None:
            rank_zero_warn(
                f"{type(self).__name__}: each new choice of blocks compiles the model anew; do not compile."
            )
        try:
            self._turns = LayerTurns(model, self, self._loaded)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        self.history, self._loaded = self._turns.history, {}

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        turns, step = self._turns, trainer.global_step
        if turns is None:
            return
        if step != turns.step:
            self.before_choice(trainer, pl_module, batch, batch_idx)
        turns.begin(step, trainer.optimizers, trainer.strategy.broadcast)
        turns.scheduler.freeze()

    def before_choice(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """A step begins with `batch`; the blocks of the last one are still chosen, and none is frozen."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._turns is None:
            return
        self._turns.scheduler.thaw()
        if trainer.global_step != self._turns.step:
            self._turns.end()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._turns is not None:  # an epoch that another callback ended before the batch
            self._turns.scheduler.thaw()

    def _stop(self, *_: Any, **__: Any) -> None:
        if self._turns is not None:
            self._last = self._turns.state_dict()
            self._turns.scheduler.thaw()
            self._turns = None

    on_train_end = on_exception = teardown = _stop

    def state_dict(self) -> dict[str, Any]:
        return self._last if self._turns is None else self._turns.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict


def _check_strategy(name: str, strategy: object) -> None:
    if isinstance(strategy, SingleDeviceStrategy):
        return
    if not isinstance(strategy, DDPStrategy) or isinstance(strategy, DeepSpeedStrategy):  # which is one by its class
        raise MisconfigurationException(
            f"{name} has parameters rest in turns, which {type(strategy).__name__} cannot, because it groups or "
            "shards them once; train with strategy='ddp_find_unused_parameters_true', or on one device."
        )
    if not strategy._ddp_kwargs.get("find_unused_parameters") or strategy._ddp_kwargs.get("static_graph"):
        raise MisconfigurationException(
            f"{name} has parameters rest in turns, and DDP waits for the gradient of each; train with "
            "strategy='ddp_find_unused_parameters_true', and without static_graph."
        )
