"""Parts of a data set: some of its images, and the images of each size."""

from __future__ import annotations

import torch
from torch import Tensor

from .crops import Uncropped

__all__ = ["Part", "of_one_size", "parts_of"]


class Part(torch.utils.data.Dataset):
    """Some images of a data set, as a data set; "ids" remain their rows in the whole.

    Args:
        whole: a data set that is not streamed.
        rows: the rows of its images.

    Attributes:
        shape, normalization, white, is_picture, classes, condition_channels, columns, prompts, note: as of the whole.
        downsampling, is_cropped: as of the whole.
        original_sizes: those of its images, see `PictureData`.
        number: number of images.
        examples: images for repeated use: all of them.
    """

    def __init__(self, whole, rows: list[int]):
        self._whole, self._rows = whole, rows
        self.shape, self.normalization, self.is_picture = whole.shape, whole.normalization, whole.is_picture
        self.classes, self.condition_channels, self.prompts = whole.classes, whole.condition_channels, whole.prompts
        self.columns, self.white = whole.columns, whole.white
        self.is_cropped = getattr(whole, "is_cropped", False)
        self.note, self.downsampling = whole.note, getattr(whole, "downsampling", 1)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def number(self) -> int:
        return len(self)

    @property
    def examples(self) -> Part:
        return self

    @property
    def uncropped(self) -> Uncropped:
        """The same images in the size in which they are stored."""
        return Uncropped(self._whole.uncropped.__getitems__, self._rows)

    @property
    def original_sizes(self) -> Tensor | None:
        sizes = self._whole.original_sizes
        return None if sizes is None else sizes[self._rows]

    @property
    def content(self) -> str:
        """Identifies the images of the whole and what belongs to them."""
        return self._whole.content

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Reads the batch of these indices, as the whole does."""
        return self._whole.__getitems__([self._rows[index] for index in indices])


def parts_of(data) -> list:
    """Returns the data set of each size: those of `Buckets`, or the data set itself."""
    return getattr(data, "parts", [data])


def of_one_size(data) -> list[range]:
    """Returns the indices of the images of each of `parts_of`, in order."""
    ends, parts = 0, []
    for part in parts_of(data):
        parts.append(range(ends, ends := ends + len(part)))
    return parts
