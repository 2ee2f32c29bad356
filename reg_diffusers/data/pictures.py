"""Decodes untrusted image files to small uint8 arrays."""

from __future__ import annotations

import functools
import hashlib
import io
import math
import os
import warnings
import zipfile
from pathlib import Path

import numpy as np
import PIL.ExifTags
import PIL.features
import PIL.Image
import PIL.ImageOps

from .. import __version__
from ..runtime.errors import DataError, UsageError
from .deep import decode_deep
from .depth import WHITE_16, Form, eight_bits
from .source import Source

__all__ = ["BadImage", "decode", "decode_stored", "decode_table", "extensions", "file_of", "open_file", "open_stored"]
__all__ += ["size_of", "sizes_of_table"]

# Formats that Pillow decodes itself. Others start programs, such as EPS, or are rarely used and poorly maintained.
_KINDS = "AVIF BMP DIB GIF ICO JPEG JPEG2000 PCX PNG PPM QOI SGI TGA TIFF WEBP XBM".split()
_OPTIONAL = {"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}  # Pillow may be built without them
_IMAGES_PER_PROCESS = 5000
_BATCH, _BATCH_BYTES = 500, 2**25  # decoded images that are stored at once
_LYING = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


def decode(image: PIL.Image.Image, size: tuple[int, int], channels: int, white: int = WHITE_16) -> np.ndarray:
    """Converts an image to (C, H, W) uint8: upright, resized (bilinear, antialiased) to cover it, center-cropped.

    Grey is the luma 0.299 R + 0.587 G + 0.114 B. Transparency is composited on white, unless 4 channels keep it; then
    colours where an image is fully transparent are black. 16-bit images keep their upper 8 bits.

    Args:
        image: a PIL image of any mode.
        size: height and width of the result.
        channels: 1 for grayscale, 3 for RGB, 4 for RGBA.
        white: the value of a 32-bit integer image that becomes 255, see `Depth`.

    Raises:
        ValueError: for floating-point pixels, which have no known range, and for integers outside 0 to white.
    """
    if image.mode == "F":
        raise ValueError(
            "its pixels are floating-point numbers, without a known range: pass --preserve_input_precision, which"
            " reads such images to train on"
        )
    kind = image.format  # a rotated image lacks it
    image.load()  # a PNG may have its orientation after its pixels
    if image.getexif().get(PIL.ExifTags.Base.Orientation, 1) != 1:
        image = PIL.ImageOps.exif_transpose(image)  # which copies every image, also an upright one
    if image.mode.startswith("I"):
        image = eight_bits(image, kind, white)
    if image.has_transparency_data and channels != 4:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    image = image if image.mode == mode else image.convert(mode)
    image = PIL.ImageOps.fit(image, size[::-1], PIL.Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


class BadImage(DataError):
    """Raised for an image that cannot be decoded; a run may continue without it.

    Attributes:
        problem: the image and the reason, without the fix; "" if a DataLoader worker passed the error on.
    """

    def __init__(self, message: str, problem: str = ""):
        super().__init__(message)
        self.problem = problem


def decode_stored(stored: dict | None, row: str, size: tuple[int, int], form: Form, source: Source) -> np.ndarray:
    """Decodes a stored image, {"bytes", "path"}, to (C, H, W); see `decode` and, if all bits are kept, `decode_deep`.

    Args:
        stored: the content of the file, or its path.
        row: the name of the row, for the message.
        size: height and width of the result.
        form: how it is decoded.
        source: the source that files must lie in.

    Raises:
        BadImage: if it cannot be decoded; the message names it.
        UsageError: if it lies outside the source.
    """
    path = (stored or {}).get("path")
    try:
        if form.keeps_bits:
            return decode_deep(file_of(stored, source), open_file, size, form.channels, form.depth)
        with open_stored(stored, source) as image:
            return decode(image, size, form.channels, form.white)
    except UsageError:
        raise
    except Exception as error:  # Pillow raises many types on damaged files
        name = f"{path} ({row})" if path else row
        problem = f"image {name} cannot be decoded: {_reason(error)}"
        raise BadImage(f"{problem}. Remove it, or pass --skip_bad_images", problem) from error


def decode_table(
    table,
    column: str,
    into: str,
    size: tuple[int, int],
    form: Form,
    source: Source,
    cache_dir: Path,
    *,
    skip_bad_images: bool,
    keep: bool = False,
):
    """Replaces the image column of a table by a memory-mapped column of flattened (C, H, W) in the type of the form.

    Args:
        table: a `datasets.Dataset` with an undecoded image column ({"bytes", "path"}).
        column: the image column.
        into: the name of the new column.
        size: height and width of the result.
        form: how they are decoded.
        source: the source that image files must lie in.
        cache_dir: the folder that keeps the result for the next run; never the folder of the data.
        skip_bad_images: whether to skip images that cannot be decoded and print their number, instead of raising.
        keep: whether the image column remains, too.

    Raises:
        UsageError: if an image cannot be decoded (the message names it), if none can, or if one lies outside the
            source.
    """
    from datasets import Features, List, Value

    features = {name: feature for name, feature in table.features.items() if keep or name != column}
    features[into] = List(Value(form.dtype), length=form.channels * math.prod(size))
    features["readable"] = Value("bool")
    # The fingerprint identifies the rows, the other settings their processing. It comes with the data and must not
    # become a file name.
    settings = (table._fingerprint, column, into, size, form, skip_bad_images, source.roots, __version__)
    cache_name = hashlib.sha256(repr(settings).encode()).hexdigest()
    cache_dir.mkdir(parents=True, exist_ok=True)
    processes = min(os.cpu_count() or 1, len(table) // _IMAGES_PER_PROCESS)
    row_bytes = form.channels * math.prod(size) * np.dtype(form.dtype).itemsize
    decoded = table.map(
        _decode_rows,
        with_indices=True,
        batched=True,
        batch_size=max(1, min(_BATCH, _BATCH_BYTES // row_bytes)),
        fn_kwargs={
            "column": column,
            "into": into,
            "size": size,
            "form": form,
            "source": source,
            "skip_bad_images": skip_bad_images,
        },
        remove_columns=[] if keep else [column],
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
        print(f"--skip_bad_images: skipped {(~readable).sum()} of {len(readable)} images that cannot be decoded")
    return decoded.select(np.flatnonzero(readable))


def sizes_of_table(table, column: str, source: Source, cache_dir: Path) -> np.ndarray:
    """Returns the (height, width) of all images of a table, upright, by their headers, (N, 2); 0 if unreadable."""
    from datasets import Features, Value

    key = hashlib.sha256(repr((table._fingerprint, column, "sizes", source.roots, __version__)).encode()).hexdigest()
    cache_dir.mkdir(parents=True, exist_ok=True)
    found = table.select_columns(column).map(
        _size_of_row,
        fn_kwargs={"column": column, "source": source},
        remove_columns=[column],
        features=Features({"height": Value("int32"), "width": Value("int32")}),
        cache_file_name=str(cache_dir / f"{key}.arrow"),
        desc="reading the sizes of images, once",
    )
    columns = found.with_format("numpy")[:]
    return np.stack([columns["height"], columns["width"]], axis=1)


def _decode_rows(
    rows: dict[str, list],
    indices: list[int],
    column: str,
    into: str,
    size: tuple[int, int],
    form: Form,
    source: Source,
    skip_bad_images: bool,
) -> dict[str, np.ndarray]:
    pixels = np.zeros((len(indices), form.channels * math.prod(size)), form.dtype)
    readable = np.ones(len(indices), bool)
    for place, (stored, index) in enumerate(zip(rows[column], indices, strict=True)):
        try:
            pixels[place] = decode_stored(stored, f"row {index}", size, form, source).reshape(-1)
        except BadImage:
            if not skip_bad_images:
                raise
            readable[place] = False
    return {into: pixels, "readable": readable}


def _size_of_row(row: dict, column: str, source: Source) -> dict:
    try:
        height, width = size_of(row[column], source)
    except UsageError:
        raise
    except Exception:  # decoding will report it
        width = height = 0
    return {"height": height, "width": width}


def size_of(stored: dict | None, source: Source) -> tuple[int, int]:
    """Returns the (height, width) of a stored image, upright, by its header.

    Raises:
        Exception: if it cannot be read; of any type, because the file may hold anything.
    """
    with open_stored(stored, source) as image:
        return _upright_size(image)


def _upright_size(image: PIL.Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (width, height) if image.getexif().get(PIL.ExifTags.Base.Orientation) in _LYING else (height, width)


def open_stored(stored: dict | None, source: Source) -> PIL.Image.Image:
    """Opens a stored image, {"bytes", "path"}; its pixels are not read yet."""
    return open_file(file_of(stored, source))


def file_of(stored: dict | None, source: Source) -> str | io.BytesIO:
    """Returns the file of a stored image, {"bytes", "path"}."""
    if stored is None:
        raise ValueError("no image in this row")
    return io.BytesIO(stored["bytes"]) if stored["bytes"] is not None else _file(stored["path"], source)


def open_file(file: str | io.BytesIO) -> PIL.Image.Image:
    """Opens a file by Pillow, if it is of a known kind and not too large."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
        return PIL.Image.open(file, formats=_kinds())


def _file(path: str, source: Source) -> str | io.BytesIO:
    source.check(path)
    if path.startswith("zip://") and "://" not in path.split("::")[-1]:
        member, archive = path.removeprefix("zip://").rsplit("::", 1)
        return io.BytesIO(_archive(archive, os.getpid()).read(member))
    if "://" in path:
        return io.BytesIO(_downloaded(path))
    if not os.path.isfile(path):
        raise FileNotFoundError("no such file")  # reading a pipe or a device would block
    return path


@functools.lru_cache(maxsize=1)  # the size of an image is read right after its pixels
def _downloaded(path: str) -> bytes:
    from datasets.utils.file_utils import xopen

    with xopen(path, "rb") as file:
        return file.read()


@functools.lru_cache(maxsize=8)
def _archive(path: str, process: int) -> zipfile.ZipFile:
    """Opens a .zip file once per process, because processes must not share the position in a file."""
    return zipfile.ZipFile(path)


def extensions() -> frozenset[str]:
    """Returns the extensions of the supported images, such as ".png", for this version of Pillow."""
    kinds = _kinds()
    return frozenset(extension for extension, kind in PIL.Image.EXTENSION.items() if kind in kinds)


@functools.cache
def _kinds() -> list[str]:
    PIL.Image.init()
    missing = [kind for kind, feature in _OPTIONAL.items() if not PIL.features.check(feature)]
    return [kind for kind in _KINDS if kind in PIL.Image.OPEN and kind not in missing]


def _reason(error: Exception) -> str:
    if isinstance(error, PIL.Image.DecompressionBombError | PIL.Image.DecompressionBombWarning):
        return f"it has more than {PIL.Image.MAX_IMAGE_PIXELS:,} pixels, the limit of an image"
    if isinstance(error, PIL.UnidentifiedImageError):
        return f"it is damaged, or its format is not one of {', '.join(_kinds())}"
    return str(error).splitlines()[0] if str(error) else type(error).__name__
