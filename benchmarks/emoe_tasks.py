"""The text task of `emoe.py`: is a docstring in the order that it was written in, here and in packages never seen?

In-domain rows are docstrings of Python's standard library; shifted ones are NumPy's and SciPy's, which every install
of PETune has. No side is trained or chosen on those, nor on the test files of the standard library.
"""

import copy
import importlib.util
import random
import sysconfig
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from benchmarks import onebit_tasks
from benchmarks.onebit_tasks import TEST_SEED, States, half_precision, shuffled, split_files
from petune.demo.docstrings import PAIRS_PER_FILE, pairs_in, source_files
from petune.demo.retrieval import demo_encoder

IN_DOMAIN, SHIFTED = "in-domain", "shifted"
PACKAGES = ("numpy", "scipy")
NUM_SHIFTED = 1000  # docstrings, two rows each: somewhat more than the in-domain test has
WORDS, MAX_TOKENS = 16, 32
UPPER_BLOCKS = 4  # of the encoder's six take an adapter; the last two even ones, 2 and 4 of six, are 0 and 2 of these


class WordOrder(onebit_tasks.WordOrder):
    """The task of that name in `onebit.py`, with a second test split, of other packages, and one more adapted block.

    Args:
        seed: of the split into training and validation, files apart; the test splits are the same for all seeds.
        smoke: a few rows and steps, for a test.
    """

    batch_size = 16  # the paper's for LoRA

    def __init__(self, seed: int, *, smoke: bool = False) -> None:
        self.base = _halves()[1]
        self.steps = 2 if smoke else 160
        self.texts, self.labels, files = _texts(smoke)
        pool, test = split_files(np.arange(len(files)), files, 0.35, TEST_SEED)
        train, validation = split_files(pool.numpy(), files, 0.25, seed)
        shifted = torch.arange(len(files), len(self.labels))
        self.parts: Any = {
            "train": train,
            "validation": validation,
            IN_DOMAIN: test,
            SHIFTED: shifted,
        }
        self.head = self._probe()

    @torch.no_grad()
    def logits(self, model: nn.Module, rows: Tensor) -> Tensor:
        """Above 0 for shuffled, [rows]; in float32 throughout."""
        mask = self.texts["mask"][rows]
        mask = mask[:, : int(mask.sum(1).max())]
        states = model(inputs_embeds=self.texts["states"][rows, : mask.shape[1]], attention_mask=mask)[0]
        pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.head(nn.functional.normalize(pooled, dim=-1))[:, 0]


@cache
def _halves() -> tuple[Any, Any]:
    """The encoder in two parts: ids to states, and states to states."""
    lower: Any = AutoModel.from_pretrained(str(demo_encoder()), add_pooling_layer=False).eval().requires_grad_(False)
    upper = copy.deepcopy(lower)
    upper.embeddings = States()
    upper.encoder.layer = upper.encoder.layer[-UPPER_BLOCKS:]
    upper.config.num_hidden_layers = UPPER_BLOCKS
    lower.encoder.layer = lower.encoder.layer[:-UPPER_BLOCKS]
    return lower, upper


@cache
def _texts(smoke: bool) -> tuple[Mapping[str, Tensor], Tensor, list[str]]:
    """What the upper blocks read of docstrings, as written (label 0) and shuffled (1); the file of in-domain rows."""
    draw = random.Random(TEST_SEED)
    limit = 100 if smoke else None
    own = dict(islice(_docstrings(Path(sysconfig.get_path("stdlib"))), limit))
    found = dict(one for package in PACKAGES for one in islice(_docstrings(_folder(package)), limit))
    others = draw.sample([words for words in found if words not in own], 40 if smoke else NUM_SHIFTED)
    texts = [text for words in (*own, *others) for text in (" ".join(words), " ".join(shuffled([*words], draw)))]
    return _states(texts), torch.arange(len(texts)) % 2, [file for file in own.values() for _ in range(2)]


@torch.no_grad()
def _states(texts: list[str]) -> Mapping[str, Tensor]:
    """States from the lower blocks, [texts, tokens, hidden_size], and the mask, [texts, tokens]."""
    tokenizer = AutoTokenizer.from_pretrained(str(demo_encoder()))
    found = tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    ids, mask = found["input_ids"], found["attention_mask"]
    with half_precision():
        states = [
            _halves()[0](input_ids=ids[rows], attention_mask=mask[rows])[0].float()
            for rows in torch.arange(len(texts)).split(64)
        ]
    return {"states": torch.cat(states), "mask": mask}


def _docstrings(root: Path) -> Iterator[tuple[tuple[str, ...], str]]:
    """First words of docstrings and their files, at most `PAIRS_PER_FILE` of a file, none of few different words."""
    for file in source_files(root):
        for pair in pairs_in(file, root)[:PAIRS_PER_FILE]:
            words = tuple(pair.docstring.split()[:WORDS])
            if len(set(words)) > WORDS // 2:
                yield words, pair.file


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None  # NumPy is a dependency of PETune's, and SciPy of scikit-learn
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])
