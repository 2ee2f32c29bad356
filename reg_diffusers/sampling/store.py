"""Stores for samples: a folder of images, or one array file."""

from __future__ import annotations

import re
import shutil
import struct
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import PIL.Image
from torch import Tensor

from ..runtime.files import write_whole
from .png import encode_png

__all__ = ["ArrayFile", "PictureFolder", "SampleStore"]

_LENGTHS = 26  # bytes of a local header of a .zip file before the lengths of the name and of the extra field


class SampleStore(Protocol):
    """A store for samples by index. Several processes write to it in any order.

    Attributes:
        path: the path of the result.
        settings_file: the file of the sample settings.
    """

    path: Path
    settings_file: Path

    def present(self) -> set[int]:
        """Returns the indices of all complete samples."""

    def holds_others(self) -> bool:
        """Whether the path holds anything that is not known to be samples."""

    def prepare(self) -> None:
        """Creates the folder, and removes the incomplete files of a killed process."""

    def write(self, index: int, sample: Tensor) -> None:
        """Writes a sample (C, H, W) atomically."""

    def finish(self, number: int) -> None:
        """Converts the first `number` samples, all present, to their final format."""


class PictureFolder:
    """A folder of 000000.png, 000001.png and so on.

    Args:
        path: the folder.
        white: the value of white; above 255, the files have 16 bits.

    Raises:
        ValueError: if the path is a file.
    """

    def __init__(self, path: Path, white: int = 255):
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is a file: name a folder, or an .npz file")
        self.path = path
        self.settings_file = path / "sample_settings.json"
        self._white = white
        self._files = _NumberedFiles(path, ".png")

    def file(self, index: int) -> Path:
        """Returns the path of a sample."""
        return self._files.file(index)

    def present(self) -> set[int]:
        return self._files.present()

    def holds_others(self) -> bool:
        return any(not entry.name.startswith(".") for entry in self.path.iterdir()) if self.path.is_dir() else False

    def prepare(self) -> None:
        self._files.prepare()

    def write(self, index: int, sample: Tensor) -> None:
        pixels = _pixels(sample, self._white)
        if pixels.dtype == np.uint16:
            content = encode_png(pixels)
            self._files.write(index, lambda path: path.write_bytes(content))
            return
        picture = PIL.Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        self._files.write(index, picture.save)

    def finish(self, number: int) -> None:
        pass


