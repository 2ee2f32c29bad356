"""Looks at some images of a data set to decide how all of them are decoded: one rule for the whole data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..runtime.errors import UsageError, warn
from .deep import Kind, kind_of_file
from .depth import EIGHT_BITS, FLOATS, SIXTEEN_BITS, Form, is_deep, look_at_depth
from .pictures import file_of, open_file, open_stored
from .source import Source

__all__ = ["Look", "Wish", "look_at", "rows_looked_at"]

_IMAGES_LOOKED_AT = 1000
_GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N")


@dataclass(frozen=True)
class Wish:
    """What is wanted of the images of a column.

    Attributes:
        column: the column.
        channels: their channels; None: those that the images have.
        flag: the flag that wants them, for messages; "" if it is a model.
        keeps_bits: whether all bits are kept.
        is_deep: whether pictures of 8 bits count as 16-bit ones, because a given model was trained on such pictures.
    """

    column: str
    channels: int | None = None
    flag: str = ""
    keeps_bits: bool = False
    is_deep: bool = False


@dataclass(frozen=True)
class Look:
    """What was found.

    Attributes:
        column: the column.
        form: how its images are decoded.
        note: a line about conversions; "" without any.
    """

    column: str
    form: Form
    note: str = ""


def rows_looked_at(number: int) -> list[int]:
    """Returns the rows to look at: a thousand, evenly spaced over the data set."""
    return np.linspace(0, number - 1, min(number, _IMAGES_LOOKED_AT)).astype(int).tolist()


def look_at(rows: Sequence[Callable[[], dict]], wish: Wish, source: Source) -> Look:
    """Decides how the images of a column are decoded; warns of empty upper bits.

    Images that cannot be read do not count; decoding will report them.

    Args:
        rows: functions that return the rows to look at, with stored images {"bytes", "path"}.
        wish: what is wanted of the images.
        source: the source that files must lie in.

    Raises:
        UsageError: four channels are wanted, but no image has transparency.
    """
    images = [lambda row=row: row()[wish.column] for row in rows]
    kinds = [_kind(image, source, wish.keeps_bits) for image in images]
    found = [kind for kind in kinds if kind is not None]
    colours = {kind.colours for kind in found}
    channels = wish.channels or (1 if colours == {1} else max(colours - {1}, default=3))
    notes = _notes_on_channels(found, channels, wish)
    if wish.keeps_bits:
        depths = {kind.depth for kind in found}
        least = SIXTEEN_BITS if wish.is_deep else EIGHT_BITS
        depth = next((depth for depth in (FLOATS, SIXTEEN_BITS) if depth in depths), least)
        if depth != EIGHT_BITS or colours - {1, 3} or len(found) < len(images):  # decoding names what it cannot read
            return Look(wish.column, Form(channels, depth=depth, keeps_bits=True), "; ".join(notes))
        notes.append("no image has more than 8 bits: --preserve_input_precision changes nothing")
    deep = [image for image, kind in zip(images, kinds, strict=True) if kind is not None and kind.depth != EIGHT_BITS]
    depth = look_at_depth([lambda image=image: open_stored(image(), source) for image in deep])
    if depth.warning:
        warn(f"{source.flag}: {depth.warning}")
    notes = [note for note in (depth.note, *notes) if note]
    return Look(wish.column, Form(channels, white=depth.white), "; ".join(notes))


def _kind(image: Callable[[], dict | None], source: Source, keeps_bits: bool) -> Kind | None:
    try:
        if keeps_bits:
            return kind_of_file(file_of(image(), source), open_file)
        with open_stored(image(), source) as opened:
            colours, depth = 1 if opened.mode in _GREY_MODES else 3, SIXTEEN_BITS if is_deep(opened) else EIGHT_BITS
            return Kind(depth, colours + opened.has_transparency_data, opened.has_transparency_data)
    except Exception:
        return None


def _notes_on_channels(found: list[Kind], channels: int, wish: Wish) -> list[str]:
    """Describes conversions that the user may not expect.

    Raises:
        UsageError: four channels are wanted, but no image has transparency.
    """
    of_colour, of_alpha = (sum(is_so) for is_so in ([k.colours == 3 for k in found], [k.has_alpha for k in found]))
    wanted = wish.flag or f"a model of {channels} channels"
    if channels == 4 and found and not of_alpha and any(kind.channels != 4 for kind in found):
        raise UsageError(
            f"{wanted}: none of {len(found)} images looked at has transparency, the fourth channel: use --channels 3"
        )
    if channels == 3 and wish.flag and found and not of_colour:
        return [f"{wanted}: all {len(found)} images looked at are grey, so their three channels are equal"]
    notes = []
    if channels == 1 and of_colour:
        notes.append("colours become grey by luma, 0.299 R + 0.587 G + 0.114 B")
    if channels in (1, 3) and of_alpha and wish.flag:
        notes.append("transparency is blended with white")
    return notes
