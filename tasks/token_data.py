"""Sentences with a tag for every word: LightningDataModule over files, folders, the hub and Python objects."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from petune.tasks.batches import RowFormat, Tokenize
from petune.tasks.checks import check_columns, raw_rows
from petune.tasks.conll import SUFFIX, read_conll
from petune.tasks.loaders import Collate
from petune.tasks.sources import DataError, Source
from petune.tasks.text_data import Split, SplitName, TextData
from petune.tasks.token_batches import IGNORED, TokenBatch, TokenFormat, check_fast, cut_words, tags_in

_CHUNK_ROWS = 1000


class TokenClassificationData(TextData):
    """Sentences of words, each word with a tag.

    Words are a list or a text that is split at white space; tags are names or integers, a list or a text likewise. A
    .conll file has a word and its tag a line and a blank line after each sentence. A word's first token carries its
    tag, and a word of no token has none.

    Batches hold input_ids, attention_mask, …, labels [batch, tokens], with -100 for tokens that do not count; those of
    validation, test and prediction also `row` [batch], the number of each row in its file from 0, `word_ids` [batch,
    tokens], the number of each token's word in its row, -1 for none, and `words`, a list of each row's. A warning
    tells how many words lie beyond max_length; they are neither learned nor measured, and predicted as None.

    Args:
        tokenizer: hub name or local path of the model whose tokenizer to use; in Python also the tokenizer itself.
        train_file: .conll, .jsonl, .json, .parquet, .csv or .tsv file, or folder made by save_to_disk.
        validation_file: the same, to validate on.
        test_file: the same, to test on.
        predict_file: the same, to predict; needs no tags.
        dataset: hub name or local folder; in Python also a dict from train, validation, test and predict to a list of
            dicts, a dict of lists or a datasets.Dataset. A file given for a split goes before it.
        dataset_config: configuration of a hub dataset that has several.
        tokens_column: column of the words.
        label_column: column of the tags.
        labels: tags in the order of their ids; otherwise read from the training rows, O first. A stream needs them.
            Where tags are integers, these are the positions in this list.
        label_all_subwords: every token of a word carries its tag, after B-X the further ones I-X where there is one.
        max_length: tokens kept of a sentence, special tokens included.
        batch_size: rows a batch, on each device.
        validation_split: share of the training rows to validate on when no others are given, 0..1; not for streams.
        bucketing: put sentences of similar length into a batch, so that little is padded.
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
        tokens_column: str = "tokens",
        label_column: str = "tags",
        labels: list[str] | None = None,
        label_all_subwords: bool = False,
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
        self.tokens_column, self.label_column = tokens_column, label_column
        self.label_all_subwords = label_all_subwords
        if labels is not None and (len(labels) < 2 or len(set(labels)) < len(labels)):
            raise ValueError(f"labels={labels} must be two or more different tags.")
        self._given_labels = labels

    @cached_property
    def labels(self) -> list[str]:
        """Tags in the order of their ids; read from the training rows when they were not given.

        Raises:
            DataError: there are no training rows to read them from, or these have fewer than two tags.
        """
        if self._given_labels is not None:
            return list(self._given_labels)
        source = self.source("train")
        if source is None:
            raise DataError("Tags are read from the training rows and none were given; give train_file or labels.")
        check_columns(source, {"label_column": self.label_column})
        known = _class_names(source, self.label_column)
        if known is not None:
            return list(known)
        if not isinstance(source.rows, Dataset):
            raise DataError(
                f"{source.name} is a stream and would be read whole to find its tags; list them in labels."
            )
        found = tags_in(source, raw_rows(source, [self.label_column]), self.label_column, None)
        if len(found) < 2:
            raise DataError(
                f"{source.name}: all words have the tags {sorted(found)}, and two or more are needed; check "
                "label_column."
            )
        return sorted(found, key=_tag_order(found))

    def tag_counts(self) -> np.ndarray:
        """Training words of each tag, [labels], int64; those that are cut off are counted as well.

        Raises:
            DataError: the training rows are a stream.
        """
        split = self._checked("train")
        if split.numbers is None or not isinstance(split.format, TokenFormat):
            raise DataError(f"{split.source.name} is a stream, and its tags are not counted ahead; list the weights.")
        counts, kept = np.zeros(len(self.labels), np.int64), set(split.numbers.tolist())
        for number, raw in enumerate(raw_rows(split.source, [self.label_column])):
            if number in kept:
                ids = [each for each in split.format.ids(raw[self.label_column]) if each != IGNORED]
                counts += np.bincount(ids, minlength=len(counts)).astype(np.int64)
        return counts

    def source(self, split: SplitName) -> Source | None:
        """As `TextData.source`, .conll files as well."""
        file = self.files[split]
        if split not in self._sources and file is not None and Path(file).suffix == SUFFIX:
            self._sources[split] = read_conll(
                file,
                asked=f"{split}_file",
                tokens_column=self.tokens_column,
                label_column=self.label_column,
                streaming=self.streaming,
            )
        return super().source(split)

    def row_format(self, source: Source, split: SplitName) -> RowFormat:
        """Words, and, but in prediction, a tag for each."""
        texts, asked = {"tokens": self.tokens_column}, {"tokens_column": self.tokens_column}
        if split == "predict":
            check_columns(source, asked, self._sources.get("train"))
            return TokenFormat(texts)
        check_columns(source, {**asked, "label_column": self.label_column}, self._sources.get("train"))
        own = _class_names(source, self.label_column)
        if own is not None and own != self.labels:
            raise DataError(
                f"{source.name}: numbers its tags {own}, and the labels are {self.labels}; cast the column, or give "
                "labels in that order."
            )
        return self._format({**texts, "tags": self.label_column})

    def collate(self, with_rows: bool) -> Collate:
        """See `TokenBatch`."""
        tagged = any("tags" in split.format.texts for split in self._splits.values())
        format = self._format({}) if tagged else TokenFormat({})
        inner = _inner_tags(format.names) if self.label_all_subwords else None
        return TokenBatch(self._tokenize, format, inner, with_rows, warn_cut=self.streaming)

    def _format(self, texts: dict[str, str]) -> TokenFormat:
        names, given = tuple(self.labels), self._given_labels is not None
        train = self.source("train")
        typed = train is not None and _class_names(train, self.label_column) is not None
        by_number = typed or (given and not all(map(_is_int, names)))
        return TokenFormat(texts, names=names, numbered=names if by_number else None, given=given)

    def _check(self, source: Source, split: SplitName) -> Split:
        format = self.row_format(source, split)
        assert isinstance(format, TokenFormat)
        if not isinstance(source.rows, Dataset):
            return Split(source, format)
        tokenize = self._tokenize
        added = tokenize.tokenizer.num_special_tokens_to_add()
        lengths: list[int] = []
        long: list[list[str]] = []
        words_seen, cut = 0, np.zeros(0, np.int64)
        for number, raw in enumerate(raw_rows(source, format.texts.values())):
            words, _ = format.check(source, raw, number)
            text = " ".join(words)
            lengths.append(len(text))
            words_seen += len(words)
            if not text.isascii() or len(text) + added > tokenize.max_length:  # a token has one character or more
                long.append(words)
            if len(long) == _CHUNK_ROWS:
                cut, long = np.append(cut, cut_words(tokenize, long)), []
        cut = np.append(cut, cut_words(tokenize, long)) if long else cut
        if cut.any():
            rank_zero_warn(
                f"{source.name}: {cut.sum()} of {words_seen} words, in {np.count_nonzero(cut)} of {len(lengths)} rows,"
                f" lie beyond max_length={tokenize.max_length} tokens and are left out; raise max_length, or split "
                "these rows."
            )
        return Split(source, format, np.arange(len(lengths)), np.array(lengths))

    @cached_property
    def _tokenize(self) -> Tokenize:
        tokenize = super()._tokenize
        check_fast(tokenize.tokenizer)
        return tokenize


def _class_names(source: Source, column: str) -> list[str] | None:
    """The names in the type of a column of tags; None where it has none."""
    feature: Any = (source.rows.features or {}).get(column)
    inner = getattr(feature, "feature", feature)
    return list(inner.names) if isinstance(inner, ClassLabel) else None


def _inner_tags(names: Sequence[str]) -> tuple[int, ...]:
    """For each tag the one of a word's further tokens: I-X after B-X, where there is one."""
    numbers = {name: number for number, name in enumerate(names)}
    return tuple(numbers.get(f"I-{name[2:]}" if name.startswith("B-") else name, numbers[name]) for name in names)


def _tag_order(found: set[str]) -> Any:
    """Integers by size; else O first, then the tags of one kind side by side, B before I."""
    if all(map(_is_int, found)):
        return int
    return lambda name: (name != "O", *reversed(name.split("-", 1)))


def _is_int(name: str) -> bool:
    return name.removeprefix("-").isdecimal()
