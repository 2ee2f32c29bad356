"""Training data: from whatever the user has to batches of (B, C, H, W).

Pictures are decoded, resized and cropped once, to uint8 in a cache that `datasets` memory-maps; the embedded data set
takes the same path. Arrays of fields are memory-mapped as they are. Both become samples in [-1, 1] by one affine
`Normalization`, applied to a whole batch on its device.
"""

from __future__ import annotations

import argparse
import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .errors import UsageError

__all__ = ["FieldData", "Normalization", "PictureData", "flip_half", "load_training_data", "make_dataloader"]

EMBEDDED = Path(__file__).parents[1] / "data" / "fashion_mnist.parquet"
_FIELD_SUFFIXES = (".npy", ".npz")


@dataclass(frozen=True)
class Normalization:
    """The affine map between values as stored and samples in [-1, 1]: value = offset + scale * sample.

    Attributes:
        offset: one number per channel, or a single one.
        scale: likewise, above 0.
    """

    offset: tuple[float, ...]
    scale: tuple[float, ...]

    def normalize(self, values: Tensor) -> Tensor:
        """(B, C, H, W) stored values of any type -> float32 samples."""
        offset, scale = (_per_channel(numbers, values.device) for numbers in (self.offset, self.scale))
        return (values.float() - offset) / scale


@functools.cache  # copying to an accelerator at every batch would wait for it
def _per_channel(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32, device=device).reshape(1, -1, 1, 1)


PICTURES = Normalization(offset=(127.5,), scale=(127.5,))


