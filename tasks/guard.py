"""Stop a run at a text longer than the model, and at a loss that is no number, before it reaches the weights."""

from functools import cached_property
from typing import Any, ClassVar

import lightning as L
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from petune.tasks.loaders import ResumableLoader
from petune.tasks.positions import check_asked, check_batch, max_tokens

_SHOWN = 32


class GuardedModule(L.LightningModule):
    """A LightningModule that refuses texts longer than its `model`, and whose training stops at a loss not finite."""

    model: PreTrainedModel | PeftModel

    length_arguments: ClassVar[tuple[str, ...]] = ("max_length",)
    """Arguments of the data module that say how many tokens a text may have."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Refuse texts longer than the model, at the first batch and whatever its own length.

        Raises:
            ValueError: names the number of tokens the model has positions for.
        """
        if getattr(self.model, "main_input_name", None) == "input_ids":
            check_asked(self.asked_lengths, self.model, self.longest_text)
            check_batch(batch, self.model, self.longest_text)
        return batch

    @property
    def asked_lengths(self) -> dict[str, int | None]:
        """`length_arguments` of the data module; None for one that it has not."""
        data = getattr(self._trainer, "datamodule", None)
        return {name: getattr(data, name, None) for name in self.length_arguments}

    @cached_property
    def longest_text(self) -> int | None:
        """Tokens that the model has positions for; None where there is no limit."""
        return max_tokens(self.model)

    def on_before_backward(self, loss: Tensor) -> None:
        """Look at the loss of a batch.

        Raises:
            FloatingPointError: it is NaN or infinite; names step, batch and rows.
        """
        if torch.isfinite(loss).all():
            return
        trainer = self.trainer
        raise FloatingPointError(
            f"the training loss is {loss.item()} at step {trainer.global_step}, {self._rows()}, and no weight was "
            "changed by it; look at these rows, and if they are good, use a smaller learning_rate, or "
            "trainer.precision: bf16-mixed where it is 16-mixed."
        )

    def _rows(self) -> str:
        """'rows 3, 17 of the training data, counted from 0', by the loader; the batch's number without one of ours."""
        loader = self.trainer.train_dataloader
        rows = loader.last_rows() if isinstance(loader, ResumableLoader) else []
        if not rows:
            return f"batch {self.trainer.fit_loop.batch_idx} of epoch {self.trainer.current_epoch}"
        more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
        return f"rows {', '.join(map(str, rows[:_SHOWN]))}{more} of the training data, counted from 0"
