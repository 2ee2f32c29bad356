"""Files with arrays of fields: found, and opened without running anything or expanding anything that is in them."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import psutil

from .errors import UsageError

__all__ = ["field_file", "read_fields"]

_SUFFIXES = (".npy", ".npz")
_GIGABYTE = 2**30
_RATIO = 200  # of bytes after and before: measured fields do not shrink so much


def field_file(path: str | None) -> Path | None:
    """The array file that a path names, itself or as the only one of a folder; None if it names none.

    Raises:
        UsageError: no such file, or several.
    """
    if path is None:
        return None
    path = Path(path)
    if path.suffix in _SUFFIXES:
        if not path.is_file():
            raise UsageError(f"{path}: no such file")
        return path
    inside = sorted(file for file in path.iterdir() if not file.name.startswith(".")) if path.is_dir() else []
    if any(file.suffix not in _SUFFIXES for file in inside):
        return None  # a folder of pictures, whatever else lies there
    if len(inside) > 1:
        raise UsageError(f"{path} holds {len(inside)} array files: name one of them, such as {inside[0]}")
    return inside[0] if inside else None


def read_fields(path: Path) -> np.ndarray:
    """The array of a file: mapped from an .npy, in memory from an .npz.

    Raises:
        UsageError: no array of numbers (N, C, H, W); one of Python objects, which would run code; a damaged file, or
            one that would expand to what no measurement is.
    """
    try:
        found = _from_archive(path) if path.suffix == ".npz" else np.load(path, mmap_mode="r", allow_pickle=False)
    except UsageError:
        raise
    except Exception as error:  # of zipfile, zlib, numpy's parser of headers
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{path}: not an array file that can be read: {reason}") from error
    if found.ndim != 4 or found.dtype.kind not in "fiu" or 0 in found.shape:
        raise UsageError(f"{path}: must hold numbers of shape (N, C, H, W), holds {found.dtype} {found.shape}")
    return found


def _from_archive(path: Path) -> np.ndarray:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if len(members) != 1:
        names = ", ".join(member.filename.removesuffix(".npy") for member in members)
        raise UsageError(f"{path}: must hold one array, holds {names}")
    size, packed = members[0].file_size, members[0].compress_size
    available = psutil.virtual_memory().available
    if size > available / 2 or (size > _GIGABYTE and size > _RATIO * packed):
        raise UsageError(
            f"{path}: would expand from {packed:,} to {size:,} bytes in memory: store the array as .npy, which is read"
            " from the disk bit by bit"
        )
    with np.load(path, allow_pickle=False) as archive:
        return archive[archive.files[0]]
