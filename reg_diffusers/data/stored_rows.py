"""Rows of numbers that are computed once, stored as .npy in the cache, and mapped into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from torch import Tensor

from ..runtime.errors import UsageError
from ..runtime.files import write_whole

__all__ = ["stored_rows"]


def stored_rows(path: Path, number: int, compute: Callable[[], Iterable[Tensor]]) -> np.ndarray:
    """Returns the rows of a file, (number, ...) float32, mapped into memory; computes them if they are missing.

    A damaged file is written again. A file is complete, because it is renamed at the end.

    Args:
        path: the file; its name must identify the content.
        number: number of rows.
        compute: yields the rows in order, in pieces (n, ...).

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        rows = np.load(path, mmap_mode="r")
        if len(rows) == number:
            return rows
    except (OSError, ValueError, EOFError):
        pass  # missing or damaged
    try:
        write_whole(path, lambda temporary: _write(temporary, number, compute()))
    except OSError as error:
        raise UsageError(
            f"--cache_dir: {path} cannot be written ({error.strerror}): free disk space, or name another folder"
        ) from error
    return np.load(path, mmap_mode="r")


def _write(path: Path, number: int, pieces: Iterable[Tensor]) -> None:
    with path.open("wb") as file:
        for index, piece in enumerate(pieces):
            if index == 0:
                header = {"descr": "<f4", "fortran_order": False, "shape": (number, *piece.shape[1:])}
                np.lib.format.write_array_header_2_0(file, header)
            file.write(piece.float().cpu().numpy().astype("<f4").tobytes())  # a full disk raises, unlike a mapped file
