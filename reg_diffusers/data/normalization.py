"""Normalizes stored values to samples in [-1, 1]."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..runtime.errors import UsageError, warn
from ..views import Affine

__all__ = ["PICTURES", "Normalization", "field_normalization", "of_white"]

_FAR = 3  # in scales of the given model: fields further from its offset are likely in other units
_FINEST = 2**-7  # in scales of a channel: numbers with a coarser resolution form steps


@dataclass(frozen=True)
class Normalization:
    """The affine map between stored values and samples in [-1, 1]: value = offset + scale * sample.

    Attributes:
        offset: one number per channel, or one for all.
        scale: likewise, above 0.
    """

    offset: tuple[float, ...]
    scale: tuple[float, ...]

    def normalize(self, values: Tensor) -> Tensor:
        """Converts stored values (B, C, H, W) of any dtype to float32 samples; computes fields in float64."""
        is_exact = not values.is_floating_point() or values.device.type == "mps"  # pictures; MPS lacks float64
        dtype = torch.float32 if is_exact else torch.float64
        offset, scale = (_per_channel(numbers, values.device, dtype) for numbers in (self.offset, self.scale))
        return ((values.to(dtype) - offset) / scale).float()

    @property
    def note(self) -> str:
        """Describes it in a line."""
        return f"offset {_shown(self.offset)} + scale {_shown(self.scale)} * sample"

    @property
    def units(self) -> Affine:
        """Returns the inverse map, from samples to stored values."""
        return Affine(self.scale, self.offset)


@functools.cache  # a copy to the accelerator per batch would synchronize with it
def _per_channel(numbers: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(numbers, dtype=dtype, device=device).reshape(1, -1, 1, 1)


PICTURES = Normalization(offset=(127.5,), scale=(127.5,))


def _shown(numbers: tuple[float, ...]) -> str:
    """Formats one number per channel, or the first four."""
    shown = ", ".join(f"{number:.10g}" for number in numbers[:4])
    return f"({shown}{', ...' if len(numbers) > 4 else ''})"


def of_white(white: int) -> Normalization:
    """Returns the map from 0..white to [-1, 1]."""
    return Normalization(offset=(white / 2,), scale=(white / 2,))


def field_normalization(array: np.ndarray, given: Normalization | None, field_scale: str) -> Normalization:
    """Builds the normalization that maps the range of each channel to [-1, 1], reading a thousand fields at a time.

    Args:
        array: (N, C, H, W) fields.
        given: the normalization of a given model, which is kept.
        field_scale: "channel": each channel has its own scale; "common": all share the largest one, each around the
            middle of its own range, so derivatives across channels, such as a divergence, keep their meaning.

    Raises:
        UsageError: if values are non-finite or exceed the range of float32.
    """
    chunks = [array[start : start + 1000] for start in range(0, len(array), 1000)]
    low = np.min([chunk.min(axis=(0, 2, 3)) for chunk in chunks], axis=0).astype(np.float64)
    high = np.max([chunk.max(axis=(0, 2, 3)) for chunk in chunks], axis=0).astype(np.float64)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise UsageError("the fields hold infinite or missing (nan) values: replace or remove these fields")
    largest, limit = max(np.abs(low).max(), np.abs(high).max()), np.finfo(np.float32).max
    if largest > limit:
        raise UsageError(
            f"the fields hold values up to {largest:.3g}, but float32 at most {limit:.3g}: store them in larger units"
        )
    if given is not None:
        _warn_of_other_units(given, low, high)
        return given
    scale = (high - low) / 2
    _warn_of_stairs(array.dtype, low, high)
    if field_scale == "common":
        scale = np.full_like(scale, scale.max())
    scale = np.where(scale > 0, scale, 1.0)  # a constant channel becomes 0
    return Normalization(tuple(((high + low) / 2).tolist()), tuple(scale.tolist()))


def _warn_of_other_units(given: Normalization, low: np.ndarray, high: np.ndarray) -> None:
    """Warns if fields are far from the range that the given model was trained on."""
    for channel, (least, most) in enumerate(zip(low, high, strict=True)):
        place = channel if len(given.offset) == len(low) else 0
        offset, scale = given.offset[place], given.scale[place]
        if max(abs(least - offset), abs(most - offset)) > _FAR * scale:
            warn(
                f"channel {channel} of the fields ranges from {least:.6g} to {most:.6g}, but the given model was"
                f" trained on {offset - scale:.6g} to {offset + scale:.6g}: are the units the same?"
            )


def _warn_of_stairs(dtype: np.dtype, low: np.ndarray, high: np.ndarray) -> None:
    """Warns of channels that are constant, or so far from 0 that their dtype resolves few values in their range."""
    dtype = dtype.newbyteorder("=") if dtype.kind == "f" else np.dtype(np.float64)
    for channel, (least, most) in enumerate(zip(low, high, strict=True)):
        step = float(np.spacing(np.array(max(abs(least), abs(most)), dtype)))
        if least == most:
            warn(f"channel {channel} of the fields is constant, {least:g}, and becomes 0")
        elif step > _FINEST * (most - least) / 2:
            warn(
                f"channel {channel} of the fields ranges from {least:.10g} to {most:.10g}, where {dtype} numbers are"
                f" {step:.2g} apart: subtract an offset before storing them"
            )
