"""Training data: from whatever the user has to batches of (B, C, H, W).

Pictures are decoded, resized and cropped once, to uint8 in a cache that `datasets` memory-maps; the embedded data set
takes the same path. A stream of pictures is decoded as it is read. Arrays of fields are memory-mapped as they are. All
become samples in [-1, 1] by one affine
`Normalization`, applied to a whole batch on its device.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from .checkpoint import Progress
from .errors import UsageError
from .fields import field_file, read_fields
from .normalization import PICTURES, Normalization
from .pictures import decode_table, is_grey
from .source import Source, source_of
from .streaming import StreamedPictures, stream_dataloader
from .tables import EMBEDDED, image_column, label_column, number_of_rows, read_rows, with_class_labels

__all__ = [
    "FieldData",
    "Normalization",
    "PictureData",
    "TrainingData",
    "flip_half",
    "load_training_data",
    "make_dataloader",
]


class PictureData(torch.utils.data.Dataset):
    """Pictures as uint8, with their class labels and conditioning images where they are wanted.

    Attributes:
        shape: (C, H, W).
        normalization: from 0..255 to [-1, 1], of the conditioning images too.
        classes: names of the classes, or None.
        condition_channels: channels K of the conditioning images, 0 without.
        number: of pictures.
        examples: pictures for what needs the same ones again and again: all of them.
    """

    normalization = PICTURES
    is_picture = True

    def __init__(self, table, shape: tuple[int, int, int], classes: list[str] | None, condition_channels: int = 0):
        self._table = table.with_format("arrow")
        self.shape = shape
        self.classes = classes
        self.condition_channels = condition_channels

    def __len__(self) -> int:
        return len(self._table)

    @property
    def number(self) -> int:
        return len(self)

    @property
    def examples(self) -> PictureData:
        return self

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """The batch of these indices, in one look-up.

        {"values": (B, C, H, W) uint8, "ids": (B,), "condition": (B, K, H, W) uint8, "class_labels": (B,)}
        """
        rows = self._table[indices]
        batch = {"values": _pixels(rows["pixels"], self.shape), "ids": torch.tensor(indices)}
        if self.condition_channels:
            batch["condition"] = _pixels(rows["condition"], (self.condition_channels, *self.shape[1:]))
        if self.classes is not None:
            batch["class_labels"] = torch.from_numpy(rows["class_label"].to_numpy().copy())
        return batch


def _pixels(column, shape: tuple[int, int, int]) -> Tensor:
    """A column of flattened images as a tensor (B, *shape)."""
    return torch.from_numpy(column.combine_chunks().flatten().to_numpy().copy()).reshape(-1, *shape)


class FieldData(torch.utils.data.Dataset):
    """Arrays of numbers that are no pictures, such as temperatures or velocities, at the size they have.

    Attributes:
        shape: (C, H, W).
        normalization: the one given, else from each channel's range over the data set to [-1, 1].
        classes: None.
        number: of fields.
        examples: fields for what needs the same ones again and again: all of them.
    """

    is_picture = False
    classes = None
    condition_channels = 0

    def __init__(self, array: np.ndarray, normalization: Normalization | None = None):
        self._array = array
        self.shape = tuple(array.shape[1:])
        self.normalization = normalization or _range_normalization(array)

    def __len__(self) -> int:
        return len(self._array)

    @property
    def number(self) -> int:
        return len(self)

    @property
    def examples(self) -> FieldData:
        return self

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """The batch of these indices: {"values": (B, C, H, W) float32, "ids": (B,)}."""
        values = torch.from_numpy(np.asarray(self._array[indices], dtype=np.float32))
        return {"values": values, "ids": torch.tensor(indices)}


TrainingData = PictureData | FieldData | StreamedPictures


def load_training_data(
    args: argparse.Namespace,
    channels: int | None = None,
    resolution: int | None = None,
    normalization: Normalization | None = None,
    condition_channels: int | None = None,
) -> TrainingData:
    """The data set that the flags name, ready for a DataLoader whose `collate_fn` leaves batches alone.

    Args:
        args: the settings of `arguments`.
        channels: wanted by a given model; default: 1 if the pictures are grey, else 3.
        resolution: side of the pictures where --resolution does not say.
        normalization: of fields that a given model was trained on; default: from the data.
        condition_channels: wanted by a given model; default: as `channels`.

    Raises:
        UsageError: nothing to read, no such column, bad images, fields of a wrong shape.
    """
    fields = field_file(args.dataset_name or args.train_data_dir)
    if fields is not None:
        source_of(args, EMBEDDED).check(str(fields))
        data = FieldData(read_fields(fields), normalization)
        if args.streaming:
            raise UsageError("--streaming: fields are read from the disk as they are needed anyway; drop the flag")
        if args.class_conditional:
            raise UsageError("--class_conditional needs class labels, which .npy/.npz fields do not have")
        if args.conditioning_image_column:
            raise UsageError("--conditioning_image_column names a column of pictures, which fields do not have")
        if args.resolution not in (None, *data.shape[1:]):
            raise UsageError(f"--resolution {args.resolution}: fields keep their size, here {data.shape[1:]}; drop it")
    else:
        data = _load_pictures(args, channels, args.resolution or resolution or 64, condition_channels)
    if channels is not None and data.shape[0] != channels:
        raise UsageError(f"the data have {data.shape[0]} channels, the given model {channels}")
    if condition_channels is not None and data.condition_channels != condition_channels:
        fix = "name the images by --conditioning_image_column" if condition_channels else "drop the flag"
        raise UsageError(
            f"the given model is conditioned by {condition_channels or 'no'} image channels, the data have"
            f" {data.condition_channels or 'none'}: {fix}"
        )
    return data


def make_dataloader(
    args: argparse.Namespace,
    data: TrainingData,
    accelerator: Accelerator,
    progress: Progress,
):
    """Shuffled batches; the last, short one is left out where there is a full one. Those of a stream never end.

    Args:
        args: the settings of `arguments`.
        data: of the training.
        accelerator: which has yet to prepare the loader.
        progress: of the training; a stream is read from where it is.
    """
    if isinstance(data, StreamedPictures):
        workers = args.dataloader_num_workers
        return stream_dataloader(data, args.train_batch_size, args.seed, workers, accelerator, progress)
    return torch.utils.data.DataLoader(
        data,
        batch_size=args.train_batch_size,
        shuffle=True,
        num_workers=args.dataloader_num_workers,
        collate_fn=_as_it_is,
        drop_last=len(data) >= args.train_batch_size * accelerator.num_processes,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(args.seed),  # else each new epoch or resumed run takes from the noise
        persistent_workers=args.dataloader_num_workers > 0,
    )


def flip_half(samples: Tensor, conditions: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Mirrors each image of (B, C, H, W), left to right, with probability 1/2; its conditioning image with it."""
    flipped = torch.rand(len(samples), 1, 1, 1, device=samples.device) < 0.5
    conditions = {
        name: torch.where(flipped, value.flip(-1), value) if name == "condition" else value
        for name, value in conditions.items()
    }
    return torch.where(flipped, samples.flip(-1), samples), conditions


