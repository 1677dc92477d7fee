"""What tasks with a head over every token share: the head trains whole."""

from collections.abc import Mapping
from typing import Any

from peft import PeftConfig
from torch import Tensor
from transformers import PreTrainedModel

from petune.tasks.base import AdapterTask


class TokenTask(AdapterTask):
    """An `AdapterTask` whose model gives logits for every token of a text.

    Args:
        kwargs: of `AdapterTask`.
    """

    def token_logits(self, inputs: Mapping[str, Any]) -> Tensor:
        """The model's `logits` without those of a prompt that the adapter puts before the text, [batch, tokens, n]."""
        logits: Tensor = self.model(**inputs).logits
        return logits[:, -inputs["input_ids"].shape[1] :].float()

    def prepare_adapter(self, config: PeftConfig, model: PreTrainedModel) -> None:
        """Leave the head out of "all linear layers".

        For these tasks PEFT adds it to modules_to_save only after it has wrapped it, and then refuses it.
        """
        adapter: Any = config
        targets, excluded = getattr(adapter, "target_modules", None), getattr(adapter, "exclude_modules", None)
        everything = isinstance(targets, str) and targets.lower() == "all-linear"
        if everything and hasattr(adapter, "exclude_modules") and not isinstance(excluded, str):
            adapter.exclude_modules = {*(excluded or ()), *self.head}
