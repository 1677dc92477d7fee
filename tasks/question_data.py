"""Questions on contexts with the answers in them: LightningDataModule over files, folders, the hub and Python."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from petune.tasks.batches import RowFormat
from petune.tasks.checks import check_columns, raw_rows
from petune.tasks.loaders import Collate
from petune.tasks.question_batches import QuestionBatch, QuestionFormat, Windows
from petune.tasks.sources import Source
from petune.tasks.text_data import Split, SplitName, TextData
from petune.tasks.token_batches import check_fast

_CHUNK_ROWS = 1000


@dataclass(frozen=True)
class _QuestionSplit(Split):
    windows: np.ndarray | None = None
    """Windows of each row of the table, [all rows]; None for a stream."""


class QuestionAnsweringData(TextData):
    """Questions, each with a context and the answers that stand in it.

    A question and its context that are longer than max_length become several windows, which share `stride` tokens of
    the context; a window that does not hold the first answer whole has the [CLS] token for an answer, and so has a
    question without answers.

    Batches hold input_ids, attention_mask, … [windows, tokens], start_positions and end_positions [windows]; those of
    validation, test and prediction also what `QuestionBatch` tells.

    Args:
        tokenizer: hub name or local path of the model whose tokenizer to use; in Python also the tokenizer itself.
        train_file: .jsonl, .json, .parquet, .csv or .tsv file, or folder made by save_to_disk.
        validation_file: the same, to validate on.
        test_file: the same, to test on.
        predict_file: the same, to predict; needs no answers.
        dataset: hub name or local folder; in Python also a dict from train, validation, test and predict to a list of
            dicts, a dict of lists or a datasets.Dataset. A file given for a split goes before it.
        dataset_config: configuration of a hub dataset that has several.
        question_column: column of the question.
        context_column: column of the text that holds the answer.
        answers_column: column of the answers, {"text": […], "answer_start": […]} as SQuAD has them, empty lists for no
            answer; or of one answer's text, empty for none.
        start_column: column of the first character of the one answer, from 0; None where answers_column has it, or
            where the text is in the context once.
        max_length: tokens of a window, question and special tokens included.
        stride: tokens of the context that neighbouring windows share.
        batch_size: windows a batch, on each device.
        validation_split: share of the training rows to validate on when no others are given, 0..1; not for streams.
        bucketing: put questions of similar length into a batch, so that little is padded.
        streaming: read rows as they are needed, for data larger than the disk cache may get.
        shuffle_buffer: windows a stream is shuffled within.
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
        question_column: str = "question",
        context_column: str = "context",
        answers_column: str = "answers",
        start_column: str | None = None,
        max_length: int = 384,
        stride: int = 128,
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
        if not 0 <= stride < max_length:
            raise ValueError(f"stride={stride} is no part of max_length={max_length}; use 0 up to below it.")
        self.columns = {"question": question_column, "context": context_column, "answers": answers_column}
        if start_column is not None:
            self.columns["start"] = start_column
        self.stride = stride
        self._cut: dict[SplitName, Split] = {}

    def row_format(self, source: Source, split: SplitName) -> RowFormat:
        """A question, its context, and, but in prediction, its answers."""
        roles = ("question", "context") if split == "predict" else tuple(self.columns)
        texts = {role: self.columns[role] for role in roles}
        asked = {f"{role}_column": column for role, column in texts.items()}
        check_columns(source, asked, self._sources.get("train"))
        return QuestionFormat(texts, windows=self._windows)

    def collate(self, with_rows: bool) -> Collate:
        """See `QuestionBatch`."""
        return QuestionBatch(self._windows, with_rows)

    @cached_property
    def _windows(self) -> Windows:
        tokenizer = self._tokenize.tokenizer
        check_fast(tokenizer)
        return Windows(tokenizer, self.max_length, self.stride)

    def _check(self, source: Source, split: SplitName) -> Split:
        format = self.row_format(source, split)
        assert isinstance(format, QuestionFormat)
        if not isinstance(source.rows, Dataset):
            return Split(source, format)
        lengths: list[int] = []
        windows = np.ones(len(source.rows), np.int64)
        long: dict[int, tuple[str, str]] = {}
        for number, raw in enumerate(raw_rows(source, format.texts.values())):
            pair = format.check(source, raw, number)
            lengths.append(sum(map(len, pair)))
            if not self._windows.is_one(*pair):
                long[number] = pair
            if len(long) == _CHUNK_ROWS or (long and number + 1 == len(windows)):
                windows[list(long)] = self._windows.counts(long, source)
                long = {}
        return _QuestionSplit(source, format, np.arange(len(windows)), np.array(lengths), windows=windows)

    def _checked(self, split: SplitName) -> Split:
        checked = super()._checked(split)  # of rows, so that no row is both trained and validated on
        if not isinstance(checked, _QuestionSplit) or checked.numbers is None or checked.windows is None:
            return checked
        if split not in self._cut:
            self._cut[split] = replace(checked, numbers=np.repeat(checked.numbers, checked.windows[checked.numbers]))
        return self._cut[split]
