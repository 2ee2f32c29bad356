"""Loads training data and draws batches of (B, C, H, W) from it.

Images are decoded, resized and cropped once, to uint8 in a cache that `datasets` memory-maps; the embedded data set is
loaded in the same way. A stream of images is decoded while it is read. Arrays of fields are memory-mapped. An affine
`Normalization` converts a whole batch on its device to samples in [-1, 1].
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import BatchSampler, RandomSampler

from ..runs.checkpoint import Progress
from ..runtime.errors import UsageError, warn
from ..settings.data import DataSettings
from ..settings.optimization import OptimizationSettings
from ..settings.size import as_setting, shown, sides
from .buckets import BucketBatches, Buckets, bucket_dataloader, bucket_sizes, cropped, nearest_sizes
from .column_values import check_masks, check_shapes, check_texts, numbers_of
from .columns import Column, Wanted, find_column
from .depth import Depth
from .fields import FieldData, check_order, field_file, read_fields
from .latents import LatentData
from .normalization import Normalization
from .pictures import decode_table, depth_of_table, is_grey, sizes_of_table
from .pictures_data import PictureData
from .source import FLAGS_OF_TRAINING, Naming, Source, source_of
from .stream_batches import stream_dataloader
from .streaming import StreamedPictures
from .tables import (
    EMBEDDED,
    LabelsError,
    caption_column,
    image_column,
    label_column,
    number_of_rows,
    read_rows,
    with_class_labels,
)

__all__ = [
    "FieldData",
    "LabelsError",
    "LatentData",
    "Naming",
    "Normalization",
    "PictureData",
    "TrainingData",
    "Wanted",
    "batches_per_epoch",
    "cache_folder",
    "load_training_data",
    "make_dataloader",
]


TrainingData = PictureData | Buckets | FieldData | StreamedPictures | LatentData


def load_training_data(
    settings: DataSettings,
    channels: int | None = None,
    size: tuple[int, int] | None = None,
    normalization: Normalization | None = None,
    condition_channels: int | None = None,
    naming: Naming = FLAGS_OF_TRAINING,
    wanted: Sequence[Wanted] = (),
) -> TrainingData:
    """Loads the data set that the flags name, for a DataLoader with a `collate_fn` that returns batches unchanged.

    Args:
        settings: the data settings.
        channels: the channels of a given model; by default, 1 for grayscale images, else 3.
        size: height and width of the images if --resolution is not set.
        normalization: the field normalization of a given model; by default, from the data.
        condition_channels: the condition channels of a given model; the default is as for `channels`.
        naming: the names of the data and of that model in messages.
        wanted: what regularizers need of the data.

    Raises:
        UsageError: if there is nothing to read, a column is missing, images are bad, or fields have a wrong shape.
        LabelsError: if class labels are requested, but the data lack usable ones.
    """
    fields = field_file(settings.dataset_name or settings.train_data_dir)
    if fields is not None:
        source_of(settings, EMBEDDED, naming).check(str(fields))
        array = read_fields(fields)
        check_order(fields, array.shape, channels)
        if normalization is not None and settings.field_scale != "channel":
            raise UsageError(
                f"--field_scale {settings.field_scale}: {naming.model} keeps its own scales; drop the flag"
            )
        data = FieldData(array, normalization, settings.field_scale)
        if settings.streaming:
            raise UsageError("--streaming: fields are always read from the disk on demand; drop the flag")
        if settings.class_conditional:
            raise LabelsError(".npy/.npz fields have no class labels")
        if settings.conditioning_image_column:
            raise UsageError("--conditioning_image_column names a column of images, which fields lack")
        if columns := [one for one in wanted if one.text is None]:
            raise UsageError(
                f"--regularizer {columns[0].by} needs {columns[0].name}, a column of the data, which fields lack"
            )
        if settings.buckets:
            raise UsageError("--buckets groups images by aspect ratio, but fields keep their size; drop the flag")
        if settings.resolution is not None and sides(settings.resolution) != data.shape[1:]:
            raise UsageError(
                f"--resolution {settings.resolution}: fields keep their size, here {shown(data.shape[1:])}; drop it"
            )
    else:
        if settings.field_scale != "channel":
            raise UsageError(f"--field_scale {settings.field_scale} applies to .npy/.npz fields only; drop the flag")
        size = size if settings.resolution is None else sides(settings.resolution)
        data = _load_pictures(settings, channels, size or (64, 64), condition_channels, naming, wanted)
    if channels is not None and data.shape[0] != channels:
        raise UsageError(f"the data have {data.shape[0]} channels, but {naming.model} has {channels}")
    if condition_channels is not None and data.condition_channels != condition_channels:
        fix = "name the images by --conditioning_image_column" if condition_channels else "drop the flag"
        raise UsageError(
            f"{naming.model} is conditioned on {condition_channels or 'no'} image channels, but the data have"
            f" {data.condition_channels or 'none'}: {fix}"
        )
    check_masks(data)
    return data


def batches_per_epoch(data: TrainingData, batch_size: int, processes: int) -> int | None:
    """Returns the number of batches that each process draws in an epoch; None for a stream of unknown length."""
    if isinstance(data, Buckets):
        return len(BucketBatches(data.members, batch_size, 0, processes=processes))
    return None if data.number is None else data.number // (batch_size * processes) or 1  # drops an incomplete batch


def make_dataloader(
    data: TrainingData,
    settings: OptimizationSettings,
    workers: int,
    accelerator: Accelerator,
    progress: Progress,
):
    """Builds a loader of shuffled batches; it drops a last, shorter batch if there is a full one. A stream never ends.

    Args:
        data: the training data.
        settings: the settings with the batch size and the seed of the order.
        workers: number of processes that load data; 0 loads in this process.
        accelerator: the accelerator, which must still prepare the loader.
        progress: the progress of the training, from which a stream and a divided epoch continue.
    """
    if isinstance(data, StreamedPictures):
        return stream_dataloader(data, settings.train_batch_size, settings.seed, workers, accelerator, progress)
    if isinstance(data, Buckets):
        batch_size, seed = settings.train_batch_size, settings.seed
        return bucket_dataloader(data, batch_size, seed, workers, accelerator, progress, _identity)
    # a separate generator: otherwise, each epoch or resumed run would draw from that of the noise
    generator = torch.Generator().manual_seed(settings.seed)
    drop_last = len(data) >= settings.train_batch_size * accelerator.num_processes
    order = RandomSampler(data, generator=generator)
    return torch.utils.data.DataLoader(
        data,
        batch_sampler=_BatchesLeft(order, settings.train_batch_size, drop_last, progress),
        num_workers=workers,
        collate_fn=_identity,
        pin_memory=accelerator.device.type == "cuda",
        generator=generator,
        persistent_workers=workers > 0,
    )


class _BatchesLeft(BatchSampler):
    """The batches of an epoch without the images that were drawn before another number of processes continued it.

    Its length is that of a whole epoch.
    """

    def __init__(self, sampler, batch_size: int, drop_last: bool, progress: Progress):
        super().__init__(sampler, batch_size, drop_last)
        self._progress = progress

    def __iter__(self):
        left = islice(self.sampler, self._progress.images_drawn(), None)
        return iter(BatchSampler(left, self.batch_size, self.drop_last))


def _identity(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch


def _load_pictures(
    settings: DataSettings,
    channels: int | None,
    size: tuple[int, int],
    condition_channels: int | None,
    naming: Naming,
    needed: Sequence[Wanted],
) -> PictureData | Buckets | StreamedPictures:
    from datasets import Dataset, Image

    _check_cache_dir(settings.cache_dir)
    source = source_of(settings, EMBEDDED, naming)
    conditioning = settings.conditioning_image_column
    named = {one.column for one in needed} | ({conditioning} if conditioning else set())
    table, unused = read_rows(settings, source, streaming=settings.streaming, images=named)
    found = [find_column(table, one) for one in needed]
    if conditioning is not None:
        image_column(table, conditioning, flag="--conditioning_image_column")
    column = image_column(table, settings.image_column, other_than=named)
    if column == conditioning:
        raise UsageError(f"--conditioning_image_column {column}: is the column of the training images: name another")
    label, classes = label_column(table, settings) if settings.class_conditional else None, None
    if label is not None:
        table, label, classes = with_class_labels(table, label)
    if unused:
        warn(f"{settings.dataset_name or settings.train_data_dir}: {unused}")
    columns = {"pixels": (column, channels)}
    if conditioning is not None:
        columns["condition"] = (conditioning, condition_channels or None)
    if any(wanted not in (None, 1, 3) for _, wanted in columns.values()):
        wanted = next(wanted for _, wanted in columns.values() if wanted not in (None, 1, 3))
        raise UsageError(f"{naming.model} has {wanted} channels, but images have 1 or 3: use .npy fields (N, C, H, W)")
    columns |= {one.place: (one.source, 1 if one.kind == "mask" else None) for one in found if one.is_image}
    images = dict.fromkeys(name for name, _ in columns.values())
    caption = None if settings.caption_column is None else caption_column(table, settings.caption_column)
    others = (label, caption, *(one.source for one in found))
    table = table.select_columns(list(dict.fromkeys([*images, *(name for name in others if name)])))
    for name in images:
        table = table.cast_column(name, Image(decode=False))
    if settings.buckets and settings.streaming:
        raise UsageError("--buckets: the sizes of all images are needed before the first step; drop --streaming")
    if not settings.streaming:
        _check_columns(settings, table, column, found, source)
        looks = _looks(table, columns, source)
        decode = partial(_decoded, settings, looks, found, classes, source)
        return _bucketed(settings, table, columns, size, source, decode) if settings.buckets else decode(table, size)
    number = len(table) if isinstance(table, Dataset) else number_of_rows(settings, table)
    rows = table.to_iterable_dataset(num_shards=_pieces(number)) if isinstance(table, Dataset) else table
    return StreamedPictures(
        rows, columns, found, label, classes, size, number, source, skip_bad_images=settings.skip_bad_images
    )


def _check_columns(settings: DataSettings, table, pictures: str, columns: Sequence[Column], source: Source) -> None:
    """Checks the columns that regularizers need, before any image is decoded.

    Raises:
        UsageError: values are missing, or a mask has another shape than its picture.
    """
    for column in columns:
        if column.kind == "number":
            numbers_of(table, column)
        elif column.kind == "text" and column.text is None:
            check_texts(table, column)
        elif column.kind == "mask":
            sizes = (
                sizes_of_table(table, name, source, cache_folder(settings.cache_dir))
                for name in (column.source, pictures)
            )
            check_shapes(column, *sizes)


def _bucketed(
    settings: DataSettings, table, columns: dict, size: tuple[int, int], source: Source, decode: Callable
) -> Buckets:
    """Decodes the images of a table in the sizes nearest to their own aspect ratios."""
    sizes = bucket_sizes(size, settings.buckets)
    if not sizes:
        raise UsageError(
            f"--buckets {settings.buckets}: no size with such sides has the area of --resolution {as_setting(size)}:"
            " use a smaller number"
        )
    own = sizes_of_table(table, columns["pixels"][0], source, cache_folder(settings.cache_dir))
    readable = own.min(1) > 0
    if not readable.any():
        raise UsageError(f"{source.flag}: none of the {len(own)} images can be read")
    nearest = np.zeros(len(own), int)
    nearest[readable] = nearest_sizes(own[readable], sizes)
    nearest[~readable] = np.bincount(nearest[readable]).argmax()  # decoding reports or skips them
    parts = [decode(table.select(np.flatnonzero(nearest == place)), sizes[place]) for place in np.unique(nearest)]
    return Buckets(parts, cropped(own[readable], np.array(sizes)[nearest[readable]]))


def _pieces(number: int) -> int:
    """Returns the number of pieces of a streamed table: up to 1,024, of 16 rows or more, as each is slow to open."""
    return min(number, max(number // 16, 64), 1024)


def cache_folder(cache_dir: str | None) -> Path:
    """Returns the folder of decoded and encoded images."""
    from datasets.config import HF_DATASETS_CACHE

    return Path(cache_dir or HF_DATASETS_CACHE) / "reg_diffusers"


def _check_cache_dir(cache_dir: str | None) -> None:
    """Raises UsageError if the cache is not writable."""
    from datasets.config import HF_DATASETS_CACHE

    folder = Path(cache_dir or HF_DATASETS_CACHE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(
            f"--cache_dir {folder}: cannot be written ({error.strerror}): name a writable folder"
        ) from error


@dataclass(frozen=True)
class _Look:
    """How the images of one column are decoded: its name, their channels and depth."""

    column: str
    channels: int
    depth: Depth


def _looks(table, columns: dict, source: Source) -> dict[str, _Look]:
    """Looks at the images of the columns, {"pixels": (name, wanted channels), ...}; detects what is not wanted."""
    return {
        into: _Look(name, wanted or (1 if is_grey(table, name, source) else 3), depth_of_table(table, name, source))
        for into, (name, wanted) in columns.items()
    }


def _decoded(
    settings: DataSettings,
    looks: dict[str, _Look],
    found: Sequence[Column],
    classes: list[str] | None,
    source: Source,
    table,
    size: tuple[int, int],
) -> PictureData:
    """Decodes all images of a table into a cache."""
    left = [look.column for look in looks.values()]
    for into, look in looks.items():
        left.remove(look.column)
        table = decode_table(
            *(table, look.column, into, size, look.channels, look.depth.white, source),
            cache_folder(settings.cache_dir),
            skip_bad_images=settings.skip_bad_images,
            keep=look.column in left,
        )
    pixels, condition = looks["pixels"], looks.get("condition")
    shape = (pixels.channels, *size)
    number = condition.channels if condition else 0
    columns = [replace(one, channels=looks[one.place].channels) if one.is_image else one for one in found]
    return PictureData(table, shape, classes, number, pixels.depth.note, settings.caption_column, columns)
