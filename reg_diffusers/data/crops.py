"""Random windows of images that are stored a seventh larger than they are trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .image_sizes import windowed

__all__ = ["Uncropped", "central", "drawn", "larger"]


class Uncropped(torch.utils.data.Dataset):
    """A data set with its images in the size in which they are stored.

    Args:
        read: reads the batch of some rows in that size.
        rows: the rows of its images.
    """

    def __init__(self, read: Callable[[list[int]], dict], rows: Sequence[int]):
        self._read, self._rows = read, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitems__(self, indices: list[int]) -> dict:
        return self._read([self._rows[index] for index in indices])


def larger(size: tuple[int, int]) -> tuple[int, int]:
    """Returns the stored (height, width) for windows of a size: a seventh more, as 256 for the usual 224."""
    height, width = (-(-8 * side // 7) for side in size)
    return height, width


def central(batch: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """Returns a batch with the central windows of its images."""
    height, width = batch["values"].shape[2:]
    top, left = (height - size[0]) // 2, (width - size[1]) // 2

    def window(images: Tensor) -> Tensor:
        return images[..., top : top + size[0], left : left + size[1]]

    return _each(batch, window, torch.tensor([top, left]), size)


def drawn(batch: Mapping[str, Any], size: tuple[int, int], seed: int, epoch: int) -> dict[str, Any]:
    """Returns a batch with a random window of each image, alike in all that belongs to it.

    The window depends on the seed, the epoch and the id of the image alone: not on the batch, the process or a worker.
    """
    stored = batch["values"].shape[2:]
    places = []
    for id in batch["ids"].tolist():
        random = np.random.default_rng([seed, epoch, id])
        places.append([int(random.integers(0, large - small + 1)) for large, small in zip(stored, size, strict=True)])

    def windows(images: Tensor) -> Tensor:
        pairs = zip(images, places, strict=True)
        return torch.stack([image[:, top : top + size[0], left : left + size[1]] for image, (top, left) in pairs])

    return _each(batch, windows, torch.tensor(places), size)


def _each(
    batch: Mapping[str, Any], crop: Callable[[Tensor], Tensor], corners: Tensor, size: tuple[int, int]
) -> dict[str, Any]:
    """Crops the images of a batch, also those among its columns, and corrects the sizes that the network takes."""
    stored = batch["values"].shape[2:]

    def cropped(value):
        if isinstance(value, Mapping):
            return {name: cropped(one) for name, one in value.items()}
        is_image = isinstance(value, Tensor) and value.ndim == 4 and value.shape[2:] == stored
        return crop(value) if is_image else value

    found = cropped(batch)
    return {**found, "time_ids": windowed(found["time_ids"], corners, size)} if "time_ids" in found else found
