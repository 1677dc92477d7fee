"""The four real tasks of `onebit.py`: turned and noisy digits, docstrings by signature, and the order of words.

Every side trains on the same rows in the same order, under the same frozen head. The test split is the same for every
seed and no seed trains, pretrains or validates on it, so a setting may be chosen on any seed's validation split.
"""

import copy
import random
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupShuffleSplit, train_test_split
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ViTConfig,
    ViTForImageClassification,
)

from petune.demo.docstrings import PAIRS_PER_FILE, DocPair, collect_pairs, pairs_in, source_files
from petune.demo.metrics import score_queries
from petune.demo.retrieval import demo_encoder, has_fast_bf16
from petune.tasks.text_embedding import contrastive_loss

Part = Literal["train", "validation", "test"]
TEST_SEED = 2023  # of the one split that holds the test rows apart
UPPER_BLOCKS = 3  # of the sentence encoder's six take an adapter


class Task(Protocol):
    """One seed of one task: a frozen model, rows to train on, rows to choose by, rows to report."""

    steps: int
    """Optimizer steps of one training."""
    batch_size: int
    targets: tuple[str, ...]
    """Query and value projections: the default targets of Bi-LoRA."""
    base: PreTrainedModel
    """The frozen model; a side adapts a copy."""

    def rows(self, part: Part) -> int: ...

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Mean loss of the training rows `batch`, [rows]."""
        ...

    def scores(self, model: nn.Module, part: Part) -> dict[str, float]:
        """In points, 0..100; the first is the one that a setting is chosen by."""
        ...


@dataclass(frozen=True)
class Images:
    """Pixels in 0..1, [images, 1, 8, 8], and labels, [images]."""

    pixels: Tensor
    labels: Tensor

    def __getitem__(self, rows: Tensor | slice) -> "Images":
        return Images(self.pixels[rows], self.labels[rows])


def turned(pixels: Tensor, noise: torch.Generator) -> Tensor:
    """By 90 degrees."""
    return torch.rot90(pixels, dims=(2, 3))


def noisy_negative(pixels: Tensor, noise: torch.Generator) -> Tensor:
    """Black for white, under noise of standard deviation 0.3."""
    return 1.0 - pixels + 0.3 * torch.randn(pixels.shape, generator=noise)


class Digits:
    """scikit-learn's digits after a shift, read by a ViT pretrained on upright ones; accuracy. The head stays.

    Args:
        shift: pixels [images, 1, 8, 8] and a source of noise to the shifted pixels.
        seed: of the split into training and validation, and of the pretraining.
        smoke: a few steps, for a test.
    """

    batch_size = 32
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    num_test, num_pretrain, num_train = 600, 900, 600
    width, blocks = 64, 4

    def __init__(self, shift: Callable[[Tensor, torch.Generator], Tensor], seed: int, *, smoke: bool = False) -> None:
        self.steps = 4 if smoke else 600
        upright = _digits()
        pool, test = train_test_split(
            np.arange(len(upright.labels)), test_size=self.num_test, stratify=upright.labels, random_state=TEST_SEED
        )
        order = np.random.default_rng(seed).permutation(pool)
        shifted = Images(shift(upright.pixels, torch.Generator().manual_seed(TEST_SEED)), upright.labels)
        self.parts: Mapping[Part, Images] = {
            "train": shifted[torch.from_numpy(order[: self.num_train])],
            "validation": shifted[torch.from_numpy(order[self.num_pretrain :])],
            "test": shifted[torch.from_numpy(test)],
        }
        torch.manual_seed(seed)
        self.base: PreTrainedModel = _make_vit(self.width, self.blocks)
        self._pretrain(upright[torch.from_numpy(order[: self.num_pretrain])], 4 if smoke else 600, seed)

    def rows(self, part: Part) -> int:
        return len(self.parts[part].labels)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        images = self.parts["train"][batch]
        return nn.functional.cross_entropy(model(pixel_values=images.pixels).logits, images.labels)

    @torch.no_grad()
    def scores(self, model: nn.Module, part: Part) -> dict[str, float]:
        images = self.parts[part]
        predicted = model.eval()(pixel_values=images.pixels).logits.argmax(dim=-1)
        return {"accuracy": _points(predicted == images.labels)}

    def _pretrain(self, upright: Images, steps: int, seed: int) -> None:
        optimizer = torch.optim.AdamW(self.base.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps + 1)
        self.base.train()
        for batch in batches(len(upright.labels), self.batch_size, steps, seed):
            images = upright[batch]
            nn.functional.cross_entropy(self.base(pixel_values=images.pixels).logits, images.labels).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        self.base.eval().requires_grad_(False)


class States(nn.Module):
    """In the place of an encoder's embeddings: states from below, as they are."""

    def forward(self, inputs_embeds: Tensor, **_: Any) -> Tensor:
        return inputs_embeds


