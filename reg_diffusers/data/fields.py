"""Arrays of fields as training data; opens their files without running code in them or expanding archive bombs."""

from __future__ import annotations

import functools
import zipfile
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

from ..runtime.errors import UsageError
from .content import array_digest
from .normalization import Normalization, field_normalization

__all__ = ["FieldData", "check_order", "field_file", "read_fields"]

_SUFFIXES = (".npy", ".npz")
_FEW, _MANY = 4, 8  # channels, and pixels of a side
_GIGABYTE = 2**30
_RATIO = 200  # largest compression ratio: measured fields do not compress that much


class FieldData(torch.utils.data.Dataset):
    """Arrays of physical fields, such as temperatures or velocities, in their original size.

    Attributes:
        shape: (C, H, W).
        normalization: the given one, else from the range of each channel over the data set to [-1, 1]; see
            `field_normalization`.
        note: a line to print at the start, next to the number and shape of the data.
        classes: None.
        number: number of fields.
        examples: fields for repeated use: all of them.
    """

    is_picture = False
    prompts = None
    white = None
    classes = None
    condition_channels = 0
    columns = ()

    def __init__(self, array: np.ndarray, normalization: Normalization | None = None, field_scale: str = "channel"):
        self._array = array
        self.shape = tuple(array.shape[1:])
        self.normalization = field_normalization(array, normalization, field_scale)
        self.note = self.normalization.note

    def __len__(self) -> int:
        return len(self._array)

    @property
    def number(self) -> int:
        return len(self)

    @functools.cached_property
    def content(self) -> str:
        """Identifies the fields by their values, which are read."""
        return array_digest(self._array)

    @property
    def examples(self) -> FieldData:
        return self

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Reads the batch of these indices: {"values": (B, C, H, W) as stored, "ids": (B,)}.

        Values are float64 if float32 would round them, except on MPS, which lacks float64.
        """
        fits = np.can_cast(self._array.dtype, np.float32) or torch.backends.mps.is_available()
        values = np.asarray(self._array[indices], dtype=np.float32 if fits else np.float64)
        return {"values": torch.from_numpy(values), "ids": torch.tensor(indices)}


def field_file(path: str | None) -> Path | None:
    """Returns the array file at a path, or the only one in a folder; None if there is none.

    Raises:
        UsageError: if the file does not exist, or if the folder holds several.
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
        return None  # a folder of images, whatever else it holds
    if len(inside) > 1:
        raise UsageError(f"{path} holds {len(inside)} array files: name one of them, such as {inside[0]}")
    return inside[0] if inside else None


def read_fields(path: Path) -> np.ndarray:
    """Reads the array of a file: memory-mapped for .npy, in memory for .npz.

    Raises:
        UsageError: if the file holds no array of numbers (N, C, H, W), holds Python objects, which can run code, is
            damaged, or would expand to more than a plausible size.
    """
    try:
        found = _from_archive(path) if path.suffix == ".npz" else np.load(path, mmap_mode="r", allow_pickle=False)
    except UsageError:
        raise
    except Exception as error:  # from zipfile, zlib or numpy's header parser
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{path}: not a readable array file: {reason}") from error
    if found.ndim != 4 or found.dtype.kind not in "fiu" or 0 in found.shape:
        raise UsageError(f"{path}: must hold numbers of shape (N, C, H, W), not {found.dtype} {found.shape}")
    return found


def check_order(path: Path, shape: tuple[int, ...], channels: int | None) -> None:
    """Checks that the channels do not come last, which is the order of most other programs.

    Args:
        path: the file, for the message.
        shape: the shape of the array, expected as (N, C, H, W).
        channels: the channels of a given model; fields with as many channels pass.

    Raises:
        UsageError: if the shape looks like (N, H, W, C): the last axis is at most 4, and the two before at least 8.
    """
    if shape[3] <= _FEW and min(shape[1:3]) >= _MANY and shape[1] != channels:
        raise UsageError(
            f"{path}: {shape} looks like (N, H, W, C), but fields are (N, C, H, W): use np.moveaxis(x, -1, 1)"
        )


def _from_archive(path: Path) -> np.ndarray:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if len(members) != 1:
        names = ", ".join(member.filename.removesuffix(".npy") for member in members)
        raise UsageError(f"{path}: must hold one array, not {names}")
    size, packed = members[0].file_size, members[0].compress_size
    available = psutil.virtual_memory().available
    if size > available / 2 or (size > _GIGABYTE and size > _RATIO * packed):
        raise UsageError(
            f"{path}: would expand from {packed:,} to {size:,} bytes in memory: store the array as .npy, which is"
            " memory-mapped"
        )
    with np.load(path, allow_pickle=False) as archive:
        return archive[archive.files[0]]