class PictureData(torch.utils.data.Dataset):
    """Pictures as uint8, with their class labels and conditioning images where they are wanted.

    Attributes:
        shape: (C, H, W).
        normalization: from 0..255 to [-1, 1], of the conditioning images too.
        classes: names of the classes, or None.
        condition_channels: channels K of the conditioning images, 0 without.
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

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """The batch of these indices: {"values": (B, C, H, W) float32, "ids": (B,)}."""
        values = torch.from_numpy(np.asarray(self._array[indices], dtype=np.float32))
        return {"values": values, "ids": torch.tensor(indices)}


def load_training_data(
    args: argparse.Namespace,
    channels: int | None = None,
    resolution: int | None = None,
    normalization: Normalization | None = None,
    condition_channels: int | None = None,
) -> PictureData | FieldData:
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
    fields = _field_file(args.dataset_name or args.train_data_dir)
    if fields is not None:
        data = FieldData(_read_fields(fields), normalization)
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


def make_dataloader(args: argparse.Namespace, data: PictureData | FieldData, num_processes: int):
    """Shuffled batches; the last, short one is left out where there is a full one."""
    return torch.utils.data.DataLoader(
        data,
        batch_size=args.train_batch_size,
        shuffle=True,
        num_workers=args.dataloader_num_workers,
        collate_fn=_as_it_is,
        drop_last=len(data) >= args.train_batch_size * num_processes,
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
) -> PictureData:
    from datasets import Image
    from datasets.config import HF_DATASETS_CACHE

    from .pictures import decode_table, is_grey

    table = _read_table(args)
    conditioning = args.conditioning_image_column
    column = _image_column(table, args.image_column, other_than=conditioning)
    if conditioning is not None:
        _image_column(table, conditioning, flag="--conditioning_image_column")
    label_column = _label_column(table, args) if args.class_conditional else None
    classes = None
    if label_column is not None:
        table, classes = _with_class_labels(table, label_column)
    columns = {"pixels": (column, channels)}
    if conditioning is not None:
        columns["condition"] = (conditioning, condition_channels or None)
    table = table.select_columns([name for name, _ in columns.values()] + (["class_label"] if classes else []))
    found = {}
    for name, _ in columns.values():
        table = table.cast_column(name, Image(decode=False))
    cache_dir = Path(args.cache_dir or HF_DATASETS_CACHE) / "reg_diffusers"
    for into, (name, wanted) in columns.items():
        found[into] = wanted or (1 if is_grey(table, name) else 3)
        if found[into] not in (1, 3):
            raise UsageError(
                f"the given model has {found[into]} channels, pictures have 1 or 3: use .npy fields (N, C, H, W)"
            )
        table = decode_table(
            table, name, into, resolution, found[into], cache_dir, skip_bad_images=args.skip_bad_images
        )
    return PictureData(table, (found["pixels"], resolution, resolution), classes, found.get("condition", 0))


def _read_table(args: argparse.Namespace):
    """The rows as `datasets` reads them, not yet decoded."""
    from datasets import DatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DatasetNotFoundError

    name, folder, cache_dir = args.dataset_name, args.train_data_dir, args.cache_dir
    flag = "--dataset_name" if name else "--train_data_dir"
    try:
        if name is None and folder is None:
            found = load_dataset("parquet", data_files=str(EMBEDDED), cache_dir=cache_dir)
        elif name is None:
            if not Path(folder).is_dir():
                raise UsageError(f"--train_data_dir {folder}: no such folder")
            found = load_dataset("imagefolder", data_dir=folder, cache_dir=cache_dir)
        elif any((Path(name) / mark).is_file() for mark in ("dataset_dict.json", "state.json")):
            found = load_from_disk(name)
        elif Path(name).is_file():
            kind = Path(name).suffix.lstrip(".")
            if kind not in ("parquet", "arrow"):
                raise UsageError(f"--dataset_name {name}: a file must be .parquet, .arrow, .npy or .npz")
            found = load_dataset(kind, data_files=name, cache_dir=cache_dir)
        else:
            found = load_dataset(name, args.dataset_config_name, cache_dir=cache_dir)
    except (DatasetNotFoundError, FileNotFoundError, ValueError, ConnectionError, OSError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{flag} {name or folder}: cannot be read: {_first_line(error)}") from error
    if isinstance(found, DatasetDict):
        if "train" not in found and len(found) > 1:
            raise UsageError(f"{flag} {name or folder}: no split 'train' among {', '.join(found)}")
        found = found.get("train") or next(iter(found.values()))
    if len(found) == 0:
        raise UsageError(f"{flag} {name or folder}: holds no images")
    return found


def _image_column(table, wanted: str | None, *, flag: str = "--image_column", other_than: str | None = None) -> str:
    from datasets import Image

    images = [name for name, feature in table.features.items() if isinstance(feature, Image) or _holds_bytes(feature)]
    if wanted is None and (others := [name for name in images if name != other_than]):
        return others[0]
    if wanted in images:
        return wanted
    columns = ", ".join(f"{name} ({_kind(feature)})" for name, feature in table.features.items())
    problem = "no column of images" if wanted is None else f"{flag} {wanted!r} is not a column of images"
    raise UsageError(f"{problem}; the columns are: {columns}")


def _holds_bytes(feature) -> bool:
    """Whether a column without the metadata of `datasets` can hold encoded images, as pandas writes them."""
    return isinstance(feature, dict) and set(feature) == {"bytes", "path"}


def _label_column(table, args: argparse.Namespace) -> str:
    column = args.label_column or "label"
    if column not in table.column_names:
        raise UsageError(
            f"--class_conditional: no column {column!r} among {', '.join(table.column_names)}; name it by"
            " --label_column, or put each class into a subfolder of its own"
        )
    return column


def _with_class_labels(table, column: str):
    """The table with an int64 column "class_label" of 0..n-1, and the names of the n classes.

    Labels without names are numbered in their order: 2 before 10, "ant" before "bee".
    """
    from datasets import ClassLabel

    feature, values = table.features[column], table.select_columns(column)[column][:]
    if any(value is None or isinstance(value, float) for value in values):
        raise UsageError(f"--label_column {column}: every image needs a whole number or a word, some have none")
    if isinstance(feature, ClassLabel):
        names, labels = feature.names, np.asarray(values, dtype=np.int64)
        if labels.min() < 0:
            raise UsageError(f"--label_column {column}: some images have no label")
    else:
        found, labels = np.unique(values, return_inverse=True)
        names = [str(name) for name in found]
    table = table.remove_columns([name for name in ("class_label",) if name in table.column_names])
    return table.add_column("class_label", labels.astype(np.int64)), names


def _field_file(path: str | None) -> Path | None:
    """The array file that a path names, itself or as the only one of a folder."""
    if path is None:
        return None
    path = Path(path)
    if path.suffix in _FIELD_SUFFIXES:
        if not path.is_file():
            raise UsageError(f"{path}: no such file")
        return path
    inside = sorted(file for file in path.iterdir() if not file.name.startswith(".")) if path.is_dir() else []
    if any(file.suffix not in _FIELD_SUFFIXES for file in inside):
        return None  # a folder of pictures, whatever else lies there
    if len(inside) > 1:
        raise UsageError(f"{path} holds {len(inside)} array files: name one of them, such as {inside[0]}")
    return inside[0] if inside else None


def _read_fields(path: Path) -> np.ndarray:
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        if path.suffix == ".npz":
            if len(found.files) != 1:
                raise UsageError(f"{path}: must hold one array, holds {', '.join(found.files)}")
            found = found[found.files[0]]
    except (OSError, ValueError, EOFError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path}: not an array file that can be read: {_first_line(error)}") from error
    if found.ndim != 4 or found.dtype.kind not in "fiu" or 0 in found.shape:
        raise UsageError(f"{path}: must hold numbers of shape (N, C, H, W), holds {found.dtype} {found.shape}")
    return found


def _range_normalization(array: np.ndarray) -> Normalization:
    """From each channel's minimum and maximum, read a thousand fields at a time, to [-1, 1]."""
    chunks = [array[start : start + 1000] for start in range(0, len(array), 1000)]
    low = np.min([chunk.min(axis=(0, 2, 3)) for chunk in chunks], axis=0).astype(np.float64)
    high = np.max([chunk.max(axis=(0, 2, 3)) for chunk in chunks], axis=0).astype(np.float64)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise UsageError("the fields hold infinite or missing (nan) values: replace or leave out these fields")
    scale = np.where(high > low, (high - low) / 2, 1.0)  # a constant channel becomes 0
    return Normalization(tuple(((high + low) / 2).tolist()), tuple(scale.tolist()))


def _kind(feature) -> str:
    return getattr(feature, "dtype", None) or type(feature).__name__


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
