"""Images that are held out from a training: a share of the data, or data of their own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from tqdm.auto import tqdm

from ..runtime.errors import UsageError
from ..runtime.messages import bars_are_hidden
from .parts import of_one_size

__all__ = ["digest_of", "split_rows", "without_twins"]

_AT_A_TIME = 256


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
    of_size = of_one_size(data)
    batches = [list(rows[start : start + _AT_A_TIME]) for rows in of_size for start in range(0, len(rows), _AT_A_TIME)]
    for rows in tqdm(batches, desc=what, unit="batch", leave=False, disable=bars_are_hidden() or len(batches) < 100):
        values = data.__getitems__(rows)["values"]
        values = values if values.dtype == torch.uint8 else data.normalization.normalize(values)
        yield from (hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest() for image in values)
