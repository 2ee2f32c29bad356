"""Where samples go: a folder of pictures, or one array file."""

from __future__ import annotations

import re
import shutil
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import PIL.Image
from torch import Tensor

from ..files import write_whole

__all__ = ["ArrayFile", "PictureFolder", "SampleStore"]


class SampleStore(Protocol):
    """A place for samples, which come in any order, from several processes, and in the end are there by number.

    Attributes:
        path: of the result.
        settings_file: where their settings are kept.
    """

    path: Path
    settings_file: Path

    def present(self) -> set[int]:
        """The numbers of the samples that are there, each of them whole."""

    def holds_others(self) -> bool:
        """Whether something is in the way that is not known to be samples."""

    def prepare(self) -> None:
        """Makes the folder, and removes what a killed process has left half written."""

    def write(self, index: int, sample: Tensor) -> None:
        """Keeps a sample (C, H, W), whole or not at all."""

    def finish(self, number: int) -> None:
        """Brings the first `number` samples, all of them present, into their final form."""


class PictureFolder:
    """A folder of 000000.png, 000001.png and so on.

    Args:
        path: the folder.

    Raises:
        ValueError: it is a file.
    """

    def __init__(self, path: Path):
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is a file: name a folder, or a file that ends in .npz")
        self.path = path
        self.settings_file = path / "sample_settings.json"
        self._files = _NumberedFiles(path, ".png")

    def file(self, index: int) -> Path:
        """The file of a sample."""
        return self._files.file(index)

    def present(self) -> set[int]:
        return self._files.present()

    def holds_others(self) -> bool:
        return any(not entry.name.startswith(".") for entry in self.path.iterdir()) if self.path.is_dir() else False

    def prepare(self) -> None:
        self._files.prepare()

    def write(self, index: int, sample: Tensor) -> None:
        pixels = _pixels(sample)
        picture = PIL.Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        self._files.write(index, picture.save)

    def finish(self, number: int) -> None:
        pass


class ArrayFile:
    """One .npz file, beside it the folder of its parts while it grows.

    Pictures are arr_0 (N, H, W, C) uint8 and, of a class-conditional model, arr_1 (N,) their labels: what the
    evaluation of guided-diffusion (Dhariwal and Nichol 2021, arXiv:2105.05233) reads. Fields are arr_0 (N, C, H, W)
    float32, which train_reg.py reads.

    Args:
        path: the file.
        is_field: keep the numbers as they are.
        class_labels: of sample i is `class_labels[i % n]`; fields have none.

    Raises:
        ValueError: it is a folder.
    """

    def __init__(self, path: Path, is_field: bool = False, class_labels: Sequence[int] = ()):
        if path.is_dir():
            raise ValueError(f"{path} is a folder: name a file that ends in .npz")
        self.path = path
        self.settings_file = path.with_name(f"{path.name}.json")
        self._is_field = is_field
        self._class_labels = () if is_field else tuple(class_labels)
        self._parts = _NumberedFiles(path.with_name(f"{path.name}.parts"), ".npy")

    def present(self) -> set[int]:
        return self._parts.present() | set(range(self._joined()))

    def holds_others(self) -> bool:
        return self.path.exists() or bool(self._parts.present())

    def prepare(self) -> None:
        self._parts.prepare()

    def write(self, index: int, sample: Tensor) -> None:
        values = sample.numpy() if self._is_field else _pixels(sample)

        def save(path: Path) -> None:
            with path.open("wb") as file:
                np.save(file, values)

        self._parts.write(index, save)

    def finish(self, number: int) -> None:
        if self._joined() < number:
            write_whole(self.path, lambda temporary: self._join(temporary, number))
        shutil.rmtree(self._parts.folder, ignore_errors=True)

    def _joined(self) -> int:
        """How many samples the file itself has."""
        if not self.path.is_file():
            return 0
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as stream:
            return _read_header(stream)[0][0]

    def _join(self, path: Path, number: int) -> None:
        """Writes the samples that are joined already and then the parts, one after the other: all may be too many."""
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
    """Files of one kind in one folder, each named by a number and written whole or not at all."""

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
        for leftover in self.folder.glob(f".[0-9]*{self._suffix}"):  # other programs would take it for a sample
            leftover.unlink(missing_ok=True)

    def write(self, index: int, save: Callable[[Path], object]) -> None:
        write_whole(self.file(index), save)


def _pixels(sample: Tensor) -> np.ndarray:
    """A picture (C, H, W) in [0, 1] as (H, W, C) uint8, rounded as diffusers does."""
    return (sample.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)


def _read_header(stream) -> tuple:
    """(shape, is Fortran, type) of an array in a .npy stream, which is left at the first number."""
    np.lib.format.read_magic(stream)
    return np.lib.format.read_array_header_1_0(stream)
