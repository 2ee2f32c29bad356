"""Reads the columns that regularizers need, and checks them.

A batch of data holds them under "columns", by the name in the regularizers' `needs`, as regularizers see them: images
(B, K, H, W) in [-1, 1], masks (B, 1, H, W) in [0, 1], numbers (B,), a list of B texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..runtime.errors import DataError, UsageError
from .columns import Column
from .normalization import PICTURES

__all__ = ["check_masks", "check_shapes", "check_texts", "flipped", "misshapen", "numbers_of", "row_value"]
__all__ += ["seen_image"]

_BLACK = 1 / 255  # the largest value of a mask of zeros and ones that is read as a picture


def check_shapes(column: Column, sizes: np.ndarray, pictures: np.ndarray) -> None:
    """Checks that masks have the shape of their pictures, so that the same resize and crop keeps them aligned.

    Args:
        column: the column of the masks.
        sizes: (height, width) of the masks, (N, 2); 0 if unreadable.
        pictures: that of the pictures.

    Raises:
        UsageError: a mask has another shape than its picture.
    """
    for row, (own, picture) in enumerate(zip(sizes.tolist(), pictures.tolist(), strict=True)):
        if problem := misshapen(column, own, picture):
            raise UsageError(f"{column.title}: row {row}: {problem}")


def misshapen(column: Column, own: tuple[int, int], picture: tuple[int, int]) -> str:
    """Returns why a mask does not fit its picture; "" if it does, up to a pixel of the smaller one."""
    small, large = sorted((tuple(own), tuple(picture)))
    if 0 in small or abs(small[0] * large[1] - small[1] * large[0]) <= max(large):
        return ""
    shown = [f"{width} x {height}" for height, width in (own, picture)]
    return (
        f"a mask of {shown[0]} pixels for a picture of {shown[1]}: both are resized and cropped alike, so a mask needs"
        " the shape of its picture"
    )


def check_masks(data) -> None:
    """Checks that masks are not almost black: 0 and 1 in a file of 8 bits, where white is 255.

    Args:
        data: the data set, of which up to 64 images are looked at.

    Raises:
        UsageError: the masks are almost black.
    """
    masks, examples = [column for column in data.columns if column.kind == "mask"], data.examples
    if not masks:
        return
    rows = np.linspace(0, len(examples) - 1, min(len(examples), 64)).astype(int).tolist()
    found = examples.__getitems__(rows)["columns"]
    for column in masks:
        if 0 < found[column.name].max() <= _BLACK:
            raise UsageError(
                f"{column.title}: the largest value in {len(rows)} masks is 1 of 255,"
                " which is black: store 255 where a mask is set"
            )


def numbers_of(table, column: Column) -> Tensor:
    """Reads a column of numbers, (N,): float32, int64 or bool.

    Raises:
        UsageError: values are missing or not finite.
    """
    from datasets import ClassLabel
    from pyarrow import compute

    values = table.select_columns(column.source).with_format("arrow")[:].column(column.source)
    if str(values.type).startswith("bool"):
        values = compute.cast(values, "uint8")
        dtype = np.bool_
    else:
        dtype = np.float32 if str(values.type) in ("float", "double", "halffloat") else np.int64
    found = values.to_numpy(zero_copy_only=False)  # nan where a value is missing
    unlabelled = found < 0 if isinstance(table.features[column.source], ClassLabel) else False
    missing = np.flatnonzero(~np.isfinite(found.astype(np.float64)) | unlabelled)
    if len(missing):
        raise UsageError(
            f"{column.title}: {len(missing)} of {len(found)} rows have no finite number, the first is row"
            f" {missing[0]}: add numbers, or remove these rows"
        )
    return torch.from_numpy(found.astype(dtype))


def check_texts(table, column: Column) -> None:
    """Raises `UsageError` if texts are missing."""
    texts = table.select_columns(column.source)[column.source][:]
    if missing := [row for row, text in enumerate(texts) if not (text or "").strip()]:
        raise UsageError(
            f"{column.title}: {len(missing)} of {len(texts)} rows have no text, the first is row {missing[0]}: add"
            " texts, or remove these rows"
        )


def row_value(column: Column, value: Any, where: str) -> np.ndarray | str:
    """Returns the number or text of one row of a stream.

    Args:
        column: its column.
        value: the stored value.
        where: the row, for the message.

    Raises:
        DataError: it is missing or not finite.
    """
    if column.kind == "text":
        if not (value or "").strip():
            raise DataError(f"{column.title}: {where} has no text")
        return value
    if value is None or not np.isfinite(value):
        raise DataError(f"{column.title}: {where} has no finite number")
    dtypes = {float: np.float32, bool: np.bool_}
    return np.asarray(value, dtypes.get(type(value), np.int64))


def seen_image(column: Column, pixels: Tensor) -> Tensor:
    """Converts stored pixels, uint8, to what a regularizer sees: [-1, 1], masks [0, 1]."""
    return pixels.float() / 255 if column.kind == "mask" else PICTURES.normalize(pixels)


def flipped(columns: Mapping[str, Any], mask: Tensor) -> dict[str, Any]:
    """Returns the columns of a batch after the images in `mask` (B, 1, 1, 1) are flipped left to right."""
    return {
        name: torch.where(mask, value.flip(-1), value) if isinstance(value, Tensor) and value.ndim == 4 else value
        for name, value in columns.items()
    }
