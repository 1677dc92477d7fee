"""A folder of Python files that looks like a small standard library, and an encoder small enough to train in it."""

from pathlib import Path

import torch
from transformers import BertConfig, BertModel, BertTokenizer

VERBS = ("open", "close", "read", "write", "parse", "join", "split", "find")
NOUNS = ("file", "socket", "header", "archive", "thread", "queue", "path", "token")


def write_library(root: Path) -> Path:
    """64 documented functions, 8 a file."""
    root.mkdir()
    for noun in NOUNS:
        functions = [
            f'def {verb}_{noun}({noun}, mode):\n    """{verb.title()} the {noun} in the given mode and return it."""\n'
            for verb in VERBS
        ]
        (root / f"{noun}.py").write_text("\n".join(functions))
    return root


def write_encoder(folder: Path) -> Path:
    """A BERT of random weights with a vocabulary of the library's words."""
    words = (
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"(),.",
        "the",
        "in",
        "given",
        "mode",
        "and",
        "return",
        "it",
    )
    words += VERBS + NOUNS
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    BertModel(config).save_pretrained(folder)
    return folder
