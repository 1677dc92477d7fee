"""Pairs of a function's signature and its docstring, read from the source of Python's own standard library."""

import ast
import os
import random
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
MIN_CHARACTERS = 25  # "Return self." and the like describe nothing
MAX_CHARACTERS = 400  # about 100 tokens; the encoder reads 48
PAIRS_PER_FILE = 20  # tkinter/__init__.py alone has hundreds: no single file may decide the score


@dataclass(frozen=True)
class DocPair:
    """One function: what is asked and what answers it."""

    file: str
    """Path below the library's root, with forward slashes."""
    name: str
    arguments: tuple[str, ...]
    """Without self and cls."""
    docstring: str
    """White space collapsed, at most `MAX_CHARACTERS`."""

    @property
    def signature(self) -> str:
        """As Python writes it: `urljoin(base, url)`."""
        return f"{self.name}({', '.join(self.arguments)})"

    @property
    def query(self) -> str:
        """What the encoder and TF-IDF read: words instead of identifiers."""
        return self.signature.replace("_", " ").replace("(", " ( ").replace(")", " )").strip()


@dataclass(frozen=True)
class Split:
    """Training and held-out pairs; no file, signature or docstring occurs in both."""

    train: list[DocPair]
    held_out: list[DocPair]


def collect_pairs(num_train: int, num_held_out: int, *, seed: int = 0, root: Path | None = None) -> Split:
    """Read files in an order drawn from `seed` until both parts are full, the held-out part first.

    Nothing is imported or executed: the sources are parsed with `ast`. A signature or docstring seen before is
    dropped, so every query has one right answer and none of the answers was trained on.

    Args:
        num_train: pairs to train on.
        num_held_out: pairs to evaluate on; their docstrings are the candidates of the search.
        root: folder to read; None for the standard library of the running Python.

    Raises:
        ValueError: the folder has fewer pairs than asked for.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    files = list(source_files(root))
    random.Random(seed).shuffle(files)
    remaining = iter(files)
    seen: set[str] = set()
    held_out = _take(num_held_out, remaining, root, seen, seed)
    train = _take(num_train, remaining, root, seen, seed)
    if len(held_out) < num_held_out or len(train) < num_train:
        raise ValueError(
            f"the demo needs {num_held_out} held-out and {num_train} training docstrings, and the Python sources in "
            f"{root} have {len(held_out)} and {len(train)}; run it with a Python whose standard library is installed "
            f"as .py files."
        )
    return Split(train, held_out)


def source_files(root: Path) -> Iterator[Path]:
    """Python files below `root` in sorted order, without tests and installed packages."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in SKIPPED_FOLDERS)
        for name in sorted(names):
            if name.endswith(".py") and not name.startswith("test_"):
                yield Path(folder, name)


def pairs_in(file: Path, root: Path) -> list[DocPair]:
    """Every function of one file with an argument, a docstring and a name of its own, outer functions first."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escape sequences are the library's business
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # templates and lib2to3's Python 2 sources are no Python of this version
        return []
    where = file.relative_to(root).as_posix()
    return [pair for node in ast.walk(tree) if (pair := _pair(node, where))]


def _pair(node: ast.AST, file: str) -> DocPair | None:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return None
    docstring = " ".join((ast.get_docstring(node, clean=False) or "").split())[:MAX_CHARACTERS]
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    arguments = tuple(argument.arg for argument in every if argument.arg not in ("self", "cls"))
    if len(docstring) < MIN_CHARACTERS or not arguments or node.name.startswith("__"):
        return None  # the name of __init__ says nothing: no reader could tell one from the next
    return DocPair(file, node.name, arguments, docstring)


def _take(count: int, files: Iterator[Path], root: Path, seen: set[str], seed: int) -> list[DocPair]:
    """The next `count` pairs, at most `PAIRS_PER_FILE` of a file, shuffled; whole files are used up."""
    taken: list[DocPair] = []
    while len(taken) < count and (file := next(files, None)):
        fresh: list[DocPair] = []
        for pair in pairs_in(file, root):
            if pair.query not in seen and pair.docstring not in seen:
                seen |= {pair.query, pair.docstring}
                fresh.append(pair)
        drawn = random.Random(f"{seed} {file.relative_to(root).as_posix()}").sample(fresh, len(fresh))
        taken += drawn[:PAIRS_PER_FILE]
    taken = taken[:count]
    random.Random(seed).shuffle(taken)
    return taken
