"""How many tokens a text model has positions for, and the refusal of texts that have more."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel


def max_tokens(model: nn.Module) -> int | None:
    """Tokens that a text model has positions for; None where there is no limit."""
    base = _base(model)
    positions: int | None = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return None
    for name, module in base.named_modules():  # RoBERTa and its kin count from the padding token's number on
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return positions - cast("int", module.padding_idx) - 1
    return positions


def check_asked(asked: Mapping[str, int | None], model: nn.Module, limit: int | None) -> None:
    """Refuse arguments of the data that let texts be longer than the model.

    Args:
        asked: argument -> tokens that it allows; None where the data has no such argument.
        model: for the message.
        limit: its `max_tokens`.

    Raises:
        ValueError: names argument, tokens and limit.
    """
    for name, tokens in asked.items():
        if limit is not None and tokens is not None and tokens > limit:
            raise ValueError(
                f"{name}={tokens} is more than the {limit} tokens that {_name(model)} has positions for; set the "
                f"data's {name} to {limit} or less."
            )


def check_batch(batch: Any, model: nn.Module, limit: int | None) -> None:
    """Refuse a batch whose texts are longer than the model.

    Args:
        batch: with `input_ids`, [batch, tokens], or of such mappings; anything else passes.
        model: for the message.
        limit: its `max_tokens`.

    Raises:
        ValueError: names both numbers.
    """
    longest = max(_widths(batch), default=0)
    if limit is not None and longest > limit:
        raise ValueError(
            f"a text of {longest} tokens is longer than the {limit} tokens that {_name(model)} has positions for; set "
            f"the data's max_length to {limit} or less."
        )


def _widths(batch: Any) -> Iterator[int]:
    if not isinstance(batch, Mapping):
        return
    for part in (batch, *batch.values()):
        ids: Any = part.get("input_ids") if isinstance(part, Mapping) else None
        if isinstance(ids, Tensor) and ids.dim() > 1:
            yield ids.shape[1]


def _base(model: nn.Module) -> PreTrainedModel:
    return cast("PreTrainedModel", model.get_base_model() if isinstance(model, PeftModel) else model)


def _name(model: nn.Module) -> str:
    base = _base(model)
    return base.name_or_path or type(base).__name__
