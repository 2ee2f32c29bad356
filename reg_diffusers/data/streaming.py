"""Streams images: decodes them on demand, and never holds all of them in memory or on the disk."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..runtime.errors import DataError, UsageError, warn
from .column_values import misshapen, row_value, seen_image
from .columns import Column
from .content import stream_digest
from .crops import central
from .depth import FLOATS, SIXTEEN_BITS, WHITE_16, Form
from .image_sizes import time_ids
from .looks import Wish, look_at
from .normalization import PICTURES, of_white
from .pictures import BadImage, decode_stored, size_of
from .source import Source

__all__ = ["ROWS_OF_A_PIECE", "RowDecoder", "StreamedPictures", "bytes_of", "shards_of_table", "unreadable"]

ROWS_OF_A_PIECE = 10**9  # upper limit: the id of an image is its piece times this plus its row in the piece
_EXAMPLES = 512
_EXAMPLE_BYTES = 2**26
_BAD_IMAGES_NAMED = 10


class StreamedPictures:
    """Images of a `datasets.IterableDataset`; `stream_dataloader` draws batches from it.

    Args:
        rows: the stream, with the columns below and images as {"bytes", "path"}.
        wishes: for "pixels", "condition" and the places of `columns`, what is wanted; the first images decide the
            rest.
        columns: the columns that regularizers need.
        label: the column of the class labels, integers.
        caption: the column of the texts.
        classes: the names of the classes.
        size: height and width of the images.
        number: the number of rows, if known.
        source: the source that image files must lie in.
        white: white of pictures with all their bits; by default 65535, because their largest value is unknown.
        stored: height and width in which images are decoded, at least `size`, for random windows.
        skip_bad_images: whether to skip images that cannot be decoded.
        takes_sizes: whether the network takes the size of each image before it is resized, see `image_sizes`.

    Attributes:
        rows, source, number, classes: see the arguments.
        shape: (C, H, W).
        normalization: from 0..255 to [-1, 1], or from 0..white.
        white: white of pictures with all their bits; None for those of 8 bits.
        is_cropped: whether `decoder` returns larger images, for random windows; `examples` are the central ones.
        condition_channels: channels K of the conditioning images, 0 without.
        note: a line to print at the start, next to the number and shape of the data.
        columns: the columns that regularizers need.
        captions: the texts of the first images; None without.
        original_sizes: None, because they are read with each image.
        decoder: decodes batches of rows.
        examples: the first images, for repeated use of the same images.

    Raises:
        UsageError: if there are no rows, if they cannot be read, or if their pixels are floating-point numbers.
    """

    is_picture = True
    prompts = None
    original_sizes = None

    def __init__(
        self,
        rows,
        wishes: dict[str, Wish],
        columns: Sequence[Column],
        label: str | None,
        caption: str | None,
        classes: list[str] | None,
        size: tuple[int, int],
        number: int | None,
        source: Source,
        *,
        white: int | None,
        stored: tuple[int, int],
        skip_bad_images: bool,
        takes_sizes: bool,
    ):
        self.rows, self.source, self.number, self.classes = rows, source, number, classes
        first = _first_rows(rows, source)
        rows_of_first = [lambda row=row: row for _, row in first]
        looks = {into: look_at(rows_of_first, wish, source) for into, wish in wishes.items()}
        form = looks["pixels"].form
        if form.depth == FLOATS:
            raise UsageError(
                "--streaming: the range of floating-point pixels is known only when all are read; drop the flag"
            )
        channels = {into: look.form.channels for into, look in looks.items()}
        self.shape = (form.channels, *size)
        self.condition_channels = channels.get("condition", 0)
        self.white = (white or WHITE_16) if form.depth == SIXTEEN_BITS else None
        self.normalization = of_white(self.white) if self.white else PICTURES
        self.note = f"all bits are kept, white is {self.white:,}" if self.white else looks["pixels"].note
        self.columns = tuple(replace(one, channels=channels.get(one.place, 0)) for one in columns)
        images = {into: (look.column, look.form) for into, look in looks.items()}
        self.is_cropped = stored != size
        of_rows = images, self.columns, label, caption, stored, source
        self.decoder = RowDecoder(*of_rows, skip_bad_images=skip_bad_images, takes_sizes=takes_sizes)
        self.captions = [row[caption] for _, row in first] if caption else None
        self.examples = _Examples(first, self.decoder, size)

    @functools.cached_property
    def content(self) -> str:
        """Identifies the first few images and what belongs to them; reads them."""
        return stream_digest(self.examples)


class RowDecoder(torch.utils.data.Dataset):
    """Decodes batches of rows (id, {column: value}); a `DataLoader` passes the rows as indices.

    Args:
        images: for "pixels", "condition" and the places of `columns`, the name of the column and the form of its
            images.
        columns: the columns that regularizers need.
        label: the column of the class labels.
        caption: the column of the texts.
        size: height and width of the images.
        source: the source that image files must lie in.
        skip_bad_images: whether to skip images that cannot be decoded.
        takes_sizes: whether to read the size of each image before it is resized.
    """

    def __init__(
        self,
        images: dict[str, tuple[str, Form]],
        columns: Sequence[Column],
        label: str | None,
        caption: str | None,
        size: tuple[int, int],
        source: Source,
        *,
        skip_bad_images: bool,
        takes_sizes: bool = False,
    ):
        self._images, self._columns, self._size, self._source = images, columns, size, source
        self._label, self._caption = label, caption
        self._skip, self._takes_sizes = skip_bad_images, takes_sizes
        self._bad = 0

    def __getitems__(self, rows: list[tuple[int, dict]]) -> dict[str, Tensor]:
        """Decodes a batch.

        {"values": (B, C, H, W) uint8, "ids": (B,), "condition": (B, K, H, W) uint8, "class_labels": (B,)}; with texts
        also "texts", a list; with columns that regularizers need, also "columns" by their names, see `column_values`;
        with sizes, "time_ids" (B, 6), see `image_sizes`.
        If bad images are skipped, other images of the batch appear twice, so that B is constant.

        Raises:
            UsageError: if an image (or with skip_bad_images: a whole batch) cannot be decoded, if a row has no label,
                no text or lacks a column, or if a mask has another shape than its picture.
        """
        decoded = [found for row in rows if (found := self.decode(*row)) is not None]
        if not decoded:
            raise DataError(f"{self._source.flag}: none of {len(rows)} images can be decoded")
        return self.stack([decoded[place % len(decoded)] for place in range(len(rows))])

    def stack(self, decoded: list[dict]) -> dict:
        """Joins decoded rows to a batch."""
        batch = {name: _stack([row[name] for row in decoded]) for name in decoded[0]}
        if self._columns:
            batch["columns"] = {one.name: _column_of(one, batch.pop(one.place)) for one in self._columns}
        return batch

    def decode(self, id: int, row: dict) -> dict[str, np.ndarray] | None:
        """Decodes one row; None for a bad image that is skipped."""
        where = f"row {id % ROWS_OF_A_PIECE} of piece {id // ROWS_OF_A_PIECE}"
        try:
            found = {
                {"pixels": "values"}.get(into, into): decode_stored(row[name], where, self._size, form, self._source)
                for into, (name, form) in self._images.items()
            }
        except BadImage as error:
            if not self._skip:
                raise
            self._bad += 1
            if self._bad <= _BAD_IMAGES_NAMED:
                rest = "; further images are not listed" if self._bad == _BAD_IMAGES_NAMED else ""
                warn(f"--skip_bad_images: skipped {error.problem}{rest}")
            return None
        found["ids"] = np.int64(id)
        if self._takes_sizes:
            original = size_of(row[self._images["pixels"][0]], self._source)
            found["time_ids"] = time_ids(torch.tensor([original]), self._size)[0].numpy()
        if self._label is not None:
            if row[self._label] is None or row[self._label] < 0:
                raise DataError(f"--label_column {self._label}: {where} has no label")
            found["class_labels"] = np.int64(row[self._label])
        if self._caption is not None:
            if not (row[self._caption] or "").strip():
                raise DataError(
                    f"--caption_column {self._caption}: {where} has no text: add one, or give one for all by --prompt"
                )
            found["texts"] = row[self._caption]
        for column in self._columns:
            if column.kind == "mask":
                own, picture = (size_of(row[self._images[into][0]], self._source) for into in (column.place, "pixels"))
                if problem := misshapen(column, own, picture):
                    raise DataError(f"{column.title}: {where}: {problem}")
            elif column.text is not None:
                found[column.place] = column.text
            elif not column.is_image:
                found[column.place] = row_value(column, row[column.source], where)
        return found


class _Examples:
    """The first rows of a stream, decoded on demand."""

    normalization = PICTURES

    def __init__(self, rows: list[tuple[int, dict]], decoder: RowDecoder, size: tuple[int, int]):
        self._rows, self._decoder, self._size = rows, decoder, size

    def __len__(self) -> int:
        return len(self._rows)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        return central(self._decoder.stack([self._readable(index) for index in indices]), self._size)

    def _readable(self, index: int) -> dict[str, np.ndarray]:
        """Decodes the row; if bad images are skipped, the next row that can be decoded."""
        for place in range(index, index + len(self)):
            if (found := self._decoder.decode(*self._rows[place % len(self)])) is not None:
                return found
        raise UsageError(f"none of the first {len(self)} images can be decoded")


def _stack(values: list[np.ndarray] | list[str]) -> Tensor | list[str]:
    if isinstance(values[0], str):
        return values
    stacked = np.stack(values)
    return torch.from_numpy(stacked.astype(np.int32) if stacked.dtype == np.uint16 else stacked)


def _column_of(column: Column, values: Tensor | list[str]) -> Tensor | list[str]:
    return seen_image(column, values) if column.is_image else values


def _first_rows(rows, source: Source) -> list[tuple[int, dict]]:
    first, size = [], 0
    try:
        for row in rows:
            first.append((len(first), row))
            size += bytes_of(row)
            if len(first) >= _EXAMPLES or size >= _EXAMPLE_BYTES:
                break
    except Exception as error:
        raise unreadable(source, error) from error
    if not first:
        raise UsageError(f"{source.flag}: holds no images")
    return first


def shards_of_table(number: int) -> int:
    """Returns the number of shards of a streamed table: up to 1,024, of 16 rows or more, as each is slow to open."""
    return min(number, max(number // 16, 64), 1024)


def bytes_of(row: dict) -> int:
    return sum(len(value.get("bytes") or b"") for value in row.values() if isinstance(value, dict))


def unreadable(source: Source, error: Exception) -> DataError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return DataError(f"{source.flag}: cannot be read: {reason}")
