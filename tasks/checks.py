"""What a row must be before it is trained on: its columns, its texts, its label."""

from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Value
from torch import Tensor

from petune.tasks.faults import shown
from petune.tasks.sources import DataError, Source

PLAIN_STRINGS = (Value("string"), Value("large_string"))


def check_columns(source: Source, columns: Mapping[str, str], train: Source | None = None) -> None:
    """Every column asked for is there.

    Args:
        source: the rows.
        columns: argument name -> column it asks for, such as {"text_column": "text"}.
        train: the training rows, where they have been read.

    Raises:
        DataError: the message lists the columns there are, and the closest; or says that the training rows have it.
    """
    present = source.columns
    for argument, column in columns.items():
        if column not in present:
            close = get_close_matches(column, present, n=1, cutoff=0.5)
            if train is not None and train is not source and column in train.columns:
                hint = f"give it the columns of {train.name}."
            else:
                hint = f"did you mean {argument}={close[0]}?" if close else f"set {argument} to one of them."
            raise DataError(
                f"{argument}={column} is no column of {source.name}, which has {', '.join(present)}; {hint}"
            )


def check_text(source: Source, column: str, value: Any, row: int) -> str:
    """The text of one row, counted from 0.

    Raises:
        DataError: it is missing, empty or no string; the message names the line.
    """
    if value is None:
        problem = f"{column!r} is missing or null"
    elif not isinstance(value, str):
        problem = f"{column!r} is {shown(value)}, not a string"
    elif not value.strip():
        problem = f"{column!r} is empty"
    else:
        return value
    raise DataError(f"{source.where(row)}: {problem}; give it a text or leave the row out.")


def text_lengths(source: Source, column: str) -> np.ndarray:
    """Characters of each text of a table, [rows]; every row is checked.

    Raises:
        DataError: a text is missing, empty or no string; the message names the line.
    """
    assert isinstance(source.rows, Dataset)
    rows = source.rows.select_columns([column])
    if rows.features[column] not in PLAIN_STRINGS:
        return np.array([len(check_text(source, column, value, i)) for i, value in enumerate(_values(source, column))])
    lengths: list[np.ndarray] = []
    done = 0
    with source.reading():
        for table in rows.with_format("arrow").iter(10_000):
            values = table.column(column)  # type: ignore[union-attr]
            filled = pc.not_equal(pc.utf8_trim_whitespace(values), "").fill_null(False)  # type: ignore[attr-defined]
            for i in np.flatnonzero(~filled.to_numpy()):
                check_text(source, column, values[int(i)].as_py(), done + int(i))
            lengths.append(pc.utf8_length(values).to_numpy())  # type: ignore[attr-defined]
            done += len(values)
    return np.concatenate(lengths)


class Labels:
    """The label names of a task, in the order of their ids.

    Args:
        names: label names.
        given: the user listed them; otherwise they were read from the training rows.
    """

    def __init__(self, names: Iterable[str], given: bool):
        self.names, self.given = list(names), given
        if len(set(self.names)) < 2:
            raise DataError(f"Classification needs two labels or more, {self.names} is too few; check label_column.")
        if len(set(self.names)) < len(self.names):
            raise DataError(f"labels={self.names} names a label twice; list each once.")
        self._ids = {name: i for i, name in enumerate(self.names)}

    def id_of(self, source: Source, column: str, value: Any, row: int) -> int:
        """Id of the label of one row, counted from 0.

        Raises:
            DataError: the label is missing, no label, or not among the names; the message names the line.
        """
        name = label_name(source, column, value, row)
        if name not in self._ids:
            origin = "labels=" if self.given else "the labels of the training rows, "
            raise DataError(
                f"{source.where(row)}: label {name!r} is not among {origin}{self.names}; correct it, add training "
                f"rows that have it, or list it in labels."
            )
        return self._ids[name]

    def ids(self, source: Source, column: str) -> np.ndarray:
        """Label ids of a table, [rows]; int64."""
        ids = [self.id_of(source, column, value, row) for row, value in enumerate(_values(source, column))]
        return np.array(ids, dtype=np.int64)


def read_labels(source: Source, column: str) -> Labels:
    """The labels of the column's type, else those that occur in the table, sorted.

    Raises:
        DataError: fewer than two, a bad row, or a stream, which would have to be read whole.
    """
    feature = (source.rows.features or {}).get(column)
    if isinstance(feature, ClassLabel):
        return Labels(feature.names, given=False)
    if not isinstance(source.rows, Dataset):
        raise DataError(f"{source.name} is a stream and would be read whole to find its labels; list them in labels.")
    names = {label_name(source, column, value, row) for row, value in enumerate(_values(source, column))}
    return Labels(sorted(names, key=int if all(_is_int(name) for name in names) else str), given=False)


def label_name(source: Source, column: str, value: Any, row: int) -> str:
    """A label as text: a string as it is, an integer's digits, "true" or "false", a ClassLabel's name.

    Raises:
        DataError: it is missing or of another type; the message names the line.
    """
    feature = (source.rows.features or {}).get(column)
    if isinstance(feature, ClassLabel) and isinstance(value, int):
        value = feature.int2str(value) if value >= 0 else None  # -1 marks an unlabelled row on the hub
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str) and value.strip():
        return value
    problem = "label missing" if value is None or value == "" else f"label {shown(value)}"
    raise DataError(f"{source.where(row)}: {problem} in {column!r}; give a non-empty string, an integer or a boolean.")


def _values(source: Source, column: str) -> Iterator[Any]:
    assert isinstance(source.rows, Dataset)
    with source.reading():
        for batch in source.rows.select_columns([column]).with_format(None).iter(1000):
            yield from batch[column]  # type: ignore[index]


def check_label_ids(labels: Tensor, count: int, task: str, ignored: int | None = None) -> None:
    """Refuse labels of a batch that a task has no output for, before a GPU stops at them without a word.

    Args:
        labels: [batch, ...], int64.
        count: classes of the task.
        task: what to call it.
        ignored: a label that does not count.

    Raises:
        ValueError: names the first one and its row.
    """
    wrong = (labels < 0) | (labels >= count)
    if ignored is not None:
        wrong &= labels != ignored
    if wrong.any():
        row = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"labels hold {int(labels[wrong][0])} and {task} has {count} classes from 0 on, first in row {row} of the "
            "batch, counted from 0; correct the labels, or name all classes in labels."
        )


def raw_rows(source: Source, columns: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The rows of a table as they are, in order, with these columns alone."""
    assert isinstance(source.rows, Dataset)
    names = sorted(set(columns))
    with source.reading():
        for batch in source.rows.select_columns(names).with_format(None).iter(1000):
            for values in zip(*(batch[name] for name in names), strict=True):  # type: ignore[index]
                yield dict(zip(names, values, strict=True))


def _is_int(name: str) -> bool:
    return name.removeprefix("-").isdecimal()
