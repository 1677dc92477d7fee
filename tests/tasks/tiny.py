"""What the task tests share: a word-level tokenizer, tiny models on disk, and data that a tiny model can learn."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedTokenizerFast

WORDS = [f"w{index}" for index in range(40)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
SIZES: dict[str, dict[str, Any]] = {
    "bert": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "roberta": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 2, "eos_token_id": 3},
    "bart": {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "decoder_start_token_id": 3,
        "forced_eos_token_id": 3,
    },
}


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    model = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=32,
    )


def config(model_type: str = "bert", **changes: Any) -> Any:
    # wide initial weights: what random features do not tell apart, no probe of them can
    shape = {
        "initializer_range": 0.1,
        "vocab_size": len(SPECIAL) + len(WORDS),
        "max_position_embeddings": 40,
        "pad_token_id": 0,
    }
    return AutoConfig.for_model(model_type, **{**shape, **SIZES[model_type], **changes})


def save_body(folder: Path, model_type: str = "bert", dtype: torch.dtype = torch.float32, **changes: Any) -> str:
    """A headless model with its tokenizer, as a pretrained checkpoint comes."""
    torch.manual_seed(3)
    AutoModel.from_config(config(model_type, **changes)).to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def classifier(model_type: str = "bert", num_labels: int = 2, **changes: Any) -> Any:
    torch.manual_seed(3)
    return AutoModelForSequenceClassification.from_config(config(model_type, num_labels=num_labels, **changes)).eval()


def labelled(rows: int = 64, batch_size: int = 16, seed: int = 0) -> DataLoader[dict[str, torch.Tensor]]:
    """The label is the half of the vocabulary that the words come from."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (rows,), generator=rng)
    ids = torch.randint(20, (rows, 6), generator=rng) + len(SPECIAL) + 20 * labels[:, None]
    return _loader([_text(row) | {"labels": label} for row, label in zip(ids, labels, strict=True)], batch_size)


def pairs(rows: int = 64, batch_size: int = 16, seed: int = 0) -> DataLoader[dict[str, dict[str, torch.Tensor]]]:
    """Document i holds query i's words, each moved on by twenty: nothing in common until it is learned."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(20, (rows, 4), generator=rng) + len(SPECIAL)
    return _loader([{"query": _text(row), "document": _text(row + 20)} for row in ids], batch_size)


def trainer(folder: Path | str, **changes: Any) -> L.Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "max_epochs": 1,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(**{**quiet, **changes})


def _text(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    framed = torch.cat([torch.tensor([2]), ids, torch.tensor([3])])
    return {"input_ids": framed, "attention_mask": torch.ones_like(framed)}


def _loader(rows: list[Any], batch_size: int) -> DataLoader[Any]:
    return DataLoader(rows, batch_size=batch_size)  # type: ignore[arg-type]
