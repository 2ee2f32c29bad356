"""From values as stored to samples in [-1, 1]."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PICTURES", "Normalization"]


@dataclass(frozen=True)
class Normalization:
    """The affine map between values as stored and samples in [-1, 1]: value = offset + scale * sample.

    Attributes:
        offset: one number per channel, or a single one.
        scale: likewise, above 0.
    """

    offset: tuple[float, ...]
    scale: tuple[float, ...]

    def normalize(self, values: Tensor) -> Tensor:
        """(B, C, H, W) stored values of any type -> float32 samples."""
        offset, scale = (_per_channel(numbers, values.device) for numbers in (self.offset, self.scale))
        return (values.float() - offset) / scale


@functools.cache  # copying to an accelerator at every batch would wait for it
def _per_channel(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32, device=device).reshape(1, -1, 1, 1)


PICTURES = Normalization(offset=(127.5,), scale=(127.5,))
