"""Loads training data and draws batches of (B, C, H, W) from it.

Images are decoded, resized and cropped once, to uint8 in a cache that `datasets` memory-maps; the embedded data set is
loaded in the same way. A stream of images is decoded while it is read. Arrays of fields are memory-mapped. An affine
`Normalization` converts a whole batch on its device to samples in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from accelerate import Accelerator
from torch.utils.data import BatchSampler, RandomSampler

from ..runs.checkpoint import Progress
from ..runtime.errors import UsageError
from ..settings.data import DataSettings
from ..settings.optimization import OptimizationSettings
from ..settings.size import shown, sides
from .buckets import BucketBatches, Buckets, bucket_dataloader
from .column_values import check_masks
from .columns import Wanted
from .fields import FieldData, check_order, field_file, read_fields
from .latents import LatentData
from .load_pictures import OfModel, cache_folder, load_pictures
from .loader import unchanged
from .normalization import Normalization
from .pictures_data import PictureData
from .source import FLAGS_OF_TRAINING, Naming, source_of
from .stream_batches import stream_dataloader
from .streamed_latents import StreamedLatents
from .streaming import StreamedPictures
from .tables import EMBEDDED, LabelsError

__all__ = [
    "FieldData",
    "LabelsError",
    "LatentData",
    "Naming",
    "Normalization",
    "PictureData",
    "StreamedLatents",
    "TrainingData",
    "Wanted",
    "batches_per_epoch",
    "cache_folder",
    "load_training_data",
    "make_dataloader",
]


TrainingData = PictureData | Buckets | FieldData | StreamedPictures | LatentData | StreamedLatents


def load_training_data(
    settings: DataSettings,
    channels: int | None = None,
    size: tuple[int, int] | None = None,
    normalization: Normalization | None = None,
    condition_channels: int | None = None,
    naming: Naming = FLAGS_OF_TRAINING,
    wanted: Sequence[Wanted] = (),
    white: int | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
    *,
    takes_sizes: bool = False,
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
        white: the white of a given model of pictures with all their bits; such pictures are read for it.
        sizes: the heights and widths that --buckets chooses from; by default, all of about the area of `size`.
        takes_sizes: whether a given model takes the sizes of images, see `image_sizes`.

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
        if settings.channels is not None:
            raise UsageError(
                f"--channels {settings.channels}: fields keep their channels, here {data.shape[0]}; drop it"
            )
        if settings.random_crop:
            raise UsageError("--random_crop crops images, but fields keep their size; drop the flag")
        if settings.buckets:
            raise UsageError("--buckets groups images by aspect ratio, but fields keep their size; drop the flag")
        if settings.resolution is not None and sides(settings.resolution) != data.shape[1:]:
            raise UsageError(
                f"--resolution {settings.resolution}: fields keep their size, here {shown(data.shape[1:])}; drop it"
            )
    else:
        size = size if settings.resolution is None else sides(settings.resolution)
        model = OfModel(channels, condition_channels, normalization, white, takes_sizes)
        data = load_pictures(settings, size or (64, 64), model, naming, wanted, sizes)
        if settings.field_scale != "channel" and data.is_picture:
            raise UsageError(f"--field_scale {settings.field_scale} applies to fields only; drop the flag")
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
        data: the training data; of latents that are encoded in each step, the loader returns the images.
        settings: the settings with the batch size and the seed of the order.
        workers: number of processes that load data; 0 loads in this process.
        accelerator: the accelerator, which must still prepare the loader.
        progress: the progress of the training, from which a stream and a divided epoch continue.
    """
    data = data.images if isinstance(data, StreamedLatents) else data
    if isinstance(data, StreamedPictures):
        return stream_dataloader(data, settings.train_batch_size, settings.seed, workers, accelerator, progress)
    if isinstance(data, Buckets):
        batch_size, seed = settings.train_batch_size, settings.seed
        return bucket_dataloader(data, batch_size, seed, workers, accelerator, progress)
    # a separate generator: otherwise, each epoch or resumed run would draw from that of the noise
    generator = torch.Generator().manual_seed(settings.seed)
    drop_last = len(data) >= settings.train_batch_size * accelerator.num_processes
    order = RandomSampler(data, generator=generator)
    return torch.utils.data.DataLoader(
        data.uncropped if getattr(data, "is_cropped", False) else data,
        batch_sampler=_BatchesLeft(order, settings.train_batch_size, drop_last, progress),
        num_workers=workers,
        collate_fn=unchanged,
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
