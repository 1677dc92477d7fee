"""A tiny BERT with a tokenizer, and rows it can learn: what the commands need to run for real in seconds."""

import csv
import random
from pathlib import Path

import lightning  # noqa: F401 - now: the handler of its log keeps the stderr that it finds, which may be one test's
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

WORDS = {"good": ("great",), "bad": ("awful",)}
NEUTRAL = ("the", "film", "was", "a", "very", "and", "plot", "cast")


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory) -> Path:
    """Folder of a BERT of 2 layers x 32 with random weights, and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny_bert")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = [*special, *NEUTRAL, *(word for words in WORDS.values() for word in words)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def sentence(label: str, rng: random.Random) -> str:
    """A text that one word decides."""
    words = [*rng.sample(NEUTRAL, 4), rng.choice(WORDS[label])]
    rng.shuffle(words)
    return " ".join(words)


def write_rows(path: Path, rows: int, seed: int = 0, columns: tuple[str, str] = ("text", "label")) -> Path:
    """A CSV of `rows` labelled texts."""
    rng = random.Random(seed)
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(columns)
        for index in range(rows):
            label = ("good", "bad")[index % 2]
            table.writerow((sentence(label, rng), label))
    return path


@pytest.fixture(scope="session")
def reviews(tmp_path_factory) -> dict[str, Path]:
    """train, validation and test files."""
    folder = tmp_path_factory.mktemp("reviews")
    sizes = {"train": 96, "validation": 32, "test": 32}
    return {name: write_rows(folder / f"{name}.csv", size, seed) for seed, (name, size) in enumerate(sizes.items())}
