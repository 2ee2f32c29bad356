"""The conditioning images of --condition_dir."""

from __future__ import annotations

import functools
import hashlib
import io
from pathlib import Path

import PIL.Image
import torch
from torch import Tensor

from ..training.data import PictureData
from ..training.errors import UsageError
from ..training.pictures import decode

__all__ = ["ConditionFolder"]

_KEPT_DECODED = 1024


class ConditionFolder:
    """The images of a folder in the order of their names, each decoded when it is asked for.

    Args:
        folder: with images of any size; subfolders and files of other kinds are left out.
        resolution: side of the square that they are brought to.
        channels: 1 for grey, 3 for colour.

    Attributes:
        fingerprint: a hash of the images.

    Raises:
        UsageError: there is no such folder, no image in it, or one that is damaged.
    """

    def __init__(self, folder: Path, resolution: int, channels: int):
        if not folder.is_dir():
            raise UsageError(f"--condition_dir {folder}: no such folder")
        known = PIL.Image.registered_extensions()
        files = [path for path in folder.iterdir() if path.suffix.lower() in known and not path.name.startswith(".")]
        if not files:
            raise UsageError(f"--condition_dir {folder}: holds no images")
        self._files = sorted(files)
        self._resolution, self._channels = resolution, channels
        self.fingerprint = self._checked()
        self._decoded = functools.lru_cache(_KEPT_DECODED)(self._decode)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Tensor:
        """The image of this number, (K, H, W) in [-1, 1]."""
        return self._decoded(index)

    def _checked(self) -> str:
        digest = hashlib.sha256()
        for path in self._files:
            content = path.read_bytes()
            digest.update(hashlib.sha256(content).digest())
            try:
                PIL.Image.open(io.BytesIO(content)).verify()
            except Exception as error:  # PIL raises nearly anything on damaged files
                raise _damaged(path, error) from error
        return digest.hexdigest()

    def _decode(self, index: int) -> Tensor:
        path = self._files[index]
        try:
            with PIL.Image.open(path) as image:
                pixels = decode(image, self._resolution, self._channels)
        except Exception as error:
            raise _damaged(path, error) from error
        return PictureData.normalization.normalize(torch.from_numpy(pixels.copy())[None])[0]


def _damaged(path: Path, error: Exception) -> UsageError:
    return UsageError(f"--condition_dir: {path} cannot be decoded: {' '.join(str(error).split())}")
