"""Finds the columns of a data set that regularizers need: images, masks, numbers and texts, one of each per image."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from dataclasses import dataclass

from ..runtime.errors import UsageError

__all__ = ["TEXTS", "Column", "Wanted", "find_column", "kind_of", "listed_columns", "with_named_images"]

TEXTS = ("string", "large_string", "string_view")
_NUMBERS = ("int", "uint", "float", "bool", "double")


@dataclass(frozen=True)
class Wanted:
    """What a regularizer needs of the data.

    Attributes:
        name: its name in `needs`.
        column: the column of the data.
        is_mask: whether it is an image of weights from 0 to 1.
        text: one text for all images, in place of a column.
        by: the name of the regularizer.
    """

    name: str
    column: str
    is_mask: bool = False
    text: str | None = None
    by: str = ""

    @property
    def title(self) -> str:
        """Names it in messages."""
        return f"column {self.column!r}" if self.column == self.name else f"--reg_columns {self.name}={self.column}"


@dataclass(frozen=True)
class Column:
    """A column that was found.

    Attributes:
        name: its name in the regularizers' `needs`.
        source: the column of the data.
        kind: "image", "mask", "number" or "text".
        channels: channels K of an image; 0 while they are unknown.
        text: one text for all images, in place of a column.
    """

    name: str
    source: str
    kind: str
    channels: int = 0
    text: str | None = None

    @property
    def title(self) -> str:
        """Names it in messages."""
        return Wanted(self.name, self.source).title

    @property
    def is_image(self) -> bool:
        return self.kind in ("image", "mask")

    @property
    def place(self) -> str:
        """The name of the decoded images in a table, which no column of the user has."""
        return f"needs {self.name}"

    def __str__(self) -> str:
        if self.text is not None:
            return f"{self.name}: {self.text[:60]!r} for all images"
        origin = "" if self.source == self.name else f", of the column {self.source}"
        values = {
            "image": f"images of {self.channels} channels, -1 to 1",
            "mask": "masks, 0 to 1",
            "number": "a number per image",
            "text": "a text per image",
        }
        return f"{self.name}: {values[self.kind]}{origin}"


def find_column(table, wanted: Wanted) -> Column:
    """Returns the column of a `datasets` table, or of a stream, that a regularizer needs.

    Raises:
        UsageError: it does not exist, has a kind that is not supported, or holds no images where a mask is needed.
    """
    from datasets import ClassLabel, Image

    if wanted.text is not None:
        return Column(wanted.name, "", "text", text=wanted.text)
    name, features = wanted.column, table.features
    if name not in features:
        close = difflib.get_close_matches(name, features, n=1)
        hint = f": did you mean {close[0]}?" if close else "."
        raise UsageError(
            f"--regularizer {wanted.by} needs {wanted.name}, but the data have no column {name!r}{hint} Name it by"
            f" --reg_columns {wanted.name}=COLUMN; the columns are: {listed_columns(features)}. A folder of images has"
            " those of its metadata.csv or metadata.jsonl"
        )
    feature = features[name]
    dtype = str(kind_of(feature))
    is_bytes = isinstance(feature, dict) and set(feature) == {"bytes", "path"}
    if isinstance(feature, Image) or is_bytes:
        kind = "mask" if wanted.is_mask else "image"
    elif isinstance(feature, ClassLabel) or dtype.startswith(_NUMBERS):
        kind = "number"
    elif dtype in TEXTS:
        kind = "text"
    else:
        raise UsageError(
            f"{wanted.title}: holds {dtype}, but a regularizer can be given images, numbers"
            f" and texts; the columns are: {listed_columns(features)}"
        )
    if wanted.is_mask and kind != "mask":
        raise UsageError(
            f"{wanted.title}: a mask is an image, but this column holds {kind}s. A column of file names is read as"
            " images in the metadata.csv or metadata.jsonl of a folder, if all of its values are such names"
        )
    return Column(wanted.name, name, kind)


def with_named_images(table, names: Iterable[str], folder: str, extensions: frozenset[str]):
    """Returns the table with columns of file names as columns of images, {"bytes", "path"}.

    Args:
        table: the rows of a folder's metadata, a `datasets.Dataset`.
        names: columns that may hold file names; others, and texts that are none, are left as they are.
        folder: the folder that the names are relative to.
        extensions: of images, such as ".png".
    """
    from datasets import Image

    for name in names:
        if kind_of(table.features.get(name)) not in TEXTS:
            continue
        values = table.select_columns(name)[name][:]
        given = [value for value in values if value]
        if given and all(os.path.splitext(value.lower())[1] in extensions for value in given):
            paths = [os.path.join(folder, value) if value else None for value in values]
            table = table.remove_columns(name).add_column(name, paths).cast_column(name, Image())
    return table


def listed_columns(features) -> str:
    """Lists columns with their kinds, for messages."""
    return ", ".join(f"{name} ({kind_of(feature)})" for name, feature in features.items())


def kind_of(feature) -> str:
    """Returns the kind of a column of `datasets` in a word, such as "string" or "image"."""
    return getattr(feature, "dtype", None) or type(feature).__name__.lower()
