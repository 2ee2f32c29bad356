"""Decoding of picture files to small uint8 arrays."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps

from .. import __version__
from .errors import UsageError

__all__ = ["decode", "decode_table", "is_grey"]

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


def decode_table(
    table, column: str, into: str, resolution: int, channels: int, cache_dir: Path, *, skip_bad_images: bool
):
    """The table with a column of flattened (C, H, W) uint8 in place of the images, mapped into memory.

    Args:
        table: a `datasets.Dataset` whose image column is not decoded ({"bytes", "path"}).
        column: the image column.
        into: name of the new column.
        resolution: side of the square.
        channels: 1 or 3.
        cache_dir: keeps the result for the next run; never the folder that the data came from.
        skip_bad_images: leave out images that cannot be decoded, and print how many, instead of stopping.

    Raises:
        UsageError: an image that cannot be decoded, by name; or none that can.
    """
    from datasets import Features, List, Value

    features = {name: feature for name, feature in table.features.items() if name != column}
    features[into] = List(Value("uint8"), length=channels * resolution * resolution)
    features["readable"] = Value("bool")
    # The fingerprint stands for the rows, the rest for what is done to them.
    settings = (table._fingerprint, column, into, resolution, channels, skip_bad_images, __version__)
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
            "skip_bad_images": skip_bad_images,
        },
        remove_columns=[column],
        features=Features(features),
        cache_file_name=str(cache_dir / f"{'-'.join(map(str, settings))}.arrow"),
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


def is_grey(table, column: str) -> bool:
    """Whether a thousand images spread over the table, by their headers, are all without colour.

    Unreadable ones do not count.
    """
    modes = set()
    for row in np.linspace(0, len(table) - 1, min(len(table), _IMAGES_LOOKED_AT)).astype(int):
        try:
            with _open(table[int(row)][column]) as image:
                modes.add(image.mode)
        except Exception:
            continue  # named, or counted, when it is decoded
    return bool(modes) and modes <= set(_GREY_MODES)


def _decode_row(
    row: dict, index: int, column: str, into: str, resolution: int, channels: int, skip_bad_images: bool
) -> dict:
    try:
        with _open(row[column]) as image:
            pixels = decode(image, resolution, channels)
        return {into: pixels.reshape(-1), "readable": True}
    except Exception as error:  # PIL raises nearly anything on damaged files
        if skip_bad_images:
            return {into: np.zeros(channels * resolution * resolution, np.uint8), "readable": False}
        path = (row[column] or {}).get("path")
        name = f"{path} (row {index})" if path else f"row {index}"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"image {name} cannot be decoded: {reason}. Remove it, or pass --skip_bad_images") from error


def _open(stored: dict) -> PIL.Image.Image:
    if stored is None:
        raise ValueError("no image in this row")
    return PIL.Image.open(io.BytesIO(stored["bytes"]) if stored["bytes"] is not None else Path(stored["path"]))
