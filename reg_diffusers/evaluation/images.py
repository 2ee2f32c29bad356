"""Images that are read when they are needed, because memory may not hold all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Images", "blocks"]

_AT_A_TIME = 256


@dataclass(frozen=True)
class Images:
    """Images of which slices are tensors, like those of a tensor (N, C, H, W).

    Attributes:
        number: N.
        read: returns the images at some places, (n, C, H, W) in [-1, 1].
        device: the device of the slices.
    """

    number: int
    read: Callable[[range], Tensor]
    device: torch.device | str = "cpu"

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, part: slice) -> Tensor:
        return self.read(range(self.number)[part]).to(self.device)


def blocks(images: Tensor | Images) -> Iterator[Tensor]:
    """Yields the images in order, a few hundred at a time."""
    for start in range(0, len(images), _AT_A_TIME):
        yield images[start : start + _AT_A_TIME]
