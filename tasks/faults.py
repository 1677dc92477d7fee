"""Which line of a file a row stands on, and which line is no row at all.

Asked only after a reader failed, or when a row has to be named: a second, slow reading in plain Python.
"""

import csv
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")


def line_of(path: Path, row: int) -> int | None:
    """Line, from 1, at which a row, from 0, of a CSV or JSON lines file starts; None where rows are not lines."""
    if path.suffix in DELIMITERS:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, delimiter=DELIMITERS[path.suffix])
            before = 0
            for number, cells in enumerate(filled_rows(reader)):  # the header is number 0
                if number == row + 1:
                    return before + 1 if cells else None
                before = reader.line_num
        return None
    if path.suffix in JSON_SUFFIXES and not _is_json_array(path):
        filled = (number for number, line in enumerate(path.open("rb"), start=1) if line.strip())
        return next(islice(filled, row, None), None)
    return None


def find_fault(path: Path) -> tuple[int, str] | None:
    """First line, from 1, that is no row, and why; None when every line reads as one."""
    if path.suffix not in (*DELIMITERS, *JSON_SUFFIXES):
        return None
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number, "is not UTF-8; save the file as UTF-8"
    if path.suffix in DELIMITERS:
        return _csv_fault(path)
    return _json_array_fault(path) if _is_json_array(path) else _json_lines_fault(path)


def _csv_fault(path: Path) -> tuple[int, str] | None:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, delimiter=DELIMITERS[path.suffix], strict=True)
        before, width = 0, None
        try:
            for cells in filled_rows(reader):
                width = len(cells) if width is None else width
                if len(cells) > width:
                    return (
                        before + 1,
                        f"has {len(cells)} cells under {width} column names; quote cells with delimiters",
                    )
                before = reader.line_num
        except csv.Error as error:
            return before + 1, f"is no CSV row ({error})"
    return None


def _json_lines_fault(path: Path) -> tuple[int, str] | None:
    kinds: dict[str, tuple[int, type]] = {}
    change: tuple[int, str] | None = None
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                return number, f"malformed JSON ({error.msg}, character {error.pos + 1}); give one object per line"
            if not isinstance(row, dict):
                return number, f"is {shown(row)}, not a JSON object; give one object per line"
            for column, value in row.items():
                first, kind = kinds.setdefault(column, (number, type(value)))
                if value is not None and kind is not type(value):
                    change = change or (number, f"{column!r} is {shown(value)}, but {kind.__name__} in line {first}")
    return change


def _json_array_fault(path: Path) -> tuple[int, str] | None:
    try:
        json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        return error.lineno, f"malformed JSON ({error.msg}, character {error.colno})"
    return None


def filled_rows(reader: Iterator[list[str]]) -> Iterator[list[str]]:
    """The rows of a CSV reader that are no blank lines."""
    return (cells for cells in reader if cells)


def _is_json_array(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def shown(value: Any) -> str:
    """Type and short text of a value, for a message."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"
