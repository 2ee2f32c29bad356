"""A data set of decoded images, with their class labels, conditioning images and other columns."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from .column_values import numbers_of, seen_image
from .columns import Column
from .content import joined
from .crops import Uncropped, central
from .image_sizes import original_sizes_of, time_ids
from .normalization import PICTURES, Normalization, of_white

__all__ = ["PictureData"]


class PictureData(torch.utils.data.Dataset):
    """Decoded images, with class labels and conditioning images if requested.

    Attributes:
        shape: (C, H, W).
        normalization: from 0..255 to [-1, 1], from 0..white, or of fields.
        white: white of pictures with all their bits; None for those of 8 bits.
        is_picture: whether they are pictures, and not fields of floating-point numbers.
        is_cropped: whether they are stored larger, for random windows; `examples` are the central ones.
        classes: names of the classes, or None.
        condition_channels: channels K of the conditioning images, 0 without.
        note: a line to print at the start, next to the number and shape of the data.
        columns: columns that regularizers need.
        number: number of images.
        examples: images for repeated use: all of them.
        fingerprint: identifies the images and their order.
        content: identifies the images and everything that belongs to them.
        original_sizes: heights and widths before they were resized, (N, 2), if the network takes them; else None.

    Args:
        table: decoded images.
        digests: a hash of each column of the table, see `content.table_digests`.
    """

    normalization = PICTURES
    is_picture = True
    white = None
    prompts = None

    def __init__(
        self,
        table,
        shape: tuple[int, int, int],
        classes: list[str] | None,
        condition_channels: int = 0,
        note: str = "",
        caption: str | None = None,
        columns: Sequence[Column] = (),
        stored: tuple[int, int] | None = None,
        *,
        digests: Mapping[str, str],
    ):
        self.fingerprint, self.content = digests["pixels"], joined(digests.values())
        self._table = table.with_format("arrow")
        self.shape = shape
        self._size = stored or tuple(shape[1:])
        self.is_cropped = self._size != tuple(shape[1:])
        self.classes = classes
        self.condition_channels = condition_channels
        self.note = note
        self._caption = caption
        self.columns = tuple(columns)
        self.original_sizes = original_sizes_of(table)
        self._numbers = {column.name: numbers_of(table, column) for column in columns if column.kind == "number"}

    def __len__(self) -> int:
        return len(self._table)

    @property
    def number(self) -> int:
        return len(self)

    @property
    def examples(self) -> PictureData:
        return self

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Reads the batch of these indices at once.

        {"values": (B, C, H, W) uint8 (all bits: int32, fields: float32), "ids": (B,), "condition": (B, K, H, W) uint8,
        "class_labels": (B,)}; with columns that regularizers need, also "columns" by their names, see `column_values`;
        with original sizes, "time_ids" (B, 6), see `image_sizes`.
        """
        batch = self._read(indices)
        return central(batch, self.shape[1:]) if self.is_cropped else batch

    @property
    def uncropped(self) -> Uncropped:
        """The same data set in the size in which the images are stored."""
        return Uncropped(self._read, range(len(self)))

    def _read(self, indices: list[int]) -> dict[str, Tensor]:
        rows = self._table[indices]
        batch = {"values": _pixels(rows["pixels"], (self.shape[0], *self._size)), **self._belonging(rows, indices)}
        if self.condition_channels:
            batch["condition"] = _pixels(rows["condition"], (self.condition_channels, *self._size))
        return batch

    def labels(self, indices: list[int]) -> dict:
        """Reads what belongs to the images of these indices: {"ids": (B,), "class_labels": (B,), "columns": {...}}."""
        return self._belonging(self._table[indices] if self.columns else None, indices)

    def _belonging(self, rows, indices: list[int]) -> dict:
        found = {"ids": torch.tensor(indices)}
        if self.classes is not None:
            found["class_labels"] = self._class_labels[indices]
        if self.original_sizes is not None:
            found["time_ids"] = time_ids(self.original_sizes[indices], self._size)
        if self.columns:
            found["columns"] = {column.name: self._values(column, rows, indices) for column in self.columns}
        return found

    def number_classes_as(self, classes: list[str]) -> None:
        """Numbers the classes as another data set does.

        Args:
            classes: the names of the classes of that data set.

        Raises:
            ValueError: this data set has another class; the message names it.
        """
        if unknown := [name for name in self.classes if name not in classes]:
            raise ValueError(f"{unknown[0]} is not one of the classes {', '.join(classes)}")
        numbers = torch.tensor([classes.index(name) for name in self.classes])
        self._class_labels, self.classes = numbers[self._class_labels], classes

    def _values(self, column: Column, rows, indices: list[int]) -> Tensor | list[str]:
        if column.is_image:
            return seen_image(column, _pixels(rows[column.place], (column.channels, *self._size)))
        if column.kind == "number":
            return self._numbers[column.name][indices]
        return [column.text] * len(indices) if column.text is not None else rows[column.source].to_pylist()

    @property
    def stored(self) -> _Stored:
        """The values of all images, to read a slice at a time."""
        return _Stored(self)

    def largest(self) -> int:
        """Returns the largest value of all images."""
        return max(int(self.stored[start : start + 1000].max()) for start in range(0, len(self), 1000))

    def become_deep(self, white: int, note: str) -> None:
        """Sets the white of pictures with all their bits."""
        self.white, self.normalization, self.note = white, of_white(white), note

    def become_fields(self, normalization: Normalization) -> None:
        """Makes images of floating-point pixels fields."""
        self.is_picture, self.normalization, self.note = False, normalization, normalization.note

    @property
    def captions(self) -> list[str | None]:
        """The texts of the images, in order; only with a column of captions."""
        return list(self._table.select_columns(self._caption).with_format(None)[self._caption][:])

    @functools.cached_property
    def _class_labels(self) -> Tensor:
        column = self._table.select_columns("class_label").with_format("numpy")["class_label"][:]
        return torch.from_numpy(np.array(column))


class _Stored:
    """The values of a data set as an array (N, C, H, W) that is read a slice at a time."""

    dtype = np.dtype(np.float32)  # of fields

    def __init__(self, data: PictureData):
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, part: slice) -> np.ndarray:
        return self._data.__getitems__(list(range(*part.indices(len(self)))))["values"].numpy()


def _pixels(column, shape: tuple[int, int, int]) -> Tensor:
    """Converts a column of flattened images to a tensor (B, *shape)."""
    values = column.combine_chunks().flatten().to_numpy()
    return torch.from_numpy(values.astype(np.int32 if values.dtype == np.uint16 else values.dtype)).reshape(-1, *shape)
