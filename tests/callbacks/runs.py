"""A tiny run whose every part is known, for the tests of the callbacks; also a script to be killed."""

import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from peft import LoraConfig, PeftConfig, get_peft_model
from torch.utils.data import DataLoader, Sampler, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

from petune.callbacks import AdapterCheckpoint

VOCABULARY, LENGTH, BATCH = 97, 10, 16


def bert(hidden_size: int = 32, seed: int = 123) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


def lora(**options: Any) -> LoraConfig:
    fields = {"task_type": "SEQ_CLS", "r": 4, "target_modules": ["query", "value"], "lora_dropout": 0.1}
    return LoraConfig(**{**fields, **options})


class Module(L.LightningModule):
    def __init__(self, config: PeftConfig | None = None, base: Any = None, compiled: bool = False) -> None:
        super().__init__()
        self.model = get_peft_model(base or bert(), config or lora())
        if compiled:
            self.model = torch.compile(self.model, backend="eager")
        self.losses: list[float] = []

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = self.model(input_ids=batch[0], labels=batch[1]).loss
        self.losses.append(loss.item())
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", self.model(input_ids=batch[0], labels=batch[1]).loss)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}


def dataset(rows: int = 96) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, VOCABULARY, (rows, LENGTH), generator=generator)
    return TensorDataset(x, x[:, 0] % 3)


class _Order(Sampler[int]):
    def __init__(self, rows: int, seed: int) -> None:
        self.rows, self.seed, self.epoch = rows, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(1000 * self.seed + self.epoch)
        return iter(torch.randperm(self.rows, generator=generator).tolist())


class ResumableLoader(DataLoader):
    """Its order is a function of seed and epoch; its state is the number of batches already given out."""

    def __init__(self, data: TensorDataset, seed: int = 0) -> None:
        self.__dict__["_skip"] = self.__dict__["_seen"] = self.__dict__["_epoch"] = 0
        # a generator of its own: DataLoader draws a seed from the global one otherwise
        super().__init__(data, BATCH, sampler=_Order(len(data), seed), generator=torch.Generator().manual_seed(seed))

    def __iter__(self) -> Any:
        # Saved after the last batch of an epoch, it is asked for that epoch's iterator, but for no batch of it.
        skip = self.__dict__["_skip"] if self.sampler.epoch == self.__dict__["_epoch"] else 0
        for index, batch in enumerate(super().__iter__()):
            if index >= skip:
                self.__dict__["_seen"] = index + 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.__dict__["_seen"], "epoch": self.sampler.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.__dict__["_skip"], self.__dict__["_epoch"] = state["seen"], state["epoch"]
        self.sampler.set_epoch(state["epoch"])


def trainer(*callbacks: Callback, epochs: int = 3, **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    saves = any(isinstance(one, ModelCheckpoint) for one in callbacks)
    fields = {"max_epochs": epochs, "callbacks": list(callbacks), "enable_checkpointing": saves, **quiet, **options}
    return L.Trainer(**fields)


def fit(
    folder: Path, *, every_steps: int | None = None, resume: Path | None = None, loader: Any = None, **options: Any
) -> Module:
    """One run of three epochs of six steps with AdapterCheckpoint; checkpoints step=N.ckpt in `folder`."""
    L.seed_everything(7, verbose=False)
    module = options.pop("module", None) or Module()
    timing = {"every_n_train_steps": every_steps} if every_steps else {"every_n_epochs": 1}
    saver = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, save_last=True, **timing)
    loader = loader or (ResumableLoader(dataset()) if every_steps else DataLoader(dataset(), BATCH, shuffle=True))
    run = trainer(AdapterCheckpoint(), saver, *options.pop("callbacks", ()), **options)
    run.fit(module, loader, ckpt_path=resume)
    return module


class _Announce(Callback):
    """Tell the test that watches how far the run is, and wait to be killed in the middle of the second epoch."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 9:
            print("ready", flush=True)
            sys.stdin.read()  # blocks until SIGKILL


if __name__ == "__main__":
    torch.set_num_threads(1)
    fit(Path(sys.argv[1]), every_steps=2, callbacks=[_Announce()])
