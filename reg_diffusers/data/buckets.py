"""Images in several sizes near their own aspect ratios, for batches of one size each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard
from torch import Tensor

from ..runs.checkpoint import Progress
from ..runtime.errors import warn
from .content import joined
from .loader import prepared_loader
from .pictures_data import PictureData

__all__ = ["BucketBatches", "Buckets", "bucket_dataloader", "bucket_sizes", "cropped", "nearest_sizes"]

_LARGEST_RATIO = 4  # of the sides; longer images are cropped to it


def bucket_sizes(size: tuple[int, int], multiple: int) -> list[tuple[int, int]]:
    """Returns the sizes (height, width) with at most the area of `size` and sides that are multiples.

    For each width, there is the largest such height, and the reverse. No side is longer than four times the other.
    """
    area, found = size[0] * size[1], set()
    for one in range(multiple, math.isqrt(_LARGEST_RATIO * area) + 1, multiple):
        other = area // one // multiple * multiple
        if other and max(one, other) <= _LARGEST_RATIO * min(one, other):
            found |= {(one, other), (other, one)}
    return sorted(found)


def nearest_sizes(images: np.ndarray, sizes: Sequence[tuple[int, int]]) -> np.ndarray:
    """Returns, for the sizes of images (N, 2), the indices of the sizes with the nearest aspect ratio, (N,).

    Of sizes with one aspect ratio, the largest is taken.
    """
    order = sorted(range(len(sizes)), key=lambda place: -math.prod(sizes[place]))
    wanted = np.log([sizes[place][0] / sizes[place][1] for place in order])
    distances = np.abs(np.log(images[:, 0] / images[:, 1])[:, None] - wanted).round(12)
    return np.array(order)[distances.argmin(1)]


def cropped(images: np.ndarray, sizes: np.ndarray) -> float:
    """Returns the mean share of an image (N, 2) that is cut off to fit its size (N, 2)."""
    ratio = images[:, 0] * sizes[:, 1] / (images[:, 1] * sizes[:, 0])
    return float(1 - np.minimum(ratio, 1 / ratio).mean())


class Buckets(torch.utils.data.Dataset):
    """A data set of images in several sizes; the images of a batch must have one size, see `BucketBatches`.

    Attributes:
        parts: the images of each size.
        shape: (C, H, W) of the most frequent size, which is that of samples.
        note: a line to print at the start, next to the number and shape of the data.
        number: number of images.
        examples: the images of the most frequent size, for repeated use.
        normalization, is_picture, prompts, classes, condition_channels, columns, content, white: as in `PictureData`.

    Args:
        parts: the images of each size; none is empty.
        share_cropped: mean share of an image that was cut off.
    """

    prompts = None
    is_picture = True

    def __init__(self, parts: Sequence[PictureData], share_cropped: float):
        self.parts = list(parts)
        self.examples = max(self.parts, key=len)
        self.shape, self.normalization = self.examples.shape, self.examples.normalization
        self.classes, self.condition_channels = self.examples.classes, self.examples.condition_channels
        self.columns, self.white = self.examples.columns, self.examples.white
        self.fingerprint = " ".join(part.fingerprint for part in self.parts)
        self.content = joined(part.content for part in self.parts)
        self._ends = np.cumsum([len(part) for part in self.parts])
        numbers = ", ".join(f"{name}: {number:,}" for name, number in self.numbers().items())
        depth = f"; {self.examples.note}" if self.examples.note else ""
        self.note = f"{len(self.parts)} sizes ({numbers}), {share_cropped:.1%} of an image cropped on average{depth}"

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def number(self) -> int:
        return len(self)

    def numbers(self) -> dict[str, int]:
        """Returns the number of images of each size, by WIDTHxHEIGHT."""
        return {f"{part.shape[2]}x{part.shape[1]}": len(part) for part in self.parts}

    @property
    def members(self) -> list[range]:
        """The indices of the images of each size."""
        return [range(end - len(part), end) for part, end in zip(self.parts, self._ends.tolist(), strict=True)]

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Reads a batch of images of one size, as `PictureData` does; "ids" are the indices.

        Raises:
            ValueError: if the images differ in size.
        """
        places = np.searchsorted(self._ends, indices, side="right")
        if len(set(places.tolist())) > 1:
            raise ValueError("images of different sizes cannot share a batch")
        part = self.parts[places[0]]
        start = int(self._ends[places[0]]) - len(part)
        return {**part.__getitems__([index - start for index in indices]), "ids": torch.tensor(indices)}


