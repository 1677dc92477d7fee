"""Rows from files, folders, the hub or Python objects, with every fault named by file and line."""

import csv
import urllib.error
import urllib.request
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import huggingface_hub.constants
import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, Value
from datasets.exceptions import DatasetGenerationError
from datasets.io.csv import CsvDatasetReader
from datasets.io.json import JsonDatasetReader
from datasets.io.parquet import ParquetDatasetReader

from petune.tasks.faults import DELIMITERS, JSON_SUFFIXES, filled_rows, find_fault, line_of, shown

FORMATS = "a .csv, .tsv, .jsonl, .json or .parquet file or a folder made by datasets' save_to_disk"
SPLIT_NAMES = {"validation": ("validation", "valid", "val", "dev")}
HUB_TIMEOUT_S = 3.0
"""How long the hub may take to answer at all before only what is on this disk is looked at."""


READ_ERRORS = (DatasetGenerationError, OSError, ValueError, pa.ArrowException)


class DataError(ValueError):
    """The data given cannot be used as asked; the message names the file and, where there is one, the line."""


@dataclass(frozen=True)
class Source:
    """Rows and what to call them in a message.

    Args:
        rows: table or stream.
        name: "train.jsonl", "dataset imdb, split train" or "the train rows".
        path: the file, where there is one.
    """

    rows: Dataset | IterableDataset
    name: str
    path: Path | None = None

    @property
    def columns(self) -> list[str]:
        """Column names."""
        names = self.rows.column_names
        if names is None:  # a stream that says nothing of itself before its first row
            with self.reading():
                names = next(iter(self.rows), {})
        return list(names)

    def where(self, row: int) -> str:
        """ "train.jsonl, line 17": the place of a row, counted from 0, for a message."""
        line = None if self.path is None else line_of(self.path, row)
        return f"{self.name}, row {row + 1}" if line is None else f"{self.name}, line {line}"

    @contextmanager
    def reading(self) -> Generator[None]:
        """Inside, what a reader raises about a broken file ends as a DataError about the line."""
        try:
            yield
        except DataError:
            raise
        except READ_ERRORS as error:
            if "corresponds to no data" in str(error):
                raise DataError(f"{self.name} has no rows; give at least one.") from error
            fault = None if self.path is None else find_fault(self.path)
            if fault is None:
                raise DataError(
                    f"{self.name}: cannot be read ({_first_line(_root(error))}); give {FORMATS}."
                ) from error
            line, problem = fault
            raise DataError(f"{self.name}, line {line}: {problem}.") from error


