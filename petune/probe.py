"""Random inputs for a Hugging Face model, made up from its config: to compare two forms of one model."""

from typing import Any

import torch
from torch import Tensor, nn

_TOKENS = 12


def probe_inputs(model: nn.Module, batch_size: int = 2, seed: int = 0) -> dict[str, Tensor] | None:
    """Inputs that the model's forward takes, on its device; None where its config does not tell them.

    Token ids [batch_size, tokens], images [batch_size, channels, height, width], spectrograms [batch_size, frames,
    bins] (AST) or [batch_size, bins, frames] (Whisper), and decoder ids for an encoder-decoder.
    """
    config: Any = getattr(model, "config", None)
    name = getattr(model, "main_input_name", None)
    parameter = next(iter(model.parameters()), None)
    if config is None or parameter is None:
        return None
    generator = torch.Generator().manual_seed(seed)

    def ids() -> Tensor:
        tokens = torch.randint(getattr(config, "vocab_size", None) or 2, (batch_size, _TOKENS), generator=generator)
        end = getattr(config, "eos_token_id", None)
        if isinstance(end, int):  # a classifier of sequences reads the state of the one that ends them
            tokens = torch.where(tokens == end, (end + 1) % config.vocab_size, tokens)
            tokens[:, -1] = end
        return tokens

    shape = _shape(config, name)
    if name == "input_ids":
        found = {"input_ids": ids()}
    elif shape is not None and name is not None:
        found = {name: torch.randn(batch_size, *shape, generator=generator).to(parameter.dtype)}
    else:
        return None
    if getattr(config, "is_encoder_decoder", False):
        found["decoder_input_ids"] = ids()
    return {key: value.to(parameter.device) for key, value in found.items()}


def first_output(output: Any) -> Tensor:
    """The logits of an output, or else its first tensor."""
    logits = getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else output[0]


def _shape(config: Any, name: str | None) -> tuple[int, ...] | None:
    if name == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        return config.num_channels, height, width
    if name == "input_values" and hasattr(config, "num_mel_bins"):
        return config.max_length, config.num_mel_bins
    if name == "input_features" and hasattr(config, "max_source_positions"):
        return config.num_mel_bins, 2 * config.max_source_positions
    return None
