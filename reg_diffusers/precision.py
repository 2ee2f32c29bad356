"""The dtypes of a network and of a loss, whether values are finite, and whether they were overwritten."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

__all__ = ["all_finite", "full_precision", "input_dtype", "promoted", "version_of", "versions_of"]


@functools.cache  # torch.promote_types is an operation of its own in every step
def promoted(*dtypes: torch.dtype) -> torch.dtype:
    """Returns the dtype that holds values of all these dtypes."""
    return functools.reduce(torch.promote_types, dtypes)


def full_precision(*dtypes: torch.dtype) -> torch.dtype:
    """Returns the dtype that holds values of these dtypes, float32 or float64."""
    return promoted(*dtypes, torch.float32)


def input_dtype(model, sample: Tensor) -> torch.dtype:
    """Returns the dtype of the network's input: that of its weights, or of the images if it has no weights."""
    weight = _first_weight(model) if isinstance(model, nn.Module) else None
    return sample.dtype if weight is None else weight.dtype


def _first_weight(module: nn.Module) -> Tensor | None:
    """Returns the first of `parameters()` that is a real number; None if there is none.

    `parameters()` itself lists all modules by name before it returns the first weight.
    """
    for weight in module._parameters.values():
        if weight is not None and weight.is_floating_point():
            return weight
    for part in module._modules.values():
        if part is not None and (weight := _first_weight(part)) is not None:
            return weight
    return None


def all_finite(values: Tensor) -> bool:
    """Whether all values are finite, usually from their sum alone. Waits for an accelerator.

    A finite sum has finite addends. A sum that is not may have overflowed, so the values themselves are then checked.
    """
    total = values.sum(dtype=full_precision(values.dtype)).item()
    return math.isfinite(total) or bool(values.isfinite().all())


def version_of(tensor: Tensor) -> int:
    """Returns a number that changes when a tensor is modified in place."""
    return 0 if tensor.is_inference() else tensor._version


def versions_of(tensors: Iterable[Tensor]) -> list[int]:
    """Returns `version_of` each tensor."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]
