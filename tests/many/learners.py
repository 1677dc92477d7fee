"""Tiny Lightning runs on one base, alone or together, for the tests of `petune.many`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from peft import PeftConfig, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader

from petune import BiLoraConfig, FusedLoraConfig
from petune.adapters.lora import fuse
from petune.callbacks import AdapterCheckpoint
from petune.many import ManyRun
from tests.families import FAMILIES, LABELS, VOCAB, Head

# every kind of dropout: modules, functions, and within attention, by SDPA and eager
_DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
BASES = {
    name: replace(FAMILIES[name], config={**FAMILIES[name].config, **more})
    for name, more in {
        "bert": _DROPOUT,
        "roberta": _DROPOUT | {"attn_implementation": "eager"},
        "llama": {},
        "gpt2": {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
        "vit": _DROPOUT,
        "t5": {"dropout_rate": 0.1},
        "bart": {"dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1},
    }.items()
}


class Learner(L.LightningModule):
    """A model with an adapter; its base is the same whatever the seed."""

    def __init__(
        self,
        config: PeftConfig,
        family: str = "bert",
        head: Head = "cls",
        rate: float = 5e-3,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.family, self.head, self.rate, self.checkpointing = config, family, head, rate, checkpointing
        self.losses: list[float] = []

    def configure_model(self) -> None:
        if "model" in self._modules:
            return
        base = BASES[self.family].build(head=self.head)
        if self.checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        self.model = get_peft_model(base, self.config)
        if isinstance(self.config, FusedLoraConfig):
            fuse(self.model)
        self.train()

    def on_fit_start(self) -> None:
        self.train()

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        self.log("val/loss", self.model(**batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.rate)

    @property
    def learned(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}


class Both(L.LightningDataModule):
    """The same rows to train and to validate on."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        super().__init__()
        self.loader = loader

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.loader.dataset, batch_size=self.loader.batch_size)


def rows(
    family: str = "bert", head: Head = "cls", count: int = 12, length: int = 11, seed: int = 0
) -> list[dict[str, Tensor]]:
    if BASES[family].kind in ("image", "seq2seq"):
        batch = BASES[family].inputs(count, seed=seed, head=head)
        return [{name: value[i] for name, value in batch.items()} for i in range(count)]
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (count, length), generator=rng)
    labels = ids.clone() if head == "lm" else torch.randint(LABELS, (count,), generator=rng)
    mask = torch.ones(length, dtype=torch.long)
    return [{"input_ids": ids[i], "attention_mask": mask, "labels": labels[i]} for i in range(count)]


def run(
    folder: Path, learner: Learner, data: list[dict[str, Tensor]], *, batch: int = 3, seed: int = 0, epochs: int = 1,
    callbacks: tuple[Callback, ...] = (), validates: bool = False, ckpt_path: str | None = None, shuffle: bool = True,
    **options: Any,
) -> ManyRun:  # fmt: skip
    """A run into `folder`, whose order of rows depends on nothing but its seed."""
    order = torch.Generator().manual_seed(seed)
    loaders = DataLoader(data, batch_size=batch, shuffle=shuffle, generator=order)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=CSVLogger(folder, name="logs", version=""),
        log_every_n_steps=1,
        callbacks=[AdapterCheckpoint(), ModelCheckpoint(folder / "checkpoints", save_last=True), *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=None if validates else 0,
        default_root_dir=folder,
        **options,
    )
    return ManyRun(learner, Both(loaders) if validates else loaders, trainer, seed=seed, ckpt_path=ckpt_path)


def alone(one: ManyRun) -> Learner:
    """Train a run by Lightning alone, as the user would."""
    one([])
    assert isinstance(one.task, Learner)
    return one.task


def lora(**fields: Any) -> FusedLoraConfig:
    return FusedLoraConfig(**{"r": 4, "init_lora_weights": True, "task_type": "SEQ_CLS", **fields})


def bilora(**fields: Any) -> BiLoraConfig:
    return BiLoraConfig(**{"r": 4, "task_type": "SEQ_CLS", **fields})
