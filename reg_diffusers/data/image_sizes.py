"""The sizes that Stable Diffusion XL takes of an image, as diffusers' training scripts give them ("time_ids").

They are (height, width, top, left, target height, target width) in pixels: the image before it is resized, the corner
of its crop in the resized image, and the crop.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["original_sizes_of", "range_text", "time_ids", "windowed", "with_original_sizes"]

_COLUMN = "original size"  # of a table whose other columns are known


def with_original_sizes(table, sizes: np.ndarray):
    """Returns a table of undecoded images with their (height, width), (N, 2), as a column."""
    return table.add_column(_COLUMN, sizes.tolist())


def original_sizes_of(table) -> Tensor | None:
    """Returns the (height, width) of the images of a table before they were resized, (N, 2); None if unknown."""
    if _COLUMN not in table.column_names:
        return None
    return torch.from_numpy(np.array(table.select_columns(_COLUMN).with_format("numpy")[_COLUMN][:])).long()


def time_ids(original: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns the sizes of images that were resized to cover a size and cropped in the centre, (N, 6) int64.

    Args:
        original: their heights and widths before, (N, 2).
        size: height and width after.
    """
    height, width = original.unbind(1)
    fills_height = size[0] * width >= size[1] * height  # and is cut off on the left and right
    resized = torch.where(
        fills_height[:, None],
        torch.stack([torch.full_like(height, size[0]), width * size[0] // height], 1),
        torch.stack([height * size[1] // width, torch.full_like(width, size[1])], 1),
    )
    target = torch.tensor(size).expand_as(original)
    corner = ((resized - target) / 2).round().long()
    return torch.cat([original, corner, target], 1)


def windowed(ids: Tensor, corners: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns the sizes (N, 6) after each image is cropped again.

    Args:
        ids: the sizes before.
        corners: top and left of the windows in the images, (N, 2) or (2,).
        size: height and width of the windows.
    """
    corners = ids[:, 2:4] + corners.to(ids)
    return torch.cat([ids[:, :2], corners, torch.tensor(size).to(ids).expand_as(corners)], 1)


def range_text(original: Tensor | None) -> str:
    """Describes original sizes (N, 2) by the smallest and the largest area; None stands for those of a stream."""
    if original is None:
        return "read with each image"
    areas = original.prod(1)
    ends = original[int(areas.argmin())].tolist(), original[int(areas.argmax())].tolist()
    small, large = (f"{width} x {height}" for height, width in ends)
    return f"{small} pixels" if small == large else f"{small} to {large} pixels"
