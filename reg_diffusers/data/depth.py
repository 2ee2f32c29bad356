"""Images of more than 8 bits: decides which value is white, with one rule for the whole data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image

__all__ = ["EIGHT_BITS", "FLOATS", "SIXTEEN_BITS", "WHITE_16", "Depth", "Form", "eight_bits", "is_deep"]
__all__ += ["look_at_depth"]

WHITE_16 = 2**16 - 1
EIGHT_BITS, SIXTEEN_BITS, FLOATS = "8-bit", "16-bit", "floating-point"
_IMAGES_DECODED = 64


@dataclass(frozen=True)
class Form:
    """How the images of a data set are decoded.

    Attributes:
        channels: their channels: 1 for grey, 3 for RGB, 4 for RGBA; with all bits kept, any number.
        white: the value of a 32-bit integer image that becomes 255, see `Depth`.
        depth: EIGHT_BITS; if all bits are kept, also SIXTEEN_BITS or FLOATS.
        keeps_bits: whether all bits are kept, see `deep.decode_deep`.
    """

    channels: int
    white: int = WHITE_16
    depth: str = EIGHT_BITS
    keeps_bits: bool = False

    @property
    def dtype(self) -> str:
        """The type of the decoded values."""
        return {EIGHT_BITS: "uint8", SIXTEEN_BITS: "uint16", FLOATS: "float32"}[self.depth]


@dataclass(frozen=True)
class Depth:
    """The depth of a data set, estimated from some of its images.

    16-bit images are always scaled by 65535. 32-bit integers have no defined range: if the images decoded have no
    value above 255, they count as 8-bit images in a wide type, else as 16-bit images.

    Attributes:
        white: the value of a 32-bit integer image that becomes 255: 255 or 65535.
        largest: the largest value of the 16-bit images decoded; None if there are none.
        decoded: the number of these images.
        narrow: the number of images decoded that have 8 bits in a wide type.
    """

    white: int = WHITE_16
    largest: int | None = None
    decoded: int = 0
    narrow: int = 0

    @property
    def note(self) -> str:
        """Describes the conversion of deep images in one line; "" if there are none."""
        wide = f"16-bit images are scaled by {WHITE_16}: they keep their upper 8 bits"
        narrow = "images of 32-bit integers hold 0 to 255 and are not scaled"
        return "; ".join(text for text, is_so in ((wide, self.decoded), (narrow, self.narrow)) if is_so)

    @property
    def warning(self) -> str:
        """Reports empty upper bits, with a fix; "" if they are used."""
        if self.largest is None or self.largest > WHITE_16 // 2:
            return ""
        bits = max(self.largest.bit_length(), 1)
        return (
            f"16-bit images use {bits} bits only: the largest value in {self.decoded} images is {self.largest:,} of"
            f" {WHITE_16:,}, so they become 0 to {self.largest >> 8} of 255. Multiply them by {2 ** (16 - bits):,}, or"
            " pass --preserve_input_precision, which keeps every bit and uses their range"
        )


def look_at_depth(openers: Sequence[Callable[[], PIL.Image.Image]]) -> Depth:
    """Estimates the depth of a data set from some of its images: all headers, and the pixels of 64 deep images.

    Args:
        openers: functions that each open one image; images that cannot be opened or decoded do not count.
    """
    deep = [opener for opener in openers if _is_deep(opener)]
    chosen = np.linspace(0, len(deep) - 1, min(len(deep), _IMAGES_DECODED)).astype(int)
    found = [values for place in chosen if (values := _largest(deep[place])) is not None]
    integers = [largest for largest, is_integer in found if is_integer]
    white = 255 if integers and max(integers) <= 255 else WHITE_16
    scaled = [largest for largest, is_integer in found if not (is_integer and white == 255)]
    return Depth(white, max(scaled, default=None), len(scaled), len(found) - len(scaled))


def eight_bits(image: PIL.Image.Image, kind: str | None, white: int) -> PIL.Image.Image:
    """Converts a grayscale image of integers to 8 bits.

    Args:
        image: an image with a mode that begins with "I".
        kind: the format of its file, such as "TIFF".
        white: see `Depth`.

    Raises:
        ValueError: if a value is outside 0 to white.
    """
    white = white if _is_integer(image.mode, kind) else WHITE_16
    pixels = np.asarray(image).astype(np.int64)
    low, high = pixels.min(initial=0), pixels.max(initial=0)
    if low < 0 or high > white:
        raise ValueError(
            f"its values range from {low:,} to {high:,}, but white is {white:,} in this data set: store such images as"
            " an .npy array (N, C, H, W) instead"
        )
    return PIL.Image.fromarray((pixels >> 8 if white > 255 else pixels).astype(np.uint8))


def _is_integer(mode: str, kind: str | None) -> bool:
    """Whether pixels are 32-bit integers of unknown range; Pillow itself scales those of PGM to 65535."""
    return mode == "I" and kind not in ("PNG", "PPM")


def is_deep(image: PIL.Image.Image) -> bool:
    """Returns whether the header of an image says that it has more than 8 bits."""
    return image.mode.startswith("I") or ";16" in str(image.tile)


def _is_deep(opener: Callable[[], PIL.Image.Image]) -> bool:
    try:
        with opener() as image:
            return is_deep(image)
    except Exception:
        return False


def _largest(opener: Callable[[], PIL.Image.Image]) -> tuple[int, bool] | None:
    """Returns the largest 16-bit value of a deep image, and whether the image holds 32-bit integers."""
    try:
        with opener() as image:
            is_integer, is_grey = _is_integer(image.mode, image.format), image.mode.startswith("I")
            largest = int(np.asarray(image).max(initial=0))
    except Exception:
        return None
    # Of 16-bit colours, Pillow returns the upper bytes only.
    return (largest if is_grey else 256 * largest + 255), is_integer