class ArrayFile:
    """One .npz file; until it is complete, a folder next to it holds its parts.

    Images are stored as arr_0 (N, H, W, C) uint8, or uint16 if white is above 255. Those of a class-conditional model
    have their labels in arr_1 (N,): the format of guided-diffusion's evaluation (Dhariwal and Nichol 2021,
    arXiv:2105.05233). Fields are stored as arr_0 (N, C, H, W) float32, or float64 if float32 loses them to rounding: a
    format that train_reg.py reads.

    Args:
        path: the file.
        is_field: whether to store the values unchanged.
        class_labels: sample i has the label `class_labels[i % n]`; fields have no labels.
        white: the value of white of an image.

    Raises:
        ValueError: if the path is a folder.
    """

    def __init__(self, path: Path, is_field: bool = False, class_labels: Sequence[int] = (), white: int = 255):
        if path.is_dir():
            raise ValueError(f"{path} is a folder: name an .npz file")
        self.path = path
        self.settings_file = path.with_name(f"{path.name}.json")
        self._is_field, self._white = is_field, white
        self._class_labels = () if is_field else tuple(class_labels)
        self._parts = _NumberedFiles(path.with_name(f"{path.name}.parts"), ".npy")

    def present(self) -> set[int]:
        return self._parts.present() | set(range(self._joined()))

    def holds_others(self) -> bool:
        return self.path.exists() or bool(self._parts.present())

    def prepare(self) -> None:
        self._parts.prepare()

    def write(self, index: int, sample: Tensor) -> None:
        values = sample.numpy() if self._is_field else _pixels(sample, self._white)

        def save(path: Path) -> None:
            with path.open("wb") as file:
                np.save(file, values)

        self._parts.write(index, save)

    def finish(self, number: int) -> None:
        if self._joined() < number:
            write_whole(self.path, lambda temporary: self._join(temporary, number))
        self._parts.remove()

    def mapped(self) -> np.ndarray:
        """Returns arr_0 of the finished file, mapped into memory, or read if another program compressed it."""
        with zipfile.ZipFile(self.path) as archive:
            member = archive.getinfo("arr_0.npy")
            with archive.open(member) as stream:
                shape, is_fortran, dtype = _read_header(stream)
                header = stream.tell()
        if member.compress_type != zipfile.ZIP_STORED:
            return np.load(self.path)["arr_0"]
        with self.path.open("rb") as file:  # the local header, which precedes the content, has a length of its own
            file.seek(member.header_offset + _LENGTHS)
            name, extra = struct.unpack("<HH", file.read(4))
        start = member.header_offset + _LENGTHS + 4 + name + extra + header
        order = "F" if is_fortran else "C"
        return np.memmap(self.path, dtype, "r", offset=start, shape=shape, order=order)

    def _joined(self) -> int:
        """Returns the number of samples in the file itself."""
        if not self.path.is_file():
            return 0
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as stream:
            return _read_header(stream)[0][0]

    def _join(self, path: Path, number: int) -> None:
        """Writes the samples of the present file and then the parts, one at a time: memory may not hold all."""
        joined = self._joined()
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
                sample = np.load(self._parts.file(number - 1))
                header = {"descr": sample.dtype.str, "fortran_order": False, "shape": (number, *sample.shape)}
                np.lib.format.write_array_header_1_0(stream, header)
                if joined:
                    with zipfile.ZipFile(self.path) as before, before.open("arr_0.npy") as source:
                        _read_header(source)
                        shutil.copyfileobj(source, stream, 1 << 20)
                for index in range(joined, number):
                    stream.write(np.load(self._parts.file(index)).tobytes())
            if self._class_labels:
                labels = np.resize(np.asarray(self._class_labels, dtype=np.int64), number)
                with archive.open("arr_1.npy", "w") as stream:
                    np.lib.format.write_array(stream, labels)


class _NumberedFiles:
    """Numbered files of one type in one folder, each written atomically."""

    def __init__(self, folder: Path, suffix: str):
        self.folder = folder
        self._suffix = suffix

    def file(self, index: int) -> Path:
        return self.folder / f"{index:06}{self._suffix}"

    def present(self) -> set[int]:
        pattern = re.compile(rf"\d{{6,}}{re.escape(self._suffix)}")
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        return {int(name.removesuffix(self._suffix)) for name in names if pattern.fullmatch(name)}

    def prepare(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = re.compile(
            rf"\.\d{{6,}}\.\d+{re.escape(self._suffix)}"
        )  # other programs would take it for a sample
        for leftover in self.folder.iterdir():
            if unfinished.fullmatch(leftover.name):
                leftover.unlink(missing_ok=True)

    def remove(self) -> None:
        """Deletes the files, and the folder if it is empty then."""
        for index in self.present():
            self.file(index).unlink()
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def write(self, index: int, save: Callable[[Path], object]) -> None:
        write_whole(self.file(index), save)


def _pixels(sample: Tensor, white: int) -> np.ndarray:
    """Converts an image (C, H, W) in [0, 1] to (H, W, C) uint8 or uint16, with the rounding of diffusers."""
    return (sample.permute(1, 2, 0).numpy() * white).round().astype(np.uint8 if white <= 255 else np.uint16)


def _read_header(stream) -> tuple:
    """Reads (shape, is_fortran, dtype) of an array from an .npy stream, up to the first value."""
    np.lib.format.read_magic(stream)
    return np.lib.format.read_array_header_1_0(stream)
