"""Pairs of a source and a target text for the sequence-to-sequence task."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from petune.tasks.batches import RowFormat, Tokenize
from petune.tasks.checks import check_columns
from petune.tasks.loaders import Collate, Row
from petune.tasks.sources import Source
from petune.tasks.text_data import SplitName, TextData

IGNORED = -100
"""In labels: a position that is padding."""


@dataclass(frozen=True)
class Seq2SeqBatch:
    """input_ids, attention_mask, … [batch, source tokens], and where rows have a target labels [batch, target tokens].

    Args:
        tokenize: makes tensors of sources.
        max_target_length: tokens kept of a target, special tokens included.
        prefix: put before each source.
        with_rows: add the number of each row, and the targets as texts, whole, in `references`.
    """

    tokenize: Tokenize
    max_target_length: int
    prefix: str
    with_rows: bool

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        batch: dict[str, Any] = self.tokenize([self.prefix + row["source"] for row in rows])
        if "target" in rows[0]:
            targets = [row["target"] for row in rows]
            tokens = self.tokenize.tokenizer(
                text_target=targets,
                truncation=True,
                max_length=self.max_target_length,
                padding=True,
                return_attention_mask=True,
                return_tensors="pt",
            )
            batch["labels"] = tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, IGNORED)
            if self.with_rows:
                batch["references"] = targets
        return {**batch, "row": torch.tensor([row["row"] for row in rows])} if self.with_rows else batch


class Seq2SeqData(TextData):
    """Source texts with the target text to be written for each.

    Batches hold input_ids, attention_mask, …, labels, with -100 for padding; those of validation, test and prediction
    also `row`, the number of each row in its file from 0, and those of validation and test `references`, the targets
    as texts. Texts beyond their maximal length are cut.

    Args:
        tokenizer: hub name or local path of the model whose tokenizer to use; in Python also the tokenizer itself.
        train_file: .csv, .tsv, .jsonl, .json or .parquet file, or folder made by save_to_disk.
        validation_file: the same, to validate on.
        test_file: the same, to test on.
        predict_file: the same, to predict; needs no targets.
        dataset: hub name or local folder; in Python also a dict from train, validation, test and predict to a list of
            dicts, a dict of lists or a datasets.Dataset. A file given for a split goes before it.
        dataset_config: configuration of a hub dataset that has several.
        source_column: column of the source.
        target_column: column of the target.
        prefix: put before each source, as T5 was pretrained with, such as "summarize: ".
        max_source_length: tokens kept of a source with its prefix, special tokens included.
        max_target_length: tokens kept of a target to train on, special tokens included.
        batch_size: rows a batch, on each device.
        validation_split: share of the training rows to validate on when no others are given, 0..1; not for streams.
        bucketing: put texts of similar length into a batch, so that little is padded.
        streaming: read rows as they are needed, for data larger than the disk cache may get.
        shuffle_buffer: rows a stream is shuffled within.
        num_workers: processes that read and tokenize beside the training; a stream uses one at most.
        seed: of the order of the rows and of the validation split.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        tokenizer: str | PreTrainedTokenizerBase,
        train_file: str | None = None,
        validation_file: str | None = None,
        test_file: str | None = None,
        predict_file: str | None = None,
        dataset: str | dict[str, Any] | None = None,
        dataset_config: str | None = None,
        source_column: str = "source",
        target_column: str = "target",
        prefix: str = "",
        max_source_length: int = 512,
        max_target_length: int = 128,
        batch_size: int = 8,
        validation_split: float = 0.1,
        bucketing: bool = True,
        streaming: bool = False,
        shuffle_buffer: int = 10_000,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        for name, length in (("max_source_length", max_source_length), ("max_target_length", max_target_length)):
            if length < 1:
                raise ValueError(f"{name}={length} leaves no token of a text; use 1 or more.")
        super().__init__(
            tokenizer=tokenizer,
            train_file=train_file,
            validation_file=validation_file,
            test_file=test_file,
            predict_file=predict_file,
            dataset=dataset,
            dataset_config=dataset_config,
            max_length=max_source_length,
            batch_size=batch_size,
            validation_split=validation_split,
            bucketing=bucketing,
            streaming=streaming,
            shuffle_buffer=shuffle_buffer,
            num_workers=num_workers,
            seed=seed,
        )
        self.source_column, self.target_column, self.prefix = source_column, target_column, prefix
        self.max_source_length, self.max_target_length = max_source_length, max_target_length

    def row_format(self, source: Source, split: SplitName) -> RowFormat:
        """A source and, but in prediction, a target."""
        texts = {"source": self.source_column}
        if split != "predict":
            texts["target"] = self.target_column
        asked = {f"{role}_column": column for role, column in texts.items()}
        check_columns(source, asked, self._sources.get("train"))
        return RowFormat(texts)

    def collate(self, with_rows: bool) -> Collate:
        """See `Seq2SeqBatch`."""
        return Seq2SeqBatch(self._tokenize, self.max_target_length, self.prefix, with_rows)

    @cached_property
    def _tokenize(self) -> Tokenize:
        try:
            return super()._tokenize
        except ValueError as error:  # of the base class, which knows one length
            raise ValueError(str(error).replace("max_length=", "max_source_length=", 1)) from error
