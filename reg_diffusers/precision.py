"""The dtype in which a loss is computed, and whether its values are finite."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

__all__ = ["all_finite", "full_precision", "promoted"]


@functools.cache  # torch.promote_types is an operation of its own in every step
def promoted(*dtypes: torch.dtype) -> torch.dtype:
    """Returns the dtype that holds values of all these dtypes."""
    return functools.reduce(torch.promote_types, dtypes)


def full_precision(*dtypes: torch.dtype) -> torch.dtype:
    """Returns the dtype that holds values of these dtypes, float32 or float64."""
    return promoted(*dtypes, torch.float32)


def all_finite(values: Tensor) -> bool:
    """Whether all values are finite, usually from their sum alone. Waits for an accelerator.

    A finite sum has finite addends. A sum that is not may have overflowed, so the values themselves are then checked.
    """
    total = values.detach().sum(dtype=full_precision(values.dtype)).item()
    return math.isfinite(total) or bool(values.isfinite().all())