class Texts:
    """What both text tasks share: the upper blocks of the demo extra's sentence encoder, the mean of its token states.

    The blocks below take no adapter, so their states are computed once. Dropout of the upper ones stays on in
    training, as the authors of the encoder left it.
    """

    batch_size = 32
    targets: tuple[str, ...] = ("query", "value")

    def __init__(self) -> None:
        self.base: Any = _halves()[2]

    def embed(self, model: nn.Module, texts: Mapping[str, Tensor], rows: Tensor) -> Tensor:
        """Mean token state of each text at length one, [rows, hidden_size]."""
        mask = texts["mask"][rows]
        mask = mask[:, : int(mask.sum(1).max())]
        with half_precision():
            states = texts["states"][rows, : mask.shape[1]]
            states = model(inputs_embeds=states, attention_mask=mask).last_hidden_state.float()
        pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return nn.functional.normalize(pooled, dim=-1)

    @torch.no_grad()
    def embed_all(self, model: nn.Module, texts: Mapping[str, Tensor], rows: Tensor) -> Tensor:
        """As `embed`, dropout off, any number of rows; short texts with short ones."""
        model.eval()
        order = texts["mask"][rows].sum(1).argsort()
        found = torch.cat([self.embed(model, texts, some) for some in rows[order].split(64)])
        return found[order.argsort()]


class Retrieval(Texts):
    """Which docstring belongs to a signature? The demo's pairs, files apart; R@1 and MRR, no head."""

    scale = 20.0  # inverse temperature, as in sentence-transformers

    def __init__(self, seed: int, *, smoke: bool = False) -> None:
        super().__init__()
        self.steps = 2 if smoke else 90
        self.queries, self.documents, files, test = _retrieval_texts(smoke)
        pool = np.arange(test, len(files))  # the test pairs come first
        train, validation = split_files(pool, files, 0.3, seed)
        self.parts: dict[Part, Tensor] = {"train": train, "validation": validation, "test": torch.arange(test)}

    def rows(self, part: Part) -> int:
        return len(self.parts[part])

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        rows = self.parts["train"][batch]
        queries, documents = (self.embed(model, texts, rows) for texts in (self.queries, self.documents))
        return contrastive_loss(queries, documents, self.scale)

    def scores(self, model: nn.Module, part: Part) -> dict[str, float]:
        rows = self.parts[part]
        found = (self.embed_all(model, texts, rows) for texts in (self.queries, self.documents))
        queries, documents = (some.double().numpy() for some in found)
        means = score_queries(queries @ documents.T).means()
        return {name: 100.0 * means[name] for name in ("R@1", "MRR")}


class WordOrder(Texts):
    """Does a docstring read as written, or are four words in a row shuffled? Files apart; accuracy.

    A kin of "bigram shift" (Conneau et al. 2018, arXiv 1805.01070), which sentence encoders do badly at. The head is
    logistic regression on the frozen encoder's embeddings of the training rows, the same for all sides of a seed.
    """

    def __init__(self, seed: int, *, smoke: bool = False) -> None:
        super().__init__()
        self.steps = 2 if smoke else 160
        self.texts, self.labels, files = _order_texts(smoke)
        pool, test = split_files(np.arange(len(files)), files, 0.35, TEST_SEED)
        train, validation = split_files(pool.numpy(), files, 0.25, seed)
        self.parts: dict[Part, Tensor] = {"train": train, "validation": validation, "test": test}
        self.head = self._probe()

    def _probe(self) -> nn.Linear:
        embeddings = self.embed_all(self.base, self.texts, self.parts["train"])
        found: Any = LogisticRegression(C=10.0, max_iter=1000)
        found.fit(embeddings.numpy(), self.labels[self.parts["train"]].numpy())
        head = nn.Linear(embeddings.shape[1], 1).requires_grad_(False)
        head.weight.copy_(torch.from_numpy(found.coef_))
        head.bias.copy_(torch.from_numpy(found.intercept_))
        return head

    def rows(self, part: Part) -> int:
        return len(self.parts[part])

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        rows = self.parts["train"][batch]
        logits = self.head(self.embed(model, self.texts, rows))[:, 0]
        return nn.functional.binary_cross_entropy_with_logits(logits, self.labels[rows].float())

    def scores(self, model: nn.Module, part: Part) -> dict[str, float]:
        rows = self.parts[part]
        logits = self.head(self.embed_all(model, self.texts, rows))[:, 0]
        return {"accuracy": _points((logits > 0) == self.labels[rows])}


class Backbone:
    """For times alone: a ViT-S/16 of random weights, which is of a usual width, on random images of 224 pixels."""

    steps = 1
    batch_size = 1
    targets: tuple[str, ...] = ("q_proj", "v_proj")

    def __init__(self, seed: int, *, smoke: bool = False) -> None:
        torch.manual_seed(seed)
        size = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
        self.base: PreTrainedModel = ViTForImageClassification(ViTConfig(num_hidden_layers=1 if smoke else 12, **size))
        self.pixels = torch.randn(self.batch_size, 3, 224, 224)

    def rows(self, part: Part) -> int:
        return self.batch_size

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return model(pixel_values=self.pixels[batch]).logits.square().mean()

    def scores(self, model: nn.Module, part: Part) -> dict[str, float]:
        raise NotImplementedError("random weights have no score")


