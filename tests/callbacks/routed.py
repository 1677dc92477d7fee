"""Tiny routed models, and a task that trains them on batches of their family."""

from typing import Any

import lightning as L
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader

from petune.adapters.emoe import EmoeConfig, Router
from tests.families import FAMILIES

EXPERTS, TOP_K = 4, 2


def model(family: str = "bert", head: Any = "cls", **options: Any) -> PeftModel:
    fields = {"num_experts": EXPERTS, "top_k": TOP_K, "layers": "all", "r": 3, "lora_dropout": 0.0}
    return get_peft_model(FAMILIES[family].build(head=head), EmoeConfig(**{**fields, **options})).eval()


def routers(module: nn.Module) -> dict[str, Router]:
    return {path: child for path, child in module.named_modules() if isinstance(child, Router)}


def hooks(module: nn.Module) -> int:
    """How many forward hooks are on a model."""
    return sum(len(child._forward_hooks) + len(child._forward_pre_hooks) for child in module.modules())


def batches(count: int, family: str = "bert", head: Any = "cls", rows: int = 3, seed: int = 0) -> list[Any]:
    return [FAMILIES[family].inputs(rows, seed=seed + index, head=head) for index in range(count)]


def loader(given: list[Any]) -> DataLoader:
    return DataLoader(given, batch_size=None)


class Task(L.LightningModule):
    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self.model = globals()["model"]() if model is None else model

    def _loss(self, batch: Any) -> Tensor:
        return self.model(**{name: value for name, value in batch.items() if name != "task"}).loss

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self._loss(batch)

    def validation_step(self, batch: Any, index: int, dataloader_idx: int = 0) -> None:
        self._loss(batch)

    test_step = predict_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)
