"""The two tasks of `pat.py`: a small Llama that read source code and turns to prose, a small ViT to tilted digits.

Every seed pretrains a model of its own here, on real data, and all sides of a seed start from that. The test rows are
the same for all seeds; none trains, pretrains or validates on them.
"""

import importlib.util
import random
import sysconfig
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from sklearn.model_selection import GroupShuffleSplit
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, ViTConfig, ViTForImageClassification

from benchmarks import onebit_tasks
from benchmarks.onebit_tasks import TEST_SEED, _make_vit
from petune.demo.docstrings import pairs_in, source_files

Part = Literal["train", "validation", "test"]
PACKAGES = ("numpy", "scipy")
VOCABULARY = 128  # a token is an ASCII character
CONTEXT = 64  # characters
TILT = 35  # degrees


class Prose:
    """The next character of NumPy's and SciPy's signatures and docstrings, after the standard library's source code.

    Args:
        seed: of the pretraining, and of the split of files into training and validation.
        smoke: a few steps, for a test.
    """

    metrics = ("accuracy", "perplexity")
    batch_size = 16
    width, blocks = 128, 4

    def __init__(self, seed: int, *, smoke: bool = False) -> None:
        self.steps = 4 if smoke else 200
        rows, files = _prose(smoke)
        pool, test = _split(np.arange(len(files)), files, 0.25, TEST_SEED)
        train, validation = _split(pool, files, 0.2, seed)
        draw = np.random.default_rng(seed)
        chosen = {"train": draw.permutation(train)[:3200], "validation": validation, "test": test}
        self.parts: dict[str, Tensor] = {part: rows[torch.from_numpy(found)] for part, found in chosen.items()}
        torch.manual_seed(seed)
        self.base: PreTrainedModel = _make_llama(self.width, self.blocks, VOCABULARY)
        self._pretrain(4 if smoke else 800, seed)

    def rows(self, part: Part) -> int:
        return len(self.parts[part])

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        rows = self.parts["train"][batch]
        return model(input_ids=rows, labels=rows).loss

    def inputs(self, part: Part) -> dict[str, Tensor]:
        """What the model's forward takes."""
        return {"input_ids": self.parts[part]}

    @torch.no_grad()
    def scores(self, model: nn.Module, part: Part) -> dict[str, float]:
        """Next characters that are right, in points; and the perplexity of a character."""
        model.eval()
        right, nats = 0.0, 0.0
        for rows in self.parts[part].split(64):
            logits, targets = model(input_ids=rows).logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()
            right += (logits.argmax(dim=-1) == targets).sum().item()
            nats += nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        count = self.parts[part][:, 1:].numel()
        return {"accuracy": 100.0 * right / count, "perplexity": float(np.exp(nats / count))}

    def _pretrain(self, steps: int, seed: int) -> None:
        code, draw = _code(), torch.Generator().manual_seed(seed)

        def drawn() -> Iterable[dict[str, Tensor]]:
            for _ in range(steps):
                starts = torch.randint(len(code) - CONTEXT, (self.batch_size, 1), generator=draw)
                rows = code[starts + torch.arange(CONTEXT)].long()
                yield {"input_ids": rows, "labels": rows}

        _pretrain(self.base, drawn(), steps, 3e-3)


def tilted(pixels: Tensor, noise: torch.Generator) -> Tensor:
    """By TILT degrees, under noise of standard deviation 0.2."""
    angle = torch.tensor(np.deg2rad(TILT)).float()
    turn = torch.stack((angle.cos(), -angle.sin(), angle.new_zeros(()), angle.sin(), angle.cos(), angle.new_zeros(())))
    grid = nn.functional.affine_grid(turn.view(1, 2, 3).expand(len(pixels), 2, 3), list(pixels.shape), False)
    found = nn.functional.grid_sample(pixels, grid, align_corners=False)
    return found + 0.2 * torch.randn(pixels.shape, generator=noise)