def batches(rows: int, batch_size: int, steps: int, seed: int) -> list[Tensor]:
    """`steps` batches of row numbers: every row once an epoch, in a new order each time, whole batches only."""
    order = torch.Generator().manual_seed(seed)
    found: list[Tensor] = []
    while len(found) < steps:
        found += torch.randperm(rows, generator=order).split(batch_size)[: max(1, rows // batch_size)]
    return found[:steps]


def half_precision() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=has_fast_bf16())


def _points(correct: Tensor) -> float:
    return 100.0 * correct.double().mean().item()


def _digits() -> Images:
    digits: Any = load_digits()
    return Images(torch.from_numpy(digits.images / 16.0).float()[:, None], torch.from_numpy(digits.target))


def _make_vit(width: int, blocks: int) -> ViTForImageClassification:
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        intermediate_size=2 * width,
        image_size=8,
        patch_size=2,
        num_channels=1,
    )
    config.num_labels = 10
    return ViTForImageClassification(config)


@cache
def _halves() -> tuple[PreTrainedTokenizerBase, Any, Any]:
    """The tokenizer, and the sentence encoder in two parts: ids to states, and states to states."""
    folder = str(demo_encoder())
    lower: Any = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval().requires_grad_(False)
    upper = copy.deepcopy(lower)
    upper.embeddings = States()
    upper.encoder.layer = upper.encoder.layer[-UPPER_BLOCKS:]
    upper.config.num_hidden_layers = UPPER_BLOCKS
    lower.encoder.layer = lower.encoder.layer[:-UPPER_BLOCKS]
    return AutoTokenizer.from_pretrained(folder), lower, upper


@torch.no_grad()
def _states(texts: list[str], max_tokens: int) -> dict[str, Tensor]:
    """What the upper blocks read, [texts, tokens, hidden_size], and the mask, [texts, tokens]."""
    tokenizer, lower, _ = _halves()
    found = tokenizer(texts, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
    ids, mask = found["input_ids"], found["attention_mask"]
    with half_precision():
        states = [
            lower(input_ids=ids[rows], attention_mask=mask[rows]).last_hidden_state.float()
            for rows in torch.arange(len(texts)).split(64)
        ]
    return {"states": torch.cat(states), "mask": mask}


@cache
def _retrieval_texts(smoke: bool) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str], int]:
    """Queries and docstrings, the file of each, and how many at the front are test pairs."""
    split = collect_pairs(*((120, 64) if smoke else (1400, 800)), seed=TEST_SEED)
    pairs = split.held_out + split.train
    queries = _states([pair.query for pair in pairs], 32)
    documents = _states([pair.docstring for pair in pairs], 32)
    return queries, documents, [pair.file for pair in pairs], len(split.held_out)


@cache
def _order_texts(smoke: bool) -> tuple[dict[str, Tensor], Tensor, list[str]]:
    """Every docstring's first words as written (label 0) and shuffled (label 1), and the file of each."""
    draw = random.Random(TEST_SEED)
    texts, files = list[str](), list[str]()
    for pair in _docstrings()[: 100 if smoke else None]:
        words = pair.docstring.split()[:16]
        texts += [" ".join(words), " ".join(shuffled(words, draw))]
        files += [pair.file, pair.file]
    return _states(texts, 32), torch.arange(len(texts)) % 2, files


def shuffled(words: list[str], draw: random.Random, span: int = 4) -> list[str]:
    """The words with `span` in a row in another order."""
    windows = [words[start : start + span] for start in range(len(words) - span + 1)]
    start = draw.choice([start for start, window in enumerate(windows) if len(set(window)) > 1])
    window = windows[start]
    while window == words[start : start + span]:
        draw.shuffle(window)
    return [*words[:start], *window, *words[start + span :]]


def _docstrings() -> list[DocPair]:
    """Functions of the standard library, at most PAIRS_PER_FILE of a file; no docstring twice, none of few words."""
    root = Path(sysconfig.get_path("stdlib"))
    pairs = [pair for file in source_files(root) for pair in pairs_in(file, root)[:PAIRS_PER_FILE]]
    distinct = {pair.docstring: pair for pair in pairs if len(set(pair.docstring.split()[:16])) > 8}
    found = list(distinct.values())
    random.Random(TEST_SEED).shuffle(found)
    return found


def split_files(rows: NDArray[np.int64], files: Sequence[str], share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of most files, and rows of `share` of the files."""
    first, second = next(
        GroupShuffleSplit(1, test_size=share, random_state=seed).split(rows, groups=[files[row] for row in rows])
    )
    return torch.from_numpy(rows[first]), torch.from_numpy(rows[second])
