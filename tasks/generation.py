"""How a causal language model writes an answer: how long, how freely, and where it stops."""

from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from petune.tasks.chat_format import ChatFormat, end_ids


@dataclass(frozen=True)
class Generation:
    """Options of generation.

    Args:
        max_new_tokens: tokens of an answer at most, 1 or more.
        temperature: of the softmax that is drawn from; 0 for the likeliest token each time.
        top_p: draw from the likeliest tokens that have this much probability together, above 0 to 1.

    Raises:
        ValueError: one is out of its range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} leaves no answer; use 1 or more.")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} is negative; use 0 for the likeliest token, or more.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is no share of probability; use a number above 0, up to 1.")

    def config(self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
        """For `generate`: an answer ends at the model's end tokens, the tokenizer's, or where a turn is closed."""
        sampling: dict[str, Any] = {"temperature": self.temperature, "top_p": self.top_p} if self.temperature else {}
        ends = {*_listed(getattr(model.generation_config, "eos_token_id", None)), *end_ids(tokenizer)}
        if tokenizer.chat_template is not None:
            ends |= {*ChatFormat(tokenizer).stop_ids}
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=self.temperature > 0,
            num_beams=1,
            eos_token_id=sorted(ends) or None,
            pad_token_id=min(ends, default=0) if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            **sampling,
        )


def _listed(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else ids
