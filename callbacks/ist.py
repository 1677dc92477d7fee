"""IST: blocks drawn by an importance that is learned while they train."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from petune.callbacks.layer_schedule import LayerSchedule
from petune.layer_options import ISTOptions


class ISTCallback(ISTOptions, LayerSchedule):
    """Train a quarter of the blocks' adapters, drawn by their importance (Yao et al. 2024, arXiv 2410.11772)

    Importance-aware sparse tuning draws in each step the blocks that train, by p = σ(I). Every `interval_steps` steps
    it scales the response of the adapters in some blocks, S, by `suppression`, and sees what that does to the loss; it
    does so `draws` times and moves I by the reward exp(−loss) (`petune.layer_scheduler.ImportantLayers`). Defaults and
    rules are those of the authors' code. There, the loss is that of another batch of the training data, of 16 rows;
    here it is that of the batch which the step is about to train on, in eval mode and without logging, so that no
    loader has to be resumed; the mean over the processes, where there are several.

    `training_step` is called for it, `draws` more times every `interval_steps` steps, without gradients: it must
    return the loss, or a mapping with `loss`, and change nothing that cannot be changed more often.

    Args:
        ratio: share of the blocks that train in a step, above 0 and at most 1; rounded down.
        suppressed_ratio: share of the blocks that are suppressed together, above 0 and at most 1; rounded down.
        suppression: what is left of the response, 0 to 1.
        draws: sets of suppressed blocks in an update, 2 or more.
        importance_rate: of learning I, above 0.
        interval_steps: optimizer steps between two updates, 1 or more; there is none before the first step.
        min_layer: see `LayerSchedule`.
        seed: see `LayerSchedule`.
        reset_optimizer: see `LayerSchedule`.

    Raises:
        ValueError: an argument is out of its range.
        MisconfigurationException: as `LayerSchedule` does; the adapters share state between blocks, or there are none.
    """

    def before_choice(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if not self.is_due(trainer.global_step):
            return

        def loss() -> float:
            found = _loss(pl_module.training_step(batch, batch_idx))
            mean: Any = trainer.strategy.reduce(found, reduce_op="mean")
            return float(mean)

        with _aside(pl_module), torch.no_grad(), trainer.precision_plugin.forward_context():
            self.update(loss)


def _loss(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, dict) else output
    if not isinstance(loss, Tensor):
        raise MisconfigurationException(
            f"ISTCallback rates blocks by the loss, and training_step gave {type(output).__name__}; return the loss, "
            "or a dictionary with it."
        )
    return loss.detach().float()


@contextmanager
def _aside(pl_module: L.LightningModule) -> Generator[None]:
    """Eval mode, and nothing is logged; afterwards as before."""
    modes = [(module, module.training) for module in pl_module.modules()]
    pl_module.eval()
    for name in ("log", "log_dict"):
        pl_module.__dict__[name] = lambda *_, **__: None  # pyright: ignore[reportUnknownLambdaType]
    try:
        yield
    finally:
        for name in ("log", "log_dict"):
            del pl_module.__dict__[name]
        for module, mode in modes:
            module.training = mode
