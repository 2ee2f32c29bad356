"""Reads the conditioning images of --condition_dir."""

from __future__ import annotations

import functools
import hashlib
import io
from pathlib import Path

import PIL.Image
import torch
from torch import Tensor

from ..data.depth import look_at_depth
from ..data.pictures import decode
from ..data.training_data import PictureData
from ..runtime.errors import UsageError, warn

__all__ = ["ConditionFolder"]

_KEPT_DECODED = 1024


class ConditionFolder:
    """The images of a folder in the order of their names, each decoded on first access.

    Args:
        folder: the folder, with images of any size; subfolders and other files are ignored.
        size: the height and width that they are resized and cropped to.
        channels: 1 for grayscale, 3 for RGB.

    Attributes:
        sha256: a hash of the images.

    Raises:
        UsageError: if the folder is missing or holds no images, or if an image is damaged.
    """

    def __init__(self, folder: Path, size: tuple[int, int], channels: int):
        if not folder.is_dir():
            raise UsageError(f"--condition_dir {folder}: no such folder")
        known = PIL.Image.registered_extensions()
        files = [path for path in folder.iterdir() if path.suffix.lower() in known and not path.name.startswith(".")]
        if not files:
            raise UsageError(f"--condition_dir {folder}: holds no images")
        self._files = sorted(files)
        self._size, self._channels = size, channels
        self.sha256 = self._checked()
        depth = look_at_depth([functools.partial(PIL.Image.open, path) for path in self._files])
        if depth.warning:
            warn(f"--condition_dir {folder}: {depth.warning}")
        self._white = depth.white
        self._decoded = functools.lru_cache(_KEPT_DECODED)(self._decode)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Tensor:
        """Returns the image with this index, (K, H, W) in [-1, 1]."""
        return self._decoded(index)

    def _checked(self) -> str:
        digest = hashlib.sha256()
        for path in self._files:
            content = path.read_bytes()
            digest.update(hashlib.sha256(content).digest())
            try:
                PIL.Image.open(io.BytesIO(content)).verify()
            except Exception as error:  # PIL raises many types on damaged files
                raise _damaged(path, error) from error
        return digest.hexdigest()

    def _decode(self, index: int) -> Tensor:
        path = self._files[index]
        try:
            with PIL.Image.open(path) as image:
                pixels = decode(image, self._size, self._channels, self._white)
        except Exception as error:
            raise _damaged(path, error) from error
        return PictureData.normalization.normalize(torch.from_numpy(pixels.copy())[None])[0]


def _damaged(path: Path, error: Exception) -> UsageError:
    return UsageError(f"--condition_dir: {path} cannot be decoded: {' '.join(str(error).split())}")
