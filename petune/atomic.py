"""Replace a file or a folder so that a full disk or a killed process leaves the old one whole."""

import ctypes
import os
import shutil
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@contextmanager
def replacing_folder(directory: Path) -> Generator[Path]:
    """Give an empty folder beside `directory` to write into, and put it in its place when the block ends well.

    The exchange is one system call where the system has it (Linux); elsewhere two renames, and `recover_folder`
    finishes what a kill between them left.

    Raises:
        OSError: from writing, with `directory` as it was and the new folder removed.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(directory)
    incoming, outgoing = _beside(directory, "incoming"), _beside(directory, "outgoing")
    for leftover in (incoming, outgoing):
        _remove(leftover)
    try:
        incoming.mkdir()
        yield incoming
        _flush_tree(incoming)
        _swap(incoming, directory, outgoing)
    except BaseException:
        recover_folder(directory)
        _remove(incoming)
        raise
    for leftover in (incoming, outgoing):
        shutil.rmtree(leftover, ignore_errors=True)  # the new folder stands; the next save tries again


def recover_folder(directory: Path) -> None:
    """Put the old folder back if a process died between the two renames of `replacing_folder`."""
    outgoing = _beside(directory, "outgoing")
    if outgoing.exists() and not directory.exists():
        outgoing.rename(directory)


@contextmanager
def replacing_file(path: Path) -> Generator[Path]:
    """Give a path beside `path` to write to, and put that file in its place when the block ends well.

    Raises:
        OSError: from writing, with `path` as it was and the new file removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    incoming = _beside(path, "incoming")
    try:
        yield incoming
        _flush(incoming)
        incoming.replace(path)
    except BaseException:
        incoming.unlink(missing_ok=True)
        raise
    _flush_entry(path)


def copy_over(source: Path, target: Path) -> None:
    """Copy a file or folder, as a hard link where the file system can."""
    if source.is_dir():
        shutil.copytree(source, target, copy_function=_link_or_copy)
    else:
        _link_or_copy(source, target)


def _beside(path: Path, role: str) -> Path:
    # A fixed name: what a killed process left is found and removed by the next one.
    return path.with_name(f".{path.name}.{role}")


def _swap(incoming: Path, directory: Path, outgoing: Path) -> None:
    if not directory.exists():
        incoming.rename(directory)
    elif not _exchange(incoming, directory):
        directory.rename(outgoing)
        incoming.rename(directory)
    _flush_entry(directory)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two paths in one step; False where the system or the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    rename: Callable[..., int] | None = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def _flush_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _flush(path)


def _flush(path: Path) -> None:
    """Have the system write the file or folder to the disk: a rename may otherwise reach it before the content."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows flushes only what it may write
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _flush_entry(path: Path) -> None:
    with suppress(OSError):  # the new content stands; some network file systems cannot flush a folder
        _flush(path.parent)


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)


def _link_or_copy(source: str | Path, target: str | Path) -> None:
    with suppress(OSError):  # no hard links on this file system
        os.link(source, target)
        return
    shutil.copy2(source, target)