def existing(path: str | Path, asked: str) -> Path:
    """The path, which is there.

    Raises:
        FileNotFoundError: it is not; the closest names beside it are given.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{asked}={path} does not exist{_closest_files(path)}.")
    return path


def read_file(path: str | Path, *, asked: str, split: str = "train", streaming: bool = False) -> Source:
    """Rows of a CSV, TSV, JSON, JSON lines or Parquet file, or of a folder made by `save_to_disk`.

    CSV cells are read as text, as they stand.

    Args:
        path: file or folder.
        asked: name of the argument that gave the path, for messages.
        split: which split of a folder that holds several.
        streaming: read as the rows are needed, and keep no copy.

    Raises:
        FileNotFoundError: there is no such file; the closest names are given.
        DataError: unknown format, malformed line, no rows.
    """
    path = existing(path, asked)
    if path.is_dir():
        return _read_folder(path, asked, split, streaming)
    if not path.stat().st_size:
        raise DataError(f"{asked}={path} is an empty file; give one with rows.")
    if path.suffix in DELIMITERS:
        delimiter = DELIMITERS[path.suffix]
        features = Features({column: Value("string") for column in _csv_header(path, delimiter)})
        reader = CsvDatasetReader(
            str(path), features=features, streaming=streaming, sep=delimiter, keep_default_na=False
        )
    elif path.suffix in JSON_SUFFIXES:
        reader = JsonDatasetReader(str(path), streaming=streaming)
    elif path.suffix == ".parquet":
        reader = ParquetDatasetReader(str(path), streaming=streaming)
    else:
        raise DataError(f"{asked}={path} is of no known format; give {FORMATS}.")
    with Source(Dataset.from_dict({}), path.name, path).reading():
        return _not_empty(Source(reader.read(), path.name, path))  # type: ignore[arg-type]


def read_dataset(
    dataset: str | Mapping[str, Any], split: str, *, config: str | None = None, streaming: bool = False
) -> Source | None:
    """One split of a hub dataset, of a local path, or of Python objects; None when there is no such split.

    Args:
        dataset: hub name, local path, or a mapping from split to a list of dicts, a dict of lists or a Dataset.
        split: "train", "validation" (or its other spellings), "test" or "predict".
        config: hub configuration, where the dataset has several.
        streaming: read as the rows are needed, and keep no copy.

    Raises:
        ConnectionError: the name is neither a local path nor in the cache, and the hub does not answer.
        DataError: the rows cannot be read.
    """
    if isinstance(dataset, str):
        if Path(dataset).expanduser().is_file():
            return read_file(dataset, asked="dataset", streaming=streaming) if split == "train" else None
        mapping, name = _load_named(dataset, config, streaming), f"dataset {dataset}, split {{}}"
    else:
        mapping, name = dataset, "the {} rows"
    for key in SPLIT_NAMES.get(split, (split,)):
        if key in mapping:
            return _not_empty(read_objects(mapping[key], name.format(key), streaming=streaming))
    return None


def read_objects(rows: Any, name: str, *, streaming: bool = False) -> Source:
    """Rows from a list of dicts, a dict of lists, a Dataset or an IterableDataset.

    Args:
        rows: the objects.
        name: what to call them in messages.
        streaming: give them as a stream.

    Raises:
        DataError: the objects make no table.
    """
    if isinstance(rows, Dataset | IterableDataset):
        table = rows
    elif isinstance(rows, Mapping):
        lengths = {column: len(values) for column, values in rows.items()}
        if len(set(lengths.values())) > 1:
            raise DataError(f"{name}: columns differ in length ({lengths}); give every column one value per row.")
        table = _make_table(dict(rows), name)
    elif isinstance(rows, Sequence) and not isinstance(rows, str):
        for i, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise DataError(f"{name}, row {i + 1}: is {shown(row)}; give a dict from column to value.")
        columns = list(dict.fromkeys(column for row in rows for column in row))
        table = _make_table({column: [row.get(column) for row in rows] for column in columns}, name)
    else:
        raise DataError(f"{name}: are {type(rows).__name__}; give a list of dicts, a dict of lists or a Dataset.")
    if streaming and isinstance(table, Dataset):
        table = table.to_iterable_dataset()
    return Source(table, name)


def _make_table(columns: dict[str, Sequence[Any]], name: str) -> Dataset:
    for column, values in columns.items():
        kinds: dict[type, int] = {}
        for i, value in enumerate(values):
            if value is not None:
                kinds.setdefault(type(value), i)
        if len(kinds) > 1 and any(kind in (str, bool) for kind in kinds):  # Arrow holds one type a column
            (first, a), (second, b) = list(kinds.items())[:2]
            raise DataError(
                f"{name}, row {b + 1}: {column!r} is {shown(values[b])}, but {first.__name__} in row {a + 1}; "
                f"give one type in a column, not {first.__name__} and {second.__name__}."
            )
    try:
        return Dataset.from_dict(columns)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"{name}: make no table ({_first_line(error)}); give one type in a column.") from error


def _read_folder(path: Path, asked: str, split: str, streaming: bool) -> Source:
    try:
        loaded = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise DataError(
            f"{asked}={path} is a folder without a saved dataset; give {FORMATS}{_closest_files(path / split)}."
        ) from error
    if isinstance(loaded, Dataset):
        return _not_empty(read_objects(loaded, path.name, streaming=streaming))
    splits: dict[str, Any] = {str(name): rows for name, rows in loaded.items()}
    source = read_dataset(splits, split, streaming=streaming)
    if source is None:
        raise DataError(f"{asked}={path} has no split {split}, only {', '.join(splits)}; give the path of one split.")
    return Source(source.rows, f"{path.name}, split {split}")


def _load_named(name: str, config: str | None, streaming: bool) -> Mapping[str, Any]:
    if Path(name).expanduser().is_dir():
        loaded = _read_folder_or_splits(Path(name).expanduser())
        return {"train": loaded} if isinstance(loaded, Dataset) else loaded
    with hub_or_cache():
        try:
            return datasets.load_dataset(name, config, streaming=streaming)  # type: ignore[return-value]
        except (ConnectionError, FileNotFoundError) as error:
            raise ConnectionError(
                f"dataset={name} is no path here and was found neither in the local cache "
                f"({datasets.config.HF_DATASETS_CACHE}) nor at {huggingface_hub.constants.ENDPOINT} "
                f"({_first_line(error)}); give dataset=PATH or train_file=PATH of a local copy."
            ) from error


def _read_folder_or_splits(path: Path) -> Any:
    try:
        return datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise DataError(f"dataset={path} is a folder without a saved dataset; give {FORMATS}.") from error


@contextmanager
def hub_or_cache() -> Generator[None]:
    """Ask the hub once whether it answers; when it does not, look only at the local cache inside this context.

    Without it each of the libraries retries for itself, half a minute a name.
    """
    if huggingface_hub.constants.HF_HUB_OFFLINE or _hub_answers():
        yield
        return
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = False


def _hub_answers() -> bool:
    request = urllib.request.Request(huggingface_hub.constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S).close()
    except urllib.error.HTTPError:  # an answer, if not a friendly one
        return True
    except OSError:
        return False
    return True


def _not_empty(source: Source) -> Source:
    if isinstance(source.rows, Dataset) and not len(source.rows):
        raise DataError(f"{source.name} has no rows; give at least one.")
    return source


def _csv_header(path: Path, delimiter: str) -> list[str]:
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = filled_rows(csv.reader(file, delimiter=delimiter))
        header, first = next(reader, []), next(reader, [])
    if len(first) > len(header):  # pandas would take the cells before the last ones for an index
        raise DataError(
            f"{path.name}, line 2: has {len(first)} cells under {len(header)} column names; "
            f"quote cells with delimiters."
        )
    doubled = [column for column in header if header.count(column) > 1]
    if doubled:
        raise DataError(f"{path.name}, line 1: names column {doubled[0]!r} twice; give each column a name of its own.")
    return header


def _closest_files(path: Path) -> str:
    if not path.parent.is_dir():
        return f", and neither does its folder {path.parent}"
    names = sorted(entry.name for entry in path.parent.iterdir())
    close = get_close_matches(path.name, names, n=3, cutoff=0.4) or names[:3]
    return f"; {path.parent} has {', '.join(close)}" if close else f"; {path.parent} is empty"


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
