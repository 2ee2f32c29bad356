"""Pictures with all their bits: 16-bit colours, integers, floating-point pixels, any number of channels.

Pillow returns only the upper bytes of 16-bit colours, so these are decoded twice; tifffile reads the TIFF files that
Pillow cannot read.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import PIL.Image
import PIL.ImageOps

from .depth import EIGHT_BITS, FLOATS, SIXTEEN_BITS, WHITE_16

__all__ = ["Kind", "decode_deep", "kind_of_file", "read_pixels"]

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # of Pillow: ITU-R 601-2
_OTHER_BYTE = {"B": "L", "L": "B", "N": "B"}  # the byte order in which Pillow takes the lower byte for the upper one
_PLAIN = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "La", "RGBa", "HSV", "LAB")
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
File = str | io.BytesIO


@dataclass(frozen=True)
class Kind:
    """What the pixels of a file are.

    Attributes:
        depth: EIGHT_BITS, SIXTEEN_BITS (any integers of more than 8 bits) or FLOATS.
        channels: number of channels that are stored, with those of transparency.
        has_alpha: whether the last one is transparency.
    """

    depth: str
    channels: int
    has_alpha: bool = False

    @property
    def colours(self) -> int:
        """Channels without transparency."""
        return self.channels - self.has_alpha


def kind_of_file(file: File, open_image: Callable[[File], PIL.Image.Image]) -> Kind:
    """Returns what a file holds, by its header.

    Args:
        file: the file.
        open_image: opens it by Pillow.

    Raises:
        Exception: neither Pillow nor tifffile reads it; of any type, because the file may hold anything.
    """
    try:
        image = open_image(file)
    except PIL.UnidentifiedImageError:
        return _with_tiff(file, lambda series: Kind(_depth_of(series.dtype), _channels_of(series)))
    with image:
        if not _is_read_by_pillow(image):
            return _with_tiff(file, lambda series: Kind(_depth_of(series.dtype), _channels_of(series)))
        if image.mode == "F":
            return Kind(FLOATS, 1)
        if image.mode.startswith("I"):
            return Kind(SIXTEEN_BITS, 1)
        colours = 1 if image.mode in ("1", "L", "LA", "La") else 3
        depth = SIXTEEN_BITS if ";16" in str(image.tile) else EIGHT_BITS
        return Kind(depth, colours + image.has_transparency_data, image.has_transparency_data)


def read_pixels(file: File, open_image: Callable[[File], PIL.Image.Image]) -> tuple[np.ndarray, Kind]:
    """Reads all bits of a picture, (H, W, n), upright; 8 bits as uint8, other integers as they are, floats as float32.

    Raises:
        ValueError: 16-bit grey with transparency, which Pillow cannot read, or infinite or missing values.
        Exception: as for `kind_of_file`.
    """
    kind = kind_of_file(file, open_image)
    _rewind(file)
    try:
        image = open_image(file)
        is_read = _is_read_by_pillow(image)
    except PIL.UnidentifiedImageError:
        is_read = False
    if not is_read:
        _rewind(file)
        pixels = _with_tiff(file, _tiff_pixels)
    elif kind.depth == SIXTEEN_BITS and not image.mode.startswith("I"):
        upper = _turned(np.asarray(image).astype(np.uint16), image)
        _rewind(file)
        lower = open_image(file)
        lower.tile = [tile._replace(args=_of_other_byte(tile.args)) for tile in lower.tile]
        pixels = 256 * upper + _turned(np.asarray(lower).astype(np.uint16), lower)
    elif kind.depth == EIGHT_BITS:
        mode = {1: "L", 3: "RGB"}[kind.colours] if not kind.has_alpha else "RGBA"
        pixels = _turned(np.asarray(image.convert(mode)), image)
        pixels = pixels[..., [0, 3]] if kind.has_alpha and kind.colours == 1 else pixels
    else:
        pixels = _turned(np.asarray(image), image)
    pixels = pixels if pixels.ndim == 3 else pixels[..., None]
    if kind.depth == FLOATS and not np.isfinite(pixels).all():
        raise ValueError("it holds infinite or missing (nan) values")
    return pixels, kind


def decode_deep(
    file: File, open_image: Callable[[File], PIL.Image.Image], size: tuple[int, int], channels: int, depth: str
) -> np.ndarray:
    """Converts a picture to (C, H, W), resized and cropped as `pictures.decode` does, with all its bits.

    Grey is the luma 0.299 R + 0.587 G + 0.114 B. Transparency is composited on white, unless 4 channels keep it.

    Args:
        file: the file.
        open_image: opens it by Pillow.
        size: height and width of the result.
        channels: of the result.
        depth: of the data set. EIGHT_BITS: uint8; SIXTEEN_BITS: uint16, in which images of 8 bits are scaled by 257;
            FLOATS: float32.

    Raises:
        ValueError: the depth or the channels differ from those of the data set, or values are outside 0 to 65535.
    """
    pixels, kind = read_pixels(file, open_image)
    if FLOATS in (depth, kind.depth) and depth != kind.depth:
        raise ValueError(f"its pixels are {kind.depth}, but the data set is {depth}: pictures must be of one kind")
    if depth == EIGHT_BITS and kind.depth != depth:
        raise ValueError("it has 16 bits, but no picture looked at before has more than 8: put such a picture first")
    if depth == SIXTEEN_BITS and kind.depth == EIGHT_BITS:
        pixels = 257 * pixels.astype(np.uint16)
    white = {EIGHT_BITS: 255, SIXTEEN_BITS: WHITE_16}.get(depth, 1.0)
    low, high = pixels.min(initial=0), pixels.max(initial=0)
    if depth != FLOATS and (low < 0 or high > white):
        raise ValueError(f"its values range from {low:,} to {high:,}, but white is {white:,}: store them as fields")
    pixels = _with_channels(pixels.astype(np.float32), kind, channels, white)
    pixels = np.stack([_fitted(pixels[..., place], size) for place in range(channels)])
    if depth == FLOATS:
        return pixels
    if channels == 4 and kind.colours in (1, 3):  # the colours were multiplied by the transparency
        pixels[:3] *= white / np.maximum(pixels[3], 1e-6)
        pixels[:3, pixels[3] == 0] = 0
    return pixels.round().clip(0, white).astype(np.uint8 if depth == EIGHT_BITS else np.uint16)


def _with_channels(pixels: np.ndarray, kind: Kind, channels: int, white: float) -> np.ndarray:
    """Converts (H, W, n) to the wanted channels; four of them have colours multiplied by the transparency."""
    if kind.colours not in (1, 3) or kind.depth == FLOATS:
        if kind.channels != channels:
            raise ValueError(f"it has {kind.channels} channels, but the data set has {channels}")
        return pixels
    colours = pixels[..., : kind.colours]
    alpha = pixels[..., -1:] / white if kind.has_alpha else np.ones_like(pixels[..., :1])
    if channels == 4:
        return np.concatenate([np.broadcast_to(colours, (*colours.shape[:2], 3)) * alpha, white * alpha], axis=-1)
    composite = colours * alpha + white * (1 - alpha)
    if channels == 1:
        return composite if kind.colours == 1 else (composite @ _LUMA)[..., None]
    return np.broadcast_to(composite, (*composite.shape[:2], channels))


def _fitted(channel: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    image = PIL.Image.fromarray(np.ascontiguousarray(channel, np.float32))
    return np.asarray(PIL.ImageOps.fit(image, size[::-1], PIL.Image.Resampling.BILINEAR))


def _is_read_by_pillow(image: PIL.Image.Image) -> bool:
    """Whether Pillow reads all channels of an image; of several pages or planes of a TIFF file it reads the first."""
    if image.format == "TIFF" and image.n_frames > 1:
        return False
    if image.format == "TIFF" and any(len(_rawmode(tile.args).split(";")[0]) == 1 for tile in image.tile):
        return image.mode in ("1", "L", "F", "P") or image.mode.startswith("I")
    return image.mode in _PLAIN or image.mode == "F" or image.mode.startswith("I")


def _rawmode(args) -> str:
    return args if isinstance(args, str) else str(args[0]) if args else ""


def _of_other_byte(args):
    mode = _rawmode(args)
    other = mode[:-1] + _OTHER_BYTE[mode[-1]]
    if mode.startswith("LA"):
        raise ValueError("16-bit grey with transparency cannot be read with all its bits: store it as RGBA")
    return other if isinstance(args, str) else (other, *args[1:])


def _turned(pixels: np.ndarray, image: PIL.Image.Image) -> np.ndarray:
    """Turns pixels (H, W, ...) upright by the EXIF orientation of their image."""
    turns = {
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: x.swapaxes(0, 1)[:, ::-1],
        7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
        8: lambda x: x.swapaxes(0, 1)[::-1],
    }
    return turns.get(image.getexif().get(PIL.ExifTags.Base.Orientation), lambda x: x)(pixels)


def _with_tiff(file: File, use: Callable):
    """Calls `use` with the first series of images in a TIFF file.

    Raises:
        ValueError: tifffile is not installed, or the file holds several images or too large ones.
    """
    _rewind(file)
    beginning = file.read(4) if isinstance(file, io.BytesIO) else _first_bytes(file)
    if beginning not in _TIFF:
        raise PIL.UnidentifiedImageError("cannot identify image file")
    try:
        import tifffile
    except ImportError:
        raise ValueError("a TIFF of these channels needs tifffile: pip install 'reg_diffusers[tiff]'") from None
    _rewind(file)
    with tifffile.TiffFile(file) as opened:
        series = opened.series[0]
        height_width = [series.shape[series.axes.index(axis)] for axis in "YX" if axis in series.axes]
        others = [axis for axis in series.axes if axis not in "YX"]
        if len(height_width) != 2 or others not in ([], ["S"], ["C"]):
            raise ValueError(f"it holds several images (axes {series.axes}): store each in its own file")
        if np.prod(height_width) > PIL.Image.MAX_IMAGE_PIXELS or series.nbytes > 64 * PIL.Image.MAX_IMAGE_PIXELS:
            raise PIL.Image.DecompressionBombError
        return use(series)


def _channels_of(series) -> int:
    others = [size for size, axis in zip(series.shape, series.axes, strict=True) if axis not in "YX"]
    return others[0] if others else 1


def _tiff_pixels(series) -> np.ndarray:
    pixels = series.asarray()
    axes = series.axes
    pixels = pixels if pixels.ndim == 2 else np.moveaxis(pixels, [axes.index("Y"), axes.index("X")], [0, 1])
    return pixels.astype(np.float32) if pixels.dtype.kind == "f" else pixels


def _depth_of(dtype: np.dtype) -> str:
    if dtype.kind not in "fiu":
        raise ValueError(f"its pixels are {dtype}")
    return FLOATS if dtype.kind == "f" else EIGHT_BITS if dtype.itemsize == 1 else SIXTEEN_BITS


def _first_bytes(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(4)


def _rewind(file: File) -> None:
    if isinstance(file, io.BytesIO):
        file.seek(0)
