"""Images in several sizes near their own aspect ratios, for batches of one size each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard
from torch import Tensor

from ..runs.checkpoint import Progress
from ..runtime.errors import warn
from .content import joined
from .loader import prepared_loader
from .parts import Part, of_one_size

__all__ = ["BucketBatches", "Buckets", "bucket_dataloader", "bucket_sizes", "cropped", "each_size", "nearest_sizes"]
__all__ += ["part_of"]

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
        normalization, is_picture, prompts, classes, condition_channels, columns, white: those of `examples`.
        downsampling: as in `LatentData`; 1 for images.
        content: identifies the images and everything that belongs to them.
        original_sizes: see `PictureData`.

    Args:
        parts: the images of each size, or their latents; none is empty.
        share_cropped: mean share of an image that was cut off; None for latents, whose note does not repeat the sizes.
        starts: the id of the first image of each size; default: ids are places in this data set.
    """

    is_picture = True

    def __init__(self, parts: Sequence, share_cropped: float | None, starts: Sequence[int] | None = None):
        self.parts = list(parts)
        self._share_cropped = share_cropped
        self.examples = max(self.parts, key=len)
        self.shape, self.normalization = self.examples.shape, self.examples.normalization
        self.condition_channels = self.examples.condition_channels
        self.columns, self.white, self.prompts = self.examples.columns, self.examples.white, self.examples.prompts
        self.downsampling = getattr(self.examples, "downsampling", 1)
        self._starts = [one.start for one in self.members] if starts is None else list(starts)
        self.note = self.examples.note if share_cropped is None else self._sizes(share_cropped)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def number(self) -> int:
        return len(self)

    @property
    def classes(self) -> list[str] | None:
        return self.examples.classes

    @property
    def content(self) -> str:
        return joined(part.content for part in self.parts)

    @property
    def captions(self) -> list[str | None]:
        """The texts of the images, in order; only with a column of captions."""
        return [caption for part in self.parts for caption in part.captions]

    @property
    def original_sizes(self) -> Tensor | None:
        sizes = [part.original_sizes for part in self.parts]
        return None if sizes[0] is None else torch.cat(sizes)

    def numbers(self) -> dict[str, int]:
        """Returns the number of images of each size, by WIDTHxHEIGHT in pixels."""
        shapes = ([self.downsampling * side for side in part.shape[:0:-1]] for part in self.parts)
        return {f"{width}x{height}": len(part) for (width, height), part in zip(shapes, self.parts, strict=True)}

    def _sizes(self, share_cropped: float) -> str:
        numbers = ", ".join(f"{name}: {number:,}" for name, number in self.numbers().items())
        more = f"; {self.examples.note}" if self.examples.note else ""
        return f"{len(self.parts)} sizes ({numbers}), {share_cropped:.1%} of an image cropped on average{more}"

    @property
    def members(self) -> list[range]:
        """The indices of the images of each size."""
        return of_one_size(self)

    def some(self, rows: Sequence[int]) -> Buckets:
        """Returns the images of these rows, in order; sizes without any are left out."""
        kept = []
        for part, members, start in zip(self.parts, self.members, self._starts, strict=True):
            if chosen := [row - members.start for row in rows if row in members]:
                kept.append((Part(part, chosen), start))
        parts, starts = zip(*kept, strict=True)
        return Buckets(parts, self._share_cropped, starts)

    def each_size(self, function: Callable) -> Buckets:
        """See the function of this name."""
        parts = [function(part, rows) for part, rows in zip(self.parts, self.members, strict=True)]
        return Buckets(parts, None, self._starts)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Reads a batch of images of one size, as `PictureData` does.

        Raises:
            ValueError: if the images differ in size.
        """
        (place, members), *others = [
            (place, one) for place, one in enumerate(self.members) if any(index in one for index in indices)
        ]
        if others:
            raise ValueError("images of different sizes cannot share a batch")
        batch = self.parts[place].__getitems__([index - members.start for index in indices])
        return {**batch, "ids": batch["ids"] + self._starts[place]}


def part_of(data, rows: Sequence[int]):
    """Returns some images of a data set, in order; their ids remain their rows in the whole."""
    return data.some(rows) if isinstance(data, Buckets) else Part(data, rows)


def each_size(data, function: Callable):
    """Returns what a function makes of the images of each size, as one data set.

    Args:
        data: a data set of images.
        function: (images of one size, their rows in `data`) -> data set.
    """
    return data.each_size(function) if isinstance(data, Buckets) else function(data, range(len(data)))


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
