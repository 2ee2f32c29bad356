"""Rows of numbers that are computed once, stored as .npy in the cache, and mapped into memory.

A computation that ends early, even by SIGKILL, leaves its rows in a file of another name, and a second file with their
number, which is written after they are on the disk. The next call computes only the others.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from torch import Tensor

from ..runtime.errors import UsageError, warn
from ..runtime.files import write_whole
from ..runtime.messages import say

__all__ = ["stored_rows"]

_SECONDS = 5.0  # between records of what is on the disk: at most as much is computed again


def stored_rows(path: Path, number: int, compute: Callable[[int], Iterable[Tensor]]) -> np.ndarray:
    """Returns the rows of a file, (number, ...) float32, mapped into memory; computes those that are missing.

    A damaged file is written again. A file of this name is complete, because it is renamed at the end. Another run
    that computes the same rows is waited for, on file systems with locks; elsewhere, each run computes all rows.

    Args:
        path: the file; its name must identify the content.
        number: number of rows.
        compute: yields the rows from a given one on, in order and in pieces (n, ...). They must not depend on where
            it starts, which is always the end of a piece.

    Raises:
        UsageError: the file cannot be written.
    """
    if (rows := _mapped(path, number)) is not None:
        return rows
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.stem}{'' if _has_locks(path.parent) else f'.{os.getpid()}'}.part")
        with part.open("ab") as file:
            _lock(file, path)
            if (rows := _mapped(path, number)) is not None:  # by the run that was waited for
                return rows
            _write(file, part, number, compute)
            part.replace(path)
            _record_of(part).unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(
            f"--cache_dir: {path} cannot be written ({error.strerror}): free disk space, or name another folder"
        ) from error
    return np.load(path, mmap_mode="r")


def _mapped(path: Path, number: int) -> np.ndarray | None:
    """Maps a file into memory; None if it is missing or damaged."""
    try:
        rows = np.load(path, mmap_mode="r")
        return rows if len(rows) == number else None
    except (OSError, ValueError, EOFError):
        return None


def _has_locks(folder: Path) -> bool:
    """Whether the file system of a folder supports locks; some of clusters do not."""
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            return True
        except OSError:
            return False


def _lock(file: BinaryIO, path: Path) -> None:
    """Waits for other runs that write this file; without locks, its name is that of this process alone."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        warn(f"another run is computing {path}: waiting for it")
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        pass


def _write(file: BinaryIO, part: Path, number: int, compute: Callable[[int], Iterable[Tensor]]) -> None:
    """Appends the rows that are missing."""
    done, size = _recorded(part)
    file.truncate(size)  # beyond it, the content is unknown
    if done:
        say(f"{done:,} of {number:,} rows were computed by an earlier run, and are not computed again")
    recorded = time.monotonic()
    try:
        for piece in compute(done):
            if not done:
                header = {"descr": "<f4", "fortran_order": False, "shape": (number, *piece.shape[1:])}
                np.lib.format.write_array_header_2_0(file, header)
            # A full disk raises, unlike a mapped file.
            file.write(piece.float().cpu().numpy().astype("<f4").tobytes())
            done += len(piece)
            if time.monotonic() - recorded > _SECONDS:
                _record(file, part, done)
                recorded = time.monotonic()
    except BaseException:
        _record(file, part, done)
        raise
    file.flush()


def _record_of(part: Path) -> Path:
    return part.with_suffix(".rows")


def _record(file: BinaryIO, part: Path, done: int) -> None:
    """Records the number of rows and bytes after they are on the disk."""
    file.flush()
    os.fsync(file.fileno())
    text = f"{done} {file.tell()}"
    write_whole(_record_of(part), lambda temporary: temporary.write_text(text, encoding="ascii"))


def _recorded(part: Path) -> tuple[int, int]:
    """Returns the number of rows and bytes of an earlier run; 0 if there are none, or if the file is shorter."""
    try:
        done, size = map(int, _record_of(part).read_text(encoding="ascii").split())
        return (done, size) if part.stat().st_size >= size else (0, 0)
    except (OSError, ValueError):
        return 0, 0