class BucketBatches:
    """The batch sampler of one process: batches of one size, in an order that depends on the seed and the epoch.

    In each step all processes have images of the same size, so that none waits for another. Each image is drawn once
    an epoch; the last batches of a size are smaller, and with P processes up to P - 1 images of a size are left out.

    Args:
        members: the indices of each size.
        batch_size: images per process and step.
        seed: the seed of the order.
        process: the index of this process.
        processes: the number of processes, P.
        progress: the progress of the training, for an epoch that another number of processes has begun.
    """

    drop_last = True

    def __init__(
        self,
        members: Sequence[Sequence[int]],
        batch_size: int,
        seed: int,
        process: int = 0,
        processes: int = 1,
        progress: Progress | None = None,
    ):
        self.batch_size = batch_size
        self._members = [np.asarray(one) for one in members]
        self._seed, self._process, self._processes = seed, process, processes
        self._epoch = 0
        self._progress = progress or Progress()

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        """Returns the number of batches of a whole epoch, the same on all processes."""
        return sum(len(_starts(len(one), self._processes, self.batch_size)) for one in self._members)

    def __iter__(self) -> Iterator[list[int]]:
        left = self._members
        for processes, batch_size, batches in self._progress.divisions:
            drawn = self._steps(left, processes, batch_size)[:batches]
            left = [np.setdiff1d(one, np.concatenate(drawn)) for one in left] if drawn else left
        for step in self._steps(left, self._processes, self.batch_size):
            yield np.array_split(step, self._processes)[self._process].tolist()

    def _steps(self, members: Sequence[np.ndarray], processes: int, batch_size: int) -> list[np.ndarray]:
        """Divides the images of each size into steps of all processes; returns these in a random order."""
        random = np.random.default_rng([self._seed, self._epoch])
        steps = []
        for one in members:
            shuffled = random.permutation(one)
            steps += [
                shuffled[start : start + batch_size * processes] for start in _starts(len(one), processes, batch_size)
            ]
        return [steps[place] for place in random.permutation(len(steps))]


def _starts(number: int, processes: int, batch_size: int) -> range:
    """Returns where the steps of a size begin; each has an image for every process."""
    return range(0, number - processes + 1, batch_size * processes)


def _small_sizes(data: Buckets, batch_size: int, processes: int) -> str:
    """Names the sizes that cannot fill a step; "" without any."""
    numbers = data.numbers()
    unused = [f"{size} ({number})" for size, number in numbers.items() if number < processes]
    small = [f"{size} ({number})" for size, number in numbers.items() if processes <= number < batch_size * processes]
    lines = []
    if small:
        lines.append(f"fewer images than a step takes, so its batches are smaller: {', '.join(small)}")
    if unused:
        lines.append(f"fewer images than there are processes, so they are never used: {', '.join(unused)}")
    return "--buckets: " + "; ".join(lines) if lines else ""


def bucket_dataloader(
    data: Buckets,
    batch_size: int,
    seed: int,
    num_workers: int,
    accelerator: Accelerator,
    progress: Progress,
) -> DataLoaderShard:
    """Builds a loader of batches of one size, already prepared: accelerate expects batches of equal length.

    Warns of sizes with fewer images than a step of all processes takes.
    """
    if accelerator.is_main_process and (line := _small_sizes(data, batch_size, accelerator.num_processes)):
        warn(line)
    batches = BucketBatches(
        data.members, batch_size, seed, accelerator.process_index, accelerator.num_processes, progress
    )
    return prepared_loader(data, batches, seed, num_workers, accelerator)
