"""Tiny models with random weights, one per family of methods.md 0.4: built in milliseconds, equal for equal seeds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    PreTrainedModel,
)

Head = Literal["none", "cls", "lm"]
Kind = Literal["encoder", "decoder", "seq2seq", "image", "audio", "speech"]

VOCAB, LABELS, TOKENS, IMAGE, MELS, FRAMES = 99, 3, 11, 32, 8, 20

AUTO: dict[Kind, dict[Head, Any]] = {
    "encoder": {"none": AutoModel, "cls": AutoModelForSequenceClassification, "lm": AutoModelForMaskedLM},
    "decoder": {"none": AutoModel, "cls": AutoModelForSequenceClassification, "lm": AutoModelForCausalLM},
    "seq2seq": {"none": AutoModel, "cls": AutoModelForSequenceClassification, "lm": AutoModelForSeq2SeqLM},
    "image": {"none": AutoModel, "cls": AutoModelForImageClassification},
    "audio": {"none": AutoModel, "cls": AutoModelForAudioClassification},
    "speech": {"none": AutoModel, "cls": AutoModelForAudioClassification, "lm": AutoModelForSpeechSeq2Seq},
}


@dataclass(frozen=True)
class Family:
    """One architecture: how to build it tiny, and a batch it accepts."""

    name: str
    model_type: str
    kind: Kind
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def heads(self) -> tuple[Head, ...]:
        """The heads `build` knows: "none" always; "cls" classifies texts, images or sounds; "lm" predicts tokens."""
        return tuple(AUTO[self.kind])

    def build(self, seed: int = 0, head: Head = "none") -> PreTrainedModel:
        """The model in eval mode (as `from_pretrained` gives it), float32, on torch's default device."""
        config = AutoConfig.for_model(self.model_type, num_labels=LABELS, **self.config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AUTO[self.kind][head].from_config(config).eval()

    def inputs(self, batch_size: int = 2, seed: int = 0, head: Head = "none") -> dict[str, torch.Tensor]:
        """A batch for `build(head=head)`; texts are padded on the right from the second row on; labels with a head."""
        rng = torch.Generator().manual_seed(seed)
        batch = {"image": _image, "audio": _sound, "speech": _speech}.get(self.kind, _text)(batch_size, rng)
        if self.kind in ("seq2seq", "speech") and head == "none":
            batch["decoder_input_ids"] = _tokens((batch_size, TOKENS - 4), rng)
        if head == "cls":
            batch["labels"] = torch.randint(LABELS, (batch_size,), generator=rng)
        elif head == "lm":
            batch["labels"] = _tokens((batch_size, TOKENS), rng)
        return batch


def _tokens(shape: tuple[int, int], rng: torch.Generator) -> torch.Tensor:
    return torch.randint(3, VOCAB, shape, generator=rng)  # 0, 1 and 2 are pad, bos and eos


def _text(batch_size: int, rng: torch.Generator) -> dict[str, torch.Tensor]:
    ids, mask = _tokens((batch_size, TOKENS), rng), torch.ones(batch_size, TOKENS, dtype=torch.long)
    for row in range(batch_size):
        length = TOKENS - row % 5
        ids[row, length - 1], ids[row, length:], mask[row, length:] = 2, 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def _image(batch_size: int, rng: torch.Generator) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(batch_size, 3, IMAGE, IMAGE, generator=rng)}


def _sound(batch_size: int, rng: torch.Generator) -> dict[str, torch.Tensor]:
    return {"input_values": torch.randn(batch_size, FRAMES, MELS, generator=rng)}


def _speech(batch_size: int, rng: torch.Generator) -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(batch_size, MELS, FRAMES, generator=rng)}


_TOKENS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_BERT = {**_TOKENS, **_SIZES, "max_position_embeddings": 32}
_LLAMA = {**_BERT, "num_key_value_heads": 2, "head_dim": 8}
_SEQ2SEQ = {**_TOKENS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "decoder_start_token_id": 2} | {
    f"{side}_{size}": value
    for side in ("encoder", "decoder")
    for size, value in (("attention_heads", 4), ("ffn_dim", 48))
}
_T5 = {**_TOKENS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
_VIT = {**_SIZES, "image_size": IMAGE, "patch_size": 8}

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("bert", "bert", "encoder", _BERT),
        Family("roberta", "roberta", "encoder", _BERT),
        Family(
            "distilbert",
            "distilbert",
            "encoder",
            _TOKENS | {"dim": 32, "n_layers": 2, "n_heads": 4} | {"hidden_dim": 48, "max_position_embeddings": 32},
        ),
        Family("gpt2", "gpt2", "decoder", _TOKENS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}),
        Family("llama", "llama", "decoder", _LLAMA),
        Family("mistral", "mistral", "decoder", _LLAMA),
        Family("qwen2", "qwen2", "decoder", _BERT | {"num_key_value_heads": 2}),
        Family("qwen3", "qwen3", "decoder", _LLAMA | {"head_dim": 16}),
        Family("gemma", "gemma", "decoder", _LLAMA),
        Family("gemma2", "gemma2", "decoder", _LLAMA),
        Family("phi3", "phi3", "decoder", _BERT | {"num_key_value_heads": 2}),
        Family("t5", "t5", "seq2seq", _T5),
        Family("t5_gated", "t5", "seq2seq", _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
        Family("bart", "bart", "seq2seq", _SEQ2SEQ | {"max_position_embeddings": 32}),
        Family(
            "whisper",
            "whisper",
            "speech",
            _SEQ2SEQ
            | {
                "num_mel_bins": MELS,
                "max_source_positions": FRAMES // 2,
                "max_target_positions": 32,
                "suppress_tokens": None,
                "begin_suppress_tokens": None,
                "classifier_proj_size": 16,
            },
        ),
        Family("vit", "vit", "image", _VIT),
        Family("deit", "deit", "image", _VIT | {"architectures": ["DeiTForImageClassification"]}),
        Family("dinov2", "dinov2", "image", _VIT | {"mlp_ratio": 2}),
        Family(
            "ast",
            "audio-spectrogram-transformer",
            "audio",
            _SIZES
            | {"patch_size": 4, "frequency_stride": 4, "time_stride": 4, "max_length": FRAMES, "num_mel_bins": MELS},
        ),
        Family(
            "swin",
            "swin",
            "image",
            {
                "image_size": IMAGE,
                "patch_size": 4,
                "embed_dim": 16,
                "depths": [2, 2],
                "num_heads": [2, 4],
                "window_size": 4,
                "mlp_ratio": 3.0,
            },
        ),
    )
}
