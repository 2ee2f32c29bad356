"""Decoding of picture files, whoever made them, to small uint8 arrays."""

from __future__ import annotations

import functools
import hashlib
import io
import os
import warnings
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps

from .. import __version__
from .errors import DataError, UsageError
from .source import Source

__all__ = ["BadImage", "decode", "decode_stored", "decode_table", "has_colour", "is_grey"]

# What Pillow reads by itself: other kinds start programs, such as EPS, or are seldom pictures and seldom looked after.
_KINDS = "AVIF BMP DIB GIF ICO JPEG JPEG2000 PCX PNG PPM QOI SGI TGA TIFF WEBP XBM".split()
_GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N")
_IMAGES_LOOKED_AT = 1000
_IMAGES_PER_PROCESS = 5000


def decode(image: PIL.Image.Image, resolution: int, channels: int) -> np.ndarray:
    """A picture as (C, H, W) uint8: upright, shorter side resized (bilinear, antialiased), cropped to the centre.

    Transparency is laid on white; 16-bit grey keeps its upper 8 bits.

    Args:
        image: a PIL image of any mode.
        resolution: side of the square.
        channels: 1 for grey, 3 for RGB.

    Raises:
        ValueError: floating-point pixels, whose range nobody can know.
    """
    image = PIL.ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels: store such images as an .npy array (N, C, H, W) instead")
    if image.mode.startswith("I"):
        pixels = np.asarray(image).astype(np.int64)
        wide = image.mode != "I" or pixels.max(initial=0) > 255
        image = PIL.Image.fromarray(np.clip(pixels >> 8 if wide else pixels, 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    image = PIL.ImageOps.fit(image, (resolution, resolution), PIL.Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


class BadImage(DataError):
    """One image that cannot be decoded; a run may go on without it."""


def decode_stored(stored: dict | None, row: str, resolution: int, channels: int, source: Source) -> np.ndarray:
    """An image as it is stored, {"bytes", "path"}, as a picture (C, H, W) uint8; see `decode`.

    Args:
        stored: the file's content, or where it is.
        row: name of the row, for the message.
        resolution: side of the square.
        channels: 1 or 3.
        source: where files may lie.

    Raises:
        BadImage: it cannot be decoded; the message names it.
        UsageError: it lies outside of the source.
    """
    path = (stored or {}).get("path")
    try:
        with _open(stored, source) as image:
            return decode(image, resolution, channels)
    except UsageError:
        raise
    except Exception as error:  # Pillow raises nearly anything on damaged files
        name = f"{path} ({row})" if path else row
        raise BadImage(
            f"image {name} cannot be decoded: {_reason(error)}. Remove it, or pass --skip_bad_images"
        ) from error


def decode_table(
    table,
    column: str,
    into: str,
    resolution: int,
    channels: int,
    source: Source,
    cache_dir: Path,
    *,
    skip_bad_images: bool,
):
    """The table with a column of flattened (C, H, W) uint8 in place of the images, mapped into memory.

    Args:
        table: a `datasets.Dataset` whose image column is not decoded ({"bytes", "path"}).
        column: the image column.
        into: name of the new column.
        resolution: side of the square.
        channels: 1 or 3.
        source: where the images' files may lie.
        cache_dir: keeps the result for the next run; never the folder that the data came from.
        skip_bad_images: leave out images that cannot be decoded, and print how many, instead of stopping.

    Raises:
        UsageError: an image that cannot be decoded, by name; none that can; or one that lies outside of the source.
    """
    from datasets import Features, List, Value

    features = {name: feature for name, feature in table.features.items() if name != column}
    features[into] = List(Value("uint8"), length=channels * resolution * resolution)
    features["readable"] = Value("bool")
    # The fingerprint stands for the rows, the rest for what is done to them. It comes with the data, so it is no name
    # for a file.
    settings = (table._fingerprint, column, into, resolution, channels, skip_bad_images, source.roots, __version__)
    cache_name = hashlib.sha256(repr(settings).encode()).hexdigest()
    cache_dir.mkdir(parents=True, exist_ok=True)
    processes = min(os.cpu_count() or 1, len(table) // _IMAGES_PER_PROCESS)
    decoded = table.map(
        _decode_row,
        with_indices=True,
        fn_kwargs={
            "column": column,
            "into": into,
            "resolution": resolution,
            "channels": channels,
            "source": source,
            "skip_bad_images": skip_bad_images,
        },
        remove_columns=[column],
        features=Features(features),
        cache_file_name=str(cache_dir / f"{cache_name}.arrow"),
        num_proc=processes if processes > 1 else None,
        desc="decoding images, once",
    )
    if not skip_bad_images:
        return decoded
    readable = np.asarray(decoded.with_format("numpy")["readable"][:])
    if not readable.any():
        raise UsageError(f"none of the {len(readable)} images can be decoded")
    if not readable.all():
        print(f"--skip_bad_images: left out {(~readable).sum()} of {len(readable)} images that cannot be decoded")
    return decoded.select(np.flatnonzero(readable))


def is_grey(table, column: str, source: Source) -> bool:
    """Whether a thousand images spread over the table, by their headers, are all without colour.

    Unreadable ones do not count.
    """
    chosen = np.linspace(0, len(table) - 1, min(len(table), _IMAGES_LOOKED_AT)).astype(int)
    colours = {has_colour(table[int(row)][column], source) for row in chosen} - {None}
    return colours == {False}


def has_colour(stored: dict | None, source: Source) -> bool | None:
    """Whether an image has colour, by its header; None if it cannot be read, which is told when it is decoded."""
    try:
        with _open(stored, source) as image:
            return image.mode not in _GREY_MODES
    except Exception:
        return None


def _decode_row(
    row: dict,
    index: int,
    column: str,
    into: str,
    resolution: int,
    channels: int,
    source: Source,
    skip_bad_images: bool,
) -> dict:
    try:
        pixels = decode_stored(row[column], f"row {index}", resolution, channels, source)
    except BadImage:
        if not skip_bad_images:
            raise
        return {into: np.zeros(channels * resolution * resolution, np.uint8), "readable": False}
    return {into: pixels.reshape(-1), "readable": True}


def _open(stored: dict | None, source: Source) -> PIL.Image.Image:
    if stored is None:
        raise ValueError("no image in this row")
    file = io.BytesIO(stored["bytes"]) if stored["bytes"] is not None else _file(stored["path"], source)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
        return PIL.Image.open(file, formats=_kinds())


def _file(path: str, source: Source) -> Path | io.BytesIO:
    source.check(path)
    if "://" in path:
        from datasets.utils.file_utils import xopen

        with xopen(path, "rb") as file:
            return io.BytesIO(file.read())
    if not os.path.isfile(path):
        raise FileNotFoundError("there is no such file")  # a pipe or a device would be waited for
    return Path(path)


@functools.cache
def _kinds() -> list[str]:
    PIL.Image.init()
    return [kind for kind in _KINDS if kind in PIL.Image.OPEN]


def _reason(error: Exception) -> str:
    if isinstance(error, PIL.Image.DecompressionBombError | PIL.Image.DecompressionBombWarning):
        return f"it has more than the {PIL.Image.MAX_IMAGE_PIXELS:,} pixels that are taken from one image"
    if isinstance(error, PIL.UnidentifiedImageError):
        return f"it is damaged, or none of {', '.join(_kinds())}"
    return str(error).splitlines()[0] if str(error) else type(error).__name__
