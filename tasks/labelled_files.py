"""Images or sounds with a label each: from folders of classes, tables of paths and datasets, checked before a run."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from lightning.pytorch.utilities import rank_zero_warn

from petune.tasks.checks import Labels, check_columns, read_labels
from petune.tasks.faults import shown
from petune.tasks.file_data import FileData
from petune.tasks.sources import (
    DataError,
    Source,
    existing,
    hub_or_cache,
    read_dataset,
    read_file,
    read_objects,
)
from petune.tasks.text_data import SplitName

BadFiles = Literal["error", "skip"]

SAVED = ("dataset_info.json", "dataset_dict.json")  # what save_to_disk leaves in its folder


@dataclass(frozen=True)
class LabelledFile:
    """One image or sound.

    Args:
        name: what to call it: its path, or where in which table it stands.
        row: its row in the split, from 0, skipped ones counted.
        label: id of its label; None where it is to be predicted.
        path: its file; None where the table holds its bytes.
    """

    name: str
    row: int
    label: int | None
    path: Path | None


@dataclass(frozen=True)
class Files:
    """Reads the files of a split.

    Args:
        table: rows of the split.
        column: which holds paths, or bytes.
    """

    table: Dataset
    column: str

    def read(self, file: LabelledFile) -> Path | bytes:
        """The path of a file, or what the table holds of it."""
        return file.path or self.table[file.row][self.column]["bytes"]


class LabelledFileData(FileData[LabelledFile]):
    """Files with a label each.

    A subclass names its files' endings (`suffixes`), the type of a column that holds files (`feature`) and the Auto
    class of the models' processors, and decodes the files (`decode`, `rows`).

    Args:
        files: split -> folder of classes, table or folder made by save_to_disk; None where there is none.
        dataset: hub name, local folder or a mapping from split to rows, for the splits without a file.
        dataset_config: configuration of a hub dataset that has several.
        column: column of the path, relative to the table's folder, or of the file's bytes.
        label_column: column of the label.
        labels: label names in the order of their ids; None to read them from the training rows.
        bad_files: what is done about files that do not decode.
        processor: the model's own, or where to load it; None for that of the task's model.
        options: of `FileData`.

    Raises:
        FileNotFoundError: a file or folder is not there.
        ValueError: an argument is out of its range.
    """

    suffixes: ClassVar[frozenset[str]]
    feature: ClassVar[Any]
    auto_processor: ClassVar[Any]
    processor_options: ClassVar[dict[str, Any]] = {}
    column_argument: ClassVar[str]
    without_processor: ClassVar[str]
    """What to do about a model without a processor."""

    def __init__(
        self,
        files: Mapping[SplitName, str | None],
        dataset: str | dict[str, Any] | None,
        dataset_config: str | None,
        column: str,
        label_column: str,
        labels: list[str] | None,
        bad_files: BadFiles,
        processor: Any,
        **options: Any,
    ) -> None:
        paths: dict[SplitName, Path | None] = {
            split: existing(path, f"{split}_file") if path else None for split, path in files.items()
        }
        super().__init__(paths, **options)
        if bad_files not in ("error", "skip"):
            raise ValueError(f"bad_files={bad_files!r} is not known; use error or skip.")
        self.dataset, self.dataset_config = dataset, dataset_config
        self.column, self.label_column, self.bad_files = column, label_column, bad_files
        self._given_labels = labels
        self._given_processor = processor
        self._sources: dict[SplitName, Source | None] = {}

    @abstractmethod
    def decode(self, file: Path | bytes, name: str) -> Any:
        """A file's content.

        Raises:
            DataError: it does not decode.
        """

    @property
    def labels(self) -> list[str]:
        """Label names in the order of their ids; read from the training rows when they were not given.

        Raises:
            DataError: there are no training rows to read them from.
        """
        return list(self._labels.names)

    @cached_property
    def _labels(self) -> Labels:
        if self._given_labels is not None:
            return Labels(self._given_labels, given=True)
        source = self.source("train")
        if source is None:
            raise DataError(
                "Labels are read from the training rows and none were given; give train_file, dataset or labels."
            )
        check_columns(source, {"label_column": self.label_column})
        return read_labels(source, self.label_column)

    @cached_property
    def processor(self) -> Any:
        """What makes a model's inputs of decoded files.

        Raises:
            DataError: none was given and the task's model has none.
        """
        given = self._given_processor
        if given is not None and not isinstance(given, str):
            return given
        task: Any = self.trainer and self.trainer.lightning_module
        name = given or getattr(task, "model_name", "")
        if not name:
            raise DataError(f"The model names no folder with a processor of {self.noun}; give processor.")
        folder = Path(name).expanduser()
        with hub_or_cache():
            try:
                return self.auto_processor.from_pretrained(
                    str(folder) if folder.is_dir() else name, **self.processor_options
                )
            except (OSError, ValueError) as error:
                raise DataError(
                    f"{name} has no processor of {self.noun} ({str(error).strip().splitlines()[0].rstrip('.')}); "
                    f"{self.without_processor}."
                ) from error

    def source(self, split: SplitName) -> Source | None:
        """Rows of a split, with a column of paths or bytes; None when there are none. Read once."""
        if split not in self._sources:
            path = self.files[split]
            if path is not None:
                found = self._read(path, split)
            elif self.dataset is not None:
                found = read_dataset(self.dataset, split, config=self.dataset_config)
            else:
                found = None
            if found is not None and isinstance((found.rows.features or {}).get(self.column), self.feature):
                rows = found.rows.cast_column(self.column, self.feature(decode=False))
                found = Source(rows, found.name, found.path)
            self._sources[split] = found
        return self._sources[split]

    def given(self, split: SplitName) -> bool:
        """As `FileData.given`, or in the dataset."""
        return self.source(split) is not None

    def origin(self, split: SplitName) -> str:
        """As `FileData.origin`."""
        source = self.source(split)
        return super().origin(split) if source is None else source.name

    def find(self, split: SplitName) -> list[LabelledFile]:
        """The files of a split; with bad_files "skip", those that decode.

        Raises:
            DataError: a column is missing, a file is not there, a label is none of the labels, or no file decodes.
        """
        source = self.source(split)
        assert source is not None
        table = source.rows
        assert isinstance(table, Dataset)
        check_columns(source, {self.column_argument: self.column}, self._sources.get("train"))
        labels: Sequence[int] | None = None
        if split != "predict":
            check_columns(source, {"label_column": self.label_column}, self._sources.get("train"))
            labels = self._labels.ids(source, self.label_column).tolist()
        places = enumerate(self._places(source))
        found = [LabelledFile(name, row, labels[row] if labels else None, path) for row, (name, path) in places]
        if self.bad_files == "skip":
            return self._decodable(source, found, Files(table, self.column))
        self._check_there(source, found)
        return found

    def strata(self, items: Sequence[LabelledFile]) -> Sequence[int] | None:
        """Their labels."""
        return [-1 if item.label is None else item.label for item in items]

    def reader(self, split: SplitName) -> Files:
        """Reads the files of a split."""
        source = self.source("train" if split == "validation" and not self.given("validation") else split)
        assert source is not None
        assert isinstance(source.rows, Dataset)
        return Files(source.rows, self.column)

    def given_rows(self, split: SplitName) -> list[dict[str, Any]]:
        """The rows as they were given, with the files by their names."""
        source = self.source(split)
        assert source is not None
        assert isinstance(source.rows, Dataset)
        rest = source.rows.remove_columns(self.column)
        names = (name for name, _ in self._places(source))
        return [{self.column: name, **(rest[row] if rest.column_names else {})} for row, name in enumerate(names)]

    def _read(self, path: Path, split: SplitName) -> Source:
        asked = f"{split}_file"
        if path.is_dir() and not any((path / name).is_file() for name in SAVED):
            return self._read_classes(path, labelled=split != "predict")
        return read_file(path, asked=asked, split=split)

    def _read_classes(self, folder: Path, *, labelled: bool) -> Source:
        """The files below a folder, with the sub-folders of the folder for labels."""
        found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in self.suffixes and path.is_file())
        if not found:
            raise DataError(
                f"{folder} holds no {self.noun}; put some there ({', '.join(sorted(self.suffixes))}), in a folder for "
                "each class."
            )
        columns: dict[str, list[str]] = {self.column: [str(path) for path in found]}
        if labelled:
            for path in found:
                if path.parent == folder:
                    raise DataError(f"{path}: stands in no folder of a class; move it into one, or take it out.")
            columns[self.label_column] = [path.relative_to(folder).parts[0] for path in found]
        return read_objects(columns, str(folder))

    def _places(self, source: Source) -> Iterator[tuple[str, Path | None]]:
        """Name and path of each file; the path is None where the table holds its bytes, which are not read here."""
        assert isinstance(source.rows, Dataset)
        home = Path() if source.path is None else source.path.parent
        row = 0
        with source.reading():
            for table in source.rows.select_columns([self.column]).with_format("arrow").iter(1000):
                values: Any = table.column(self.column)  # type: ignore[union-attr]
                inside: Any = [False] * len(values)
                if pa.types.is_struct(values.type):
                    inside = pc.is_valid(pc.struct_field(values, "bytes")).to_pylist()  # type: ignore[attr-defined]
                    values = pc.struct_field(values, "path")  # type: ignore[attr-defined]
                for path, held in zip(values.to_pylist(), inside, strict=True):
                    if not held and not (isinstance(path, str) and path):
                        problem = "is missing or null" if path is None else f"is {shown(path)}"
                        raise DataError(f"{source.where(row)}: {self.column!r} {problem}; give it a path.")
                    yield (source.where(row), None) if held else (str(home / path), home / path)
                    row += 1

    def _check_there(self, source: Source, files: Sequence[LabelledFile]) -> None:
        missing = [file for file in files if file.path is not None and not file.path.is_file()]
        if missing:
            raise DataError(
                f"{source.where(missing[0].row)}: there is no file {missing[0].name}, and {len(missing)} of "
                f"{len(files)} are missing; correct {self.column!r}, or set bad_files to skip."
            )

    def _decodable(self, source: Source, files: Sequence[LabelledFile], reader: Files) -> list[LabelledFile]:
        """The files that decode: each is decoded once, in as many threads as there are workers."""

        def fault(file: LabelledFile) -> str | None:
            try:
                self.decode(reader.read(file), file.name)
            except DataError as error:
                return str(error)
            return None

        with ThreadPoolExecutor(max(1, self.num_workers)) as threads:
            faults = list(threads.map(fault, files))
        sound = [file for file, bad in zip(files, faults, strict=True) if bad is None]
        first = next((bad for bad in faults if bad is not None), "")
        if not sound:
            raise DataError(f"{source.name}: none of its {len(files)} {self.noun} decodes; the first: {first}")
        if first:
            rank_zero_warn(f"{source.name}: {len(files) - len(sound)} of {len(files)} {self.noun} skipped; {first}")
        return sound
