"""Texts for the tasks: LightningDataModules over files, folders, the hub and Python objects."""

from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from petune.tasks.batches import ClassificationBatch, PairBatch, RowFormat
from petune.tasks.checks import Labels, check_columns, read_labels
from petune.tasks.loaders import Collate
from petune.tasks.sources import DataError, Source
from petune.tasks.text_data import SplitName, TextData


class TextClassificationData(TextData):
    """Texts, or pairs of texts, with a label each.

    Batches hold input_ids, attention_mask, …, labels; those of validation, test and prediction also `row`, the number
    of each row in its file from 0. Labels may be strings, integers or booleans.

    Args:
        tokenizer: hub name or local path of the model whose tokenizer to use; in Python also the tokenizer itself.
        train_file: .csv, .tsv, .jsonl, .json or .parquet file, or folder made by save_to_disk.
        validation_file: the same, to validate on.
        test_file: the same, to test on.
        predict_file: the same, to predict; needs no labels.
        dataset: hub name or local folder; in Python also a dict from train, validation, test and predict to a list of
            dicts, a dict of lists or a datasets.Dataset. A file given for a split goes before it.
        dataset_config: configuration of a hub dataset that has several.
        text_column: column of the text.
        text_pair_column: column of a second text, for tasks on pairs.
        label_column: column of the label.
        labels: label names in the order of their ids; otherwise read from the training rows. A stream needs them.
        max_length: tokens kept of a text, special tokens included.
        batch_size: rows a batch, on each device.
        validation_split: share of the training rows to validate on when no others are given, 0..1; not for streams.
        bucketing: put texts of similar length into a batch, so that little is padded.
        streaming: read rows as they are needed, for data larger than the disk cache may get.
        shuffle_buffer: rows a stream is shuffled within.
        num_workers: processes that read and tokenize beside the training; a stream uses one at most.
        seed: of the order of the rows and of the validation split.
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
        text_column: str = "text",
        text_pair_column: str | None = None,
        label_column: str = "label",
        labels: list[str] | None = None,
        max_length: int = 256,
        batch_size: int = 16,
        validation_split: float = 0.1,
        bucketing: bool = True,
        streaming: bool = False,
        shuffle_buffer: int = 10_000,
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__(
            tokenizer=tokenizer,
            train_file=train_file,
            validation_file=validation_file,
            test_file=test_file,
            predict_file=predict_file,
            dataset=dataset,
            dataset_config=dataset_config,
            max_length=max_length,
            batch_size=batch_size,
            validation_split=validation_split,
            bucketing=bucketing,
            streaming=streaming,
            shuffle_buffer=shuffle_buffer,
            num_workers=num_workers,
            seed=seed,
        )
        self.text_column, self.text_pair_column, self.label_column = text_column, text_pair_column, label_column
        self._given_labels = labels

    @property
    def labels(self) -> list[str]:
        """Label names in the order of their ids; read from the training rows when they were not given.

        Raises:
            DataError: there are no training rows to read them from.
        """
        return list(self._labels.names)

    @property
    def num_labels(self) -> int:
        """Number of labels."""
        return len(self._labels.names)

    @cached_property
    def _labels(self) -> Labels:
        if self._given_labels is not None:
            return Labels(self._given_labels, given=True)
        source = self.source("train")
        if source is None:
            raise DataError("Labels are read from the training rows and none were given; give train_file or labels.")
        check_columns(source, {"label_column": self.label_column})
        return read_labels(source, self.label_column)

    def row_format(self, source: Source, split: SplitName) -> RowFormat:
        """A text, its pair where asked for, and, but in prediction, its label."""
        texts, asked = {"text": self.text_column}, {"text_column": self.text_column}
        if self.text_pair_column is not None:
            texts["text_pair"] = asked["text_pair_column"] = self.text_pair_column
        if split == "predict":
            check_columns(source, asked, self._sources.get("train"))
            return RowFormat(texts)
        check_columns(source, {**asked, "label_column": self.label_column}, self._sources.get("train"))
        return RowFormat(texts, self.label_column, self._labels)

    def collate(self, with_rows: bool) -> Collate:
        """See `ClassificationBatch`."""
        return ClassificationBatch(self._tokenize, with_rows)


class TextPairData(TextData):
    """Queries with the document that answers each.

    Batches are {"query": {input_ids, …}, "document": {input_ids, …}}; those of validation, test and prediction also
    have `row`, the number of each row in its file from 0. Rows to predict may have only one of the two columns.

    Args:
        tokenizer: hub name or local path of the model whose tokenizer to use; in Python also the tokenizer itself.
        train_file: .csv, .tsv, .jsonl, .json or .parquet file, or folder made by save_to_disk.
        validation_file: the same, to validate on.
        test_file: the same, to test on.
        predict_file: the same, to embed.
        dataset: hub name or local folder; in Python also a dict from train, validation, test and predict to a list of
            dicts, a dict of lists or a datasets.Dataset. A file given for a split goes before it.
        dataset_config: configuration of a hub dataset that has several.
        query_column: column of the query.
        document_column: column of the document.
        max_length: tokens kept of a text, special tokens included.
        batch_size: pairs a batch, on each device; each query's negatives are the other documents of its batch.
        validation_split: share of the training rows to validate on when no others are given, 0..1; not for streams.
        bucketing: put pairs of similar length into a batch, so that little is padded.
        streaming: read rows as they are needed, for data larger than the disk cache may get.
        shuffle_buffer: rows a stream is shuffled within.
        num_workers: processes that read and tokenize beside the training; a stream uses one at most.
        seed: of the order of the rows and of the validation split.
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
        query_column: str = "query",
        document_column: str = "document",
        max_length: int = 256,
        batch_size: int = 32,
        validation_split: float = 0.1,
        bucketing: bool = True,
        streaming: bool = False,
        shuffle_buffer: int = 10_000,
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__(
            tokenizer=tokenizer,
            train_file=train_file,
            validation_file=validation_file,
            test_file=test_file,
            predict_file=predict_file,
            dataset=dataset,
            dataset_config=dataset_config,
            max_length=max_length,
            batch_size=batch_size,
            validation_split=validation_split,
            bucketing=bucketing,
            streaming=streaming,
            shuffle_buffer=shuffle_buffer,
            num_workers=num_workers,
            seed=seed,
        )
        self.query_column, self.document_column = query_column, document_column

    def row_format(self, source: Source, split: SplitName) -> RowFormat:
        """A query and a document; in prediction those of them that are there."""
        texts = {"query": self.query_column, "document": self.document_column}
        if split == "predict":
            present = source.columns
            some = {role: column for role, column in texts.items() if column in present}
            texts = some or texts
        asked = {f"{role}_column": column for role, column in texts.items()}
        check_columns(source, asked, self._sources.get("train"))
        return RowFormat(texts)

    def collate(self, with_rows: bool) -> Collate:
        """See `PairBatch`."""
        return PairBatch(self._tokenize, with_rows)
