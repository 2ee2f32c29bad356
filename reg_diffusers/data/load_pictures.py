"""Loads a data set of pictures: finds its columns, looks at its images, and decodes them once or as a stream."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from ..runtime.errors import UsageError, warn
from ..settings.data import DataSettings
from ..settings.size import as_setting
from .buckets import Buckets, bucket_sizes, cropped, nearest_sizes
from .column_values import check_shapes, check_texts, numbers_of
from .columns import Column, Wanted, find_column
from .content import table_digests
from .crops import larger
from .depth import FLOATS, SIXTEEN_BITS, Form
from .image_sizes import with_original_sizes
from .looks import Look, Wish, look_at, rows_looked_at
from .normalization import Normalization, field_normalization
from .pictures import decode_table, sizes_of_table
from .pictures_data import PictureData
from .source import Naming, Source, source_of
from .streaming import StreamedPictures, shards_of_table
from .tables import EMBEDDED, caption_column, image_column, label_column, number_of_rows, read_rows, with_class_labels

__all__ = ["OfModel", "cache_folder", "load_pictures"]


@dataclass(frozen=True)
class OfModel:
    """What a given model decides about the pictures; None: the data decide.

    Attributes:
        channels: their channels.
        condition_channels: channels of the conditioning images.
        normalization: the range of fields.
        white: the white of pictures with all their bits.
        takes_sizes: whether it takes the size of each image before it is resized, and the corner of its crop.
    """

    channels: int | None = None
    condition_channels: int | None = None
    normalization: Normalization | None = None
    white: int | None = None
    takes_sizes: bool = False


def load_pictures(
    settings: DataSettings,
    size: tuple[int, int],
    model: OfModel,
    naming: Naming,
    needed: Sequence[Wanted],
    sizes: Sequence[tuple[int, int]] | None = None,
) -> PictureData | Buckets | StreamedPictures:
    """Loads pictures, as fields if their pixels are floating-point numbers.

    Args:
        settings: the data settings.
        size: height and width of the images.
        model: what a given model decides.
        naming: the names of the data and of that model in messages.
        needed: what regularizers need of the data.
        sizes: the sizes that --buckets chooses from; by default, all of about the area of `size`.

    Raises:
        UsageError: as in `load_training_data`.
    """
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
    wishes = {"pixels": _wish(settings, column, model, naming)}
    if conditioning is not None:
        if model.condition_channels not in (None, 0, 1, 3):
            raise UsageError(
                f"{naming.model} has {model.condition_channels} condition channels, but images have 1 or 3"
            )
        wishes["condition"] = Wish(conditioning, model.condition_channels or None)
    wishes |= {one.place: Wish(one.source, 1 if one.kind == "mask" else None) for one in found if one.is_image}
    images = dict.fromkeys(wish.column for wish in wishes.values())
    caption = None if settings.caption_column is None else caption_column(table, settings.caption_column)
    others = (label, caption, *(one.source for one in found))
    table = table.select_columns(list(dict.fromkeys([*images, *(name for name in others if name)])))
    for name in images:
        table = table.cast_column(name, Image(decode=False))
    if settings.buckets and settings.random_crop:
        raise UsageError("--random_crop: --buckets keeps what a crop would cut off; drop one of the two flags")
    if settings.buckets and settings.streaming:
        raise UsageError("--buckets: the sizes of all images are needed before the first step; drop --streaming")
    if not settings.streaming:
        _check_columns(settings, table, column, found, source)
        rows = [lambda row=row: table[row] for row in rows_looked_at(len(table))]
        looks = {into: look_at(rows, wish, source) for into, wish in wishes.items()}
        own = None
        if settings.buckets or model.takes_sizes:
            own = sizes_of_table(table, column, source, cache_folder(settings.cache_dir))
        if model.takes_sizes:
            table = with_original_sizes(table, own)
        decode = partial(_decoded, settings, looks, found, classes, source)
        if not settings.buckets:
            data = decode(table, size)
            _set_range([data], looks["pixels"].form, settings, model, naming)
            return data
        if looks["pixels"].form.depth == FLOATS:
            raise UsageError(
                "--buckets: fields, such as pictures of floating-point pixels, need one size: drop the flag"
            )
        sizes = sizes or _sizes(settings.buckets, size)
        parts, share_cropped = _bucketed(table, own, sizes, source, decode)
        _set_range(parts, looks["pixels"].form, settings, model, naming)
        return Buckets(parts, share_cropped)
    number = len(table) if isinstance(table, Dataset) else number_of_rows(settings, table)
    rows = table.to_iterable_dataset(num_shards=shards_of_table(number)) if isinstance(table, Dataset) else table
    return StreamedPictures(
        *(rows, wishes, found, label, caption, classes, size, number, source),
        white=model.white,
        stored=_stored_size(settings, size),
        skip_bad_images=settings.skip_bad_images,
        takes_sizes=model.takes_sizes,
    )


def _wish(settings: DataSettings, column: str, model: OfModel, naming: Naming) -> Wish:
    """Returns what is wanted of the images to train on.

    Raises:
        UsageError: the model has other channels than --channels, or more than images have.
    """
    of_model = model.white is not None or model.normalization is not None
    keeps_bits = settings.preserve_input_precision or of_model
    if settings.channels is not None and model.channels not in (None, settings.channels):
        raise UsageError(
            f"--channels {settings.channels}: {naming.model} has {model.channels} channels; drop the flag"
        )
    if model.channels not in (None, 1, 3, 4) and not keeps_bits:
        raise UsageError(
            f"{naming.model} has {model.channels} channels, but images have 1, 3 or 4: use .npy fields (N, C, H, W),"
            " or TIFF files with --preserve_input_precision"
        )
    flag = "" if settings.channels is None else f"--channels {settings.channels}"
    return Wish(column, settings.channels or model.channels, flag, keeps_bits, is_deep=model.white is not None)


def _set_range(
    parts: Sequence[PictureData], form: Form, settings: DataSettings, model: OfModel, naming: Naming
) -> None:
    """Maps the values of pictures with all their bits to [-1, 1]: one rule for the whole data set.

    Raises:
        UsageError: a value is above the white of the given model, or as in `field_normalization`.
    """
    if form.depth == FLOATS:
        (data,) = parts
        data.become_fields(field_normalization(data.stored, model.normalization, settings.field_scale))
    elif form.depth == SIXTEEN_BITS:
        largest = max(data.largest() for data in parts)
        white = model.white or max(2 ** int(largest).bit_length() - 1, 255)
        if largest > white:
            raise UsageError(f"{naming.model} was trained on values up to {white:,}, but the data reach {largest:,}")
        for data in parts:
            data.become_deep(white, f"all bits are kept; the largest value is {largest:,}, white is {white:,}")


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


def _sizes(multiple: int, size: tuple[int, int]) -> list[tuple[int, int]]:
    """Returns the sizes that --buckets chooses from.

    Raises:
        UsageError: there is none.
    """
    sizes = bucket_sizes(size, multiple)
    if not sizes:
        raise UsageError(
            f"--buckets {multiple}: no size with such sides has the area of --resolution {as_setting(size)}:"
            " use a smaller number"
        )
    return sizes


def _bucketed(
    table, own: np.ndarray, sizes: Sequence[tuple[int, int]], source: Source, decode: Callable
) -> tuple[list[PictureData], float]:
    """Decodes the images of a table, of these own sizes (N, 2), in the sizes nearest to their aspect ratios.

    Returns the images of each size, and the mean share of an image that was cut off.
    """
    readable = own.min(1) > 0
    if not readable.any():
        raise UsageError(f"{source.flag}: none of the {len(own)} images can be read")
    nearest = np.zeros(len(own), int)
    nearest[readable] = nearest_sizes(own[readable], sizes)
    nearest[~readable] = np.bincount(nearest[readable]).argmax()  # decoding reports or skips them
    parts = [decode(table.select(np.flatnonzero(nearest == place)), sizes[place]) for place in np.unique(nearest)]
    return parts, cropped(own[readable], np.array(sizes)[nearest[readable]])


def _stored_size(settings: DataSettings, size: tuple[int, int]) -> tuple[int, int]:
    return larger(size) if settings.random_crop else size


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


def _decoded(
    settings: DataSettings,
    looks: dict[str, Look],
    found: Sequence[Column],
    classes: list[str] | None,
    source: Source,
    table,
    size: tuple[int, int],
) -> PictureData:
    """Decodes all images of a table into a cache."""
    left, stored = [look.column for look in looks.values()], _stored_size(settings, size)
    for into, look in looks.items():
        left.remove(look.column)
        table = decode_table(
            *(table, look.column, into, stored, look.form, source),
            cache_folder(settings.cache_dir),
            skip_bad_images=settings.skip_bad_images,
            keep=look.column in left,
        )
    pixels, condition = looks["pixels"], looks.get("condition")
    shape = (pixels.form.channels, *size)
    number = condition.form.channels if condition else 0
    columns = [replace(one, channels=looks[one.place].form.channels) if one.is_image else one for one in found]
    of_table = table, shape, classes, number, pixels.note, settings.caption_column, columns, stored
    return PictureData(*of_table, digests=table_digests(table, cache_folder(settings.cache_dir)))
