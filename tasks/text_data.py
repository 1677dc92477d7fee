"""What the data modules of all text tasks share: splits, validation rows set aside, tokenizer, loaders."""

import copy
from abc import abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal

import lightning as L
import numpy as np
from datasets import Dataset
from lightning.pytorch.utilities import rank_zero_warn
from sklearn.model_selection import train_test_split
from transformers import PreTrainedTokenizerBase

from petune.tasks.batches import RowFormat, TableRows, Tokenize, row_length, stream_rows
from petune.tasks.checks import text_lengths
from petune.tasks.loaders import (
    BatchSource,
    Collate,
    Order,
    ResumableLoader,
    StreamBatches,
    TableBatches,
    lightning_reads_ahead,
)
from petune.tasks.models import load_tokenizer
from petune.tasks.sources import DataError, Source, existing, read_dataset, read_file

SplitName = Literal["train", "validation", "test", "predict"]
STAGES: dict[str, tuple[SplitName, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("predict",),
}


@dataclass(frozen=True)
class Split:
    """Checked rows of one split.

    Args:
        source: where they come from.
        format: what a row is made of.
        numbers: which rows of the table, [rows]; None for a stream.
        lengths: characters of each row of the table, [all rows]; None for a stream.
        label_ids: label id of each row of the table, [all rows]; None for a stream and without labels.
    """

    source: Source
    format: RowFormat
    numbers: np.ndarray | None = None
    lengths: np.ndarray | None = None
    label_ids: np.ndarray | None = None


class TextData(L.LightningDataModule):
    """What both data modules share: where rows come from, how they are tokenized, batched and put in order.

    A subclass says what a row is made of (`row_format`) and what a batch looks like (`collate`).
    """

    def __init__(
        self,
        tokenizer: str | PreTrainedTokenizerBase,
        train_file: str | None,
        validation_file: str | None,
        test_file: str | None,
        predict_file: str | None,
        dataset: str | dict[str, Any] | None,
        dataset_config: str | None,
        max_length: int,
        batch_size: int,
        validation_split: float,
        bucketing: bool,
        streaming: bool,
        shuffle_buffer: int,
        num_workers: int,
        seed: int,
    ):
        super().__init__()
        if not 0 <= validation_split < 1:
            raise ValueError(f"validation_split={validation_split} is no share of the rows; use 0 up to below 1.")
        if max_length < 1:
            raise ValueError(f"max_length={max_length} leaves no token of a text; use 1 or more.")
        if num_workers < 0:
            raise ValueError(f"num_workers={num_workers} is negative; use 0 to read in the main process.")
        self.tokenizer = tokenizer
        self.files: dict[SplitName, str | None] = {
            "train": train_file,
            "validation": validation_file,
            "test": test_file,
            "predict": predict_file,
        }
        for split, file in self.files.items():
            if file is not None:
                existing(file, f"{split}_file")
        self.dataset, self.dataset_config = dataset, dataset_config
        self.max_length, self.validation_split, self.num_workers = max_length, validation_split, num_workers
        self.streaming, self.shuffle_buffer = streaming, shuffle_buffer
        self._order = Order(batch_size, bucketing=bucketing, seed=seed)
        self._sources: dict[SplitName, Source | None] = {}
        self._splits: dict[SplitName, Split] = {}

    @abstractmethod
    def row_format(self, source: Source, split: SplitName) -> RowFormat:
        """What a row of this split is made of; its columns are checked."""

    @abstractmethod
    def collate(self, with_rows: bool) -> Collate:
        """Makes a batch of a list of rows."""

    # ------------------------------------------------------------------------------------------------------ reading

    def source(self, split: SplitName) -> Source | None:
        """Rows of a split as they were given; None when there are none. Read once."""
        if split not in self._sources:
            file = self.files[split]
            if file is not None:
                found = read_file(file, asked=f"{split}_file", split=split, streaming=self.streaming)
            elif self.dataset is not None:
                found = read_dataset(self.dataset, split, config=self.dataset_config, streaming=self.streaming)
            else:
                found = None
            self._sources[split] = found
        return self._sources[split]

    def setup(self, stage: str | None = None) -> None:
        """Read and check the splits of a stage.

        Raises:
            DataError: there are no rows for the stage, or a bad one.
        """
        for split in STAGES["fit" if stage is None else stage]:
            if split != "validation" or stage == "validate" or self._has_validation():
                self._checked(split)

    def _has_validation(self) -> bool:
        if self.source("validation") is not None:
            return True
        train = self.source("train")
        if train is None or not self.validation_split:
            return False
        if not isinstance(train.rows, Dataset):
            rank_zero_warn("Nothing is validated: a stream cannot be split; give validation_file for it.")
        return isinstance(train.rows, Dataset)

    def _checked(self, split: SplitName) -> Split:
        if split not in self._splits:
            source = self.source(split)
            if source is not None:
                self._splits[split] = self._check(source, split)
            elif split == "validation" and self._has_validation():
                self._checked("train")
            if split == "train" and self.source("validation") is None:
                self._set_aside()
            if split not in self._splits:
                ways = " or validation_split" if split == "validation" else ""
                raise DataError(f"No {split} rows were given; give {split}_file, dataset with a split {split}{ways}.")
        return self._splits[split]

    def _check(self, source: Source, split: SplitName) -> Split:
        format = self.row_format(source, split)
        if not isinstance(source.rows, Dataset):
            return Split(source, format)
        lengths = [text_lengths(source, column) for column in format.texts.values()]
        label_ids = None
        if format.labels is not None and format.label_column is not None:
            label_ids = format.labels.ids(source, format.label_column)
        return Split(source, format, np.arange(len(source.rows)), np.sum(lengths, axis=0), label_ids)

    def _set_aside(self) -> None:
        """Move `validation_split` of the training rows to validation, the labels in equal shares where they allow."""
        train = self._splits.get("train")
        if train is None or train.numbers is None or not self.validation_split:
            return
        count = len(train.numbers)
        aside = int(np.ceil(count * self.validation_split))
        if aside >= count:
            raise DataError(
                f"validation_split={self.validation_split} takes {aside} of the {count} rows of {train.source.name} "
                f"and leaves none to train on; use a smaller one or 0."
            )
        counts = np.unique(train.label_ids, return_counts=True)[1] if train.label_ids is not None else np.array([0])
        fair = counts.min() > 1 and min(aside, count - aside) >= len(counts)
        parts: Any = train_test_split(
            train.numbers,
            test_size=aside,
            random_state=self._order.seed,
            stratify=train.label_ids if fair else None,
        )
        self._splits["train"] = replace(train, numbers=np.sort(parts[0]))
        self._splits["validation"] = replace(train, numbers=np.sort(parts[1]))

    # ------------------------------------------------------------------------------------------------------ loading

    @cached_property
    def _tokenize(self) -> Tokenize:
        tokenizer = self.tokenizer
        if isinstance(tokenizer, str):
            tokenizer = load_tokenizer(tokenizer)
        if tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise ValueError("The tokenizer has neither a padding nor an end token; set tokenizer.pad_token.")
            tokenizer = copy.deepcopy(tokenizer)  # the caller's own stays as it is
            tokenizer.pad_token = tokenizer.eos_token
        if self.max_length > tokenizer.model_max_length:
            raise ValueError(
                f"max_length={self.max_length} is more than the {tokenizer.model_max_length} tokens that "
                f"{tokenizer.name_or_path or 'the tokenizer'} is made for; use that or less."
            )
        return Tokenize(tokenizer, self.max_length)

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled batches, in the order of (seed, epoch)."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> ResumableLoader | list[Any]:
        """Batches with `row`, always in the same order; none when there is nothing to validate on."""
        return self._loader("validation") if self._has_validation() else []

    def test_dataloader(self) -> ResumableLoader:
        """Batches with `row`, always in the same order."""
        return self._loader("test")

    def predict_dataloader(self) -> ResumableLoader:
        """Batches with `row`, each row once, without labels."""
        return self._loader("predict")

    def _loader(self, name: SplitName, shuffle: bool = False) -> ResumableLoader:
        split = self._checked(name)
        trainer = self.trainer
        shard: dict[str, Any] = (trainer and trainer.distributed_sampler_kwargs) or {"num_replicas": 1, "rank": 0}
        order = replace(
            self._order,
            shuffle=shuffle and not getattr(trainer, "overfit_batches", 0),  # the same batches again and again
            rank=shard["rank"],
            world_size=shard["num_replicas"],
            even=name != "predict",
        )
        read_ahead = None
        if split.numbers is None or split.lengths is None:
            rows = stream_rows(split.source, split.format)
            batches: BatchSource = StreamBatches(rows, row_length, order, self.shuffle_buffer)
            if shuffle and trainer is not None:
                read_ahead = partial(lightning_reads_ahead, trainer)
        else:
            rows = TableRows(split.source, split.format, split.numbers, split.label_ids)
            batches = TableBatches(rows, split.lengths[split.numbers], order)
        loader = ResumableLoader(
            batches,
            self.collate(with_rows=not shuffle),
            num_workers=self.num_workers,
            pin_memory=trainer is not None and trainer.strategy.root_device.type == "cuda",
            read_ahead=read_ahead,
        )
        if shuffle and trainer is not None:  # Lightning reads a stream ahead before it names the epoch
            progress: Any = trainer.fit_loop.epoch_progress.current
            loader.set_epoch(progress.processed)
        return loader
