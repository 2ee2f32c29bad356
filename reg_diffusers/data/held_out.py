"""Images that are held out from a training: a share of the data, or data of their own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..runtime.errors import UsageError
from ..runtime.messages import bars_are_hidden
from .crops import Uncropped

__all__ = ["Part", "digest_of", "split_rows", "without_twins"]

_AT_A_TIME = 256


class Part(torch.utils.data.Dataset):
    """Some images of a data set, as a data set; "ids" remain their rows in the whole.

    Args:
        whole: a data set that is not streamed.
        rows: the rows of its images.

    Attributes:
        shape, normalization, white, is_picture, classes, condition_channels, columns, prompts, note: as of the whole.
        downsampling, is_cropped: as of the whole.
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
    def content(self) -> str:
        """Identifies the images of the whole and what belongs to them."""
        return self._whole.content

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Reads the batch of these indices, as the whole does."""
        return self._whole.__getitems__([self._rows[index] for index in indices])


def split_rows(number: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Splits the rows of a data set at random: (rows to train on, rows held out), each in order.

    Args:
        number: number of rows.
        share: share of the rows that is held out, rounded to the nearest number.
        seed: seed of the choice; equal seeds give equal splits.

    Raises:
        UsageError: no row would be held out, or none would be left.
    """
    held_out = round(share * number)
    if held_out == 0:
        needed = f"at least {0.5 / number:.2g}" if number > 1 else "--validation_data_dir instead"
        raise UsageError(f"--validation_split {share:g}: holds out none of {number:,} images: use {needed}")
    if held_out == number:
        raise UsageError(f"--validation_split {share:g}: leaves none of {number:,} images to train on: use less")
    order = torch.randperm(number, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[held_out:]), sorted(order[:held_out])


def digest_of(data) -> str:
    """Returns a hash of the content of all images, in order."""
    return hashlib.sha256(b"".join(_contents(data, "reading held-out images"))).hexdigest()


def without_twins(held_out, trained_on) -> list[int]:
    """Returns the rows of the held-out images that are not also trained on, compared by their content.

    Args:
        held_out: images in their final size and channels.
        trained_on: images of the training, likewise.
    """
    contents = list(_contents(held_out, "reading held-out images"))
    wanted = set(contents)
    twins = {content for content in _contents(trained_on, "comparing held-out images") if content in wanted}
    return [row for row, content in enumerate(contents) if content not in twins]


def _contents(data, what: str) -> Iterator[bytes]:
    """Yields a hash of the values of each image, in order."""
    starts = range(0, len(data), _AT_A_TIME)
    for start in tqdm(starts, desc=what, unit="batch", leave=False, disable=bars_are_hidden() or len(starts) < 100):
        values = data.__getitems__(list(range(start, min(start + _AT_A_TIME, len(data)))))["values"]
        values = values if values.dtype == torch.uint8 else data.normalization.normalize(values)
        yield from (hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest() for image in values)
