"""A training beside a frozen backbone, in which the forwards of the blocks are counted; also a script to resume."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from petune.adapters.side import LadderSideConfig
from petune.feature_cache import FeatureCache
from petune.frozen_block import FrozenBlock
from tests.families import FAMILIES, Family

ROWS = 9
_DEPTHS: dict[str, Any] = {
    "num_hidden_layers": 4,
    "n_layer": 4,
    "num_layers": 3,
    "encoder_layers": 3,
    "decoder_layers": 4,
    "depths": [2, 3],
}


def family(name: str) -> Family:
    """A family with enough blocks that some are read and some are not."""
    tiny = FAMILIES[name]
    return replace(tiny, config={key: _DEPTHS.get(key, value) for key, value in tiny.config.items()})


def build(name: str = "bert", head: Any = "cls", seed: int = 0, **options: Any) -> PeftModel:
    """A model with a fresh ladder, in training mode."""
    base = family(name).build(seed=seed, head=head)
    torch.manual_seed(5)
    config = LadderSideConfig(**{"reduction_factor": 4, **options})
    return get_peft_model(base, config).train()


def data(name: str = "bert", head: Any = "cls", rows: int = ROWS, seed: int = 0) -> dict[str, Tensor]:
    """Rows as one batch; the labels of padding are none."""
    batch = family(name).inputs(rows, seed=seed, head=head)
    if head == "lm" and "attention_mask" in batch:
        mask = batch["attention_mask"]
        batch["labels"] = batch["labels"].masked_fill(mask == 0, -100)
    return batch


def pick(batch: dict[str, Tensor], rows: Tensor, side: str = "right") -> dict[str, Tensor]:
    """Some rows, padded to the longest of them."""
    found = {name: tensor[rows] for name, tensor in batch.items()}
    if "attention_mask" not in found:
        return found
    lengths = found["attention_mask"].sum(1)
    for name in [name for name in found if found[name].dim() == 2]:
        cut = found[name][:, : int(lengths.max())]
        if side == "left":
            ends = zip(cut, lengths.tolist(), strict=True)
            cut = torch.stack([row.roll(len(row) - length) for row, length in ends])
        found[name] = cut.contiguous()
    return found


class Run:
    """Some epochs of training; `losses` of each step, and `forwards` of blocks in each epoch."""

    def __init__(self, model: PeftModel) -> None:
        self.model = model
        self.losses: list[float] = []
        self.forwards: list[int] = []
        self._count = 0
        for module in model.modules():
            if isinstance(module, FrozenBlock):
                module.get_base_layer().register_forward_hook(self._add)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.SGD(trained, lr=0.3)

    def _add(self, *_: Any) -> None:
        self._count += 1

    def epochs(self, batch: dict[str, Tensor], *seeds: int, batch_size: int = 4, side: str = "right") -> "Run":
        """Shuffled by a seed each; the last batch is smaller."""
        rows = len(next(iter(batch.values())))
        for seed in seeds:
            before = self._count
            order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
            for chosen in order.split(batch_size):
                self.step(pick(batch, chosen, side))
            self.forwards.append(self._count - before)
        return self

    def step(self, batch: dict[str, Tensor]) -> None:
        torch.manual_seed(len(self.losses))  # for the dropout of the model's head
        loss = self.model(**batch).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.losses.append(loss.item())


def without(name: str, head: Any, *seeds: int, batch: dict[str, Tensor] | None = None, **options: Any) -> Run:
    """The run without a cache."""
    return Run(build(name, head)).epochs(data(name, head) if batch is None else batch, *seeds, **options)


if __name__ == "__main__":  # what the second process of a test does: one more epoch with a folder
    torch.set_num_threads(1)
    run = Run(build())
    with FeatureCache(run.model, where=Path(sys.argv[1]), rows=ROWS, announce=None) as cache:
        run.epochs(data(), 7)
        print(run.forwards, cache.rows_replayed, len(cache))
    print(*run.losses)