def _as_it_is(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch


def _load_pictures(
    args: argparse.Namespace, channels: int | None, resolution: int, condition_channels: int | None
) -> PictureData | StreamedPictures:
    from datasets import Dataset, Image

    source = source_of(args, EMBEDDED)
    table = read_rows(args, source, streaming=args.streaming)
    conditioning = args.conditioning_image_column
    column = image_column(table, args.image_column, other_than=conditioning)
    if conditioning is not None:
        image_column(table, conditioning, flag="--conditioning_image_column")
    label, classes = label_column(table, args) if args.class_conditional else None, None
    if label is not None:
        table, label, classes = with_class_labels(table, label)
    columns = {"pixels": (column, channels)}
    if conditioning is not None:
        columns["condition"] = (conditioning, condition_channels or None)
    if any(wanted not in (None, 1, 3) for _, wanted in columns.values()):
        wanted = next(wanted for _, wanted in columns.values() if wanted not in (None, 1, 3))
        raise UsageError(f"the given model has {wanted} channels, pictures have 1 or 3: use .npy fields (N, C, H, W)")
    images = [name for name, _ in columns.values()]
    table = table.select_columns(images + ([label] if label else []))
    for name in images:
        table = table.cast_column(name, Image(decode=False))
    if not args.streaming:
        return _decoded(args, table, columns, classes, resolution, source)
    number = len(table) if isinstance(table, Dataset) else number_of_rows(args, table)
    if number is None and args.max_train_steps is None:
        raise UsageError(f"--streaming: nobody knows how many images {source.flag} has: give --max_train_steps")
    rows = table.to_iterable_dataset(num_shards=min(number, 1024)) if isinstance(table, Dataset) else table
    return StreamedPictures(
        rows, columns, label, classes, resolution, number, source, skip_bad_images=args.skip_bad_images
    )


def _decoded(
    args: argparse.Namespace, table, columns: dict, classes: list[str] | None, resolution: int, source: Source
) -> PictureData:
    """The table with all its images decoded, in a cache."""
    from datasets.config import HF_DATASETS_CACHE

    cache_dir = Path(args.cache_dir or HF_DATASETS_CACHE) / "reg_diffusers"
    channels = {}
    for into, (name, wanted) in columns.items():
        channels[into] = wanted or (1 if is_grey(table, name, source) else 3)
        table = decode_table(
            table, name, into, resolution, channels[into], source, cache_dir, skip_bad_images=args.skip_bad_images
        )
    return PictureData(table, (channels["pixels"], resolution, resolution), classes, channels.get("condition", 0))


def _range_normalization(array: np.ndarray) -> Normalization:
    """From each channel's minimum and maximum, read a thousand fields at a time, to [-1, 1]."""
    chunks = [array[start : start + 1000] for start in range(0, len(array), 1000)]
    low = np.min([chunk.min(axis=(0, 2, 3)) for chunk in chunks], axis=0).astype(np.float64)
    high = np.max([chunk.max(axis=(0, 2, 3)) for chunk in chunks], axis=0).astype(np.float64)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise UsageError("the fields hold infinite or missing (nan) values: replace or leave out these fields")
    scale = np.where(high > low, (high - low) / 2, 1.0)  # a constant channel becomes 0
    return Normalization(tuple(((high + low) / 2).tolist()), tuple(scale.tolist()))