class Digits(onebit_tasks.Digits):
    """scikit-learn's digits tilted, read by a ViT pretrained on upright ones; the head stays.

    The pretrained model reads two in five of them, so that there is something to lose.
    """

    metrics = ("accuracy",)
    num_train = 300

    def __init__(self, seed: int, *, smoke: bool = False) -> None:
        super().__init__(tilted, seed, smoke=smoke)
        self.steps = 4 if smoke else 200

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        images = self.parts["train"][batch]
        return model(pixel_values=images.pixels, labels=images.labels).loss

    def inputs(self, part: Part) -> dict[str, Tensor]:
        """What the model's forward takes."""
        return {"pixel_values": self.parts[part].pixels}


class Shape(NamedTuple):
    """A model of random weights to be timed, and what a training step of it takes."""

    name: str
    model: PreTrainedModel
    inputs: dict[str, Tensor]


def shapes(smoke: bool) -> Iterator[Shape]:
    """The models of the two tasks, and two of usual widths."""
    torch.manual_seed(0)
    ids = torch.randint(VOCABULARY, (Prose.batch_size, CONTEXT))
    llama = _make_llama(Prose.width, Prose.blocks, VOCABULARY)
    yield Shape(f"Llama, {Prose.width} wide", llama, {"input_ids": ids, "labels": ids})
    images, labels = torch.rand(Digits.batch_size, 1, 8, 8), torch.zeros(Digits.batch_size, dtype=torch.long)
    vit = _make_vit(Digits.width, Digits.blocks).eval()
    yield Shape(f"ViT, {Digits.width} wide", vit, {"pixel_values": images, "labels": labels})
    if smoke:
        return
    ids = torch.randint(1024, (1, 256))
    yield Shape("Llama, 768 wide", _make_llama(768, 2, 1024), {"input_ids": ids, "labels": ids})
    vit = ViTForImageClassification(ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536)).eval()
    yield Shape("ViT-S/16, 384 wide", vit, {"pixel_values": torch.randn(1, 3, 224, 224), "labels": labels[:1]})


def _make_llama(width: int, blocks: int, vocabulary: int) -> LlamaForCausalLM:
    """Of random weights, heads of 32 and a feed-forward three times as wide; embeddings in and out apart."""
    config = LlamaConfig(
        hidden_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        intermediate_size=3 * width,
        vocab_size=vocabulary,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def _pretrain(model: nn.Module, drawn: Iterable[dict[str, Tensor]], steps: int, learning_rate: float) -> None:
    """Train all of the model, then freeze it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps + 1, pct_start=0.1)
    model.train()
    for inputs in drawn:
        model(**inputs).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval().requires_grad_(False)


@cache
def _code() -> Tensor:
    """All of the standard library's source code, uint8 [characters]."""
    files = source_files(Path(sysconfig.get_path("stdlib")))
    return _characters("".join(file.read_text("utf-8", "replace") for file in files))


@cache
def _prose(smoke: bool) -> tuple[Tensor, list[str]]:
    """Rows of CONTEXT characters, int64 [rows, CONTEXT], each out of one file, and the files."""
    rows, files = list[Tensor](), list[str]()
    for package in PACKAGES:
        root = _folder(package)
        every = sorted(source_files(root))
        for file in random.Random(TEST_SEED).sample(every, 20 if smoke else 160):
            text = "".join(f"{pair.signature}\n{pair.docstring}\n\n" for pair in pairs_in(file, root))
            found = _characters(text)
            found = found[: len(found) // CONTEXT * CONTEXT].view(-1, CONTEXT)[:60]  # no file decides alone
            rows.append(found)
            files += [f"{package}/{file.relative_to(root)}"] * len(found)
    return torch.cat(rows).long(), files


def _characters(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(text.encode("ascii", "replace"), np.uint8).copy())


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None  # NumPy is a dependency of PETune's, and SciPy of scikit-learn
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def _split(rows: np.ndarray, files: list[str], share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    first, second = next(
        GroupShuffleSplit(1, test_size=share, random_state=seed).split(rows, groups=[files[row] for row in rows])
    )
    return rows[first], rows[second]
