"""Values passed to regularizers and networks with the images: one entry per image of a batch, or `Shared`."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Shared", "cut", "positions", "repeat", "tensors_in", "unwrap"]


@dataclass(frozen=True)
class Shared:
    """Marks a value that belongs to the whole batch: it is passed on unchanged and never indexed by image.

        regularization(model_output, timesteps, noisy_samples, kernel=Shared(kernel))

    A 3 x 3 kernel needs it, because at batch size 3 its rows cannot be told apart from images.

    Attributes:
        value: any object.
    """

    value: Any


def positions(index: Tensor, batch_size: int) -> Tensor | None:
    """Returns increasing positions of images in a batch, for `cut`; None if they are those of all images."""
    return None if index.shape[0] == batch_size else index


def cut(value: Any, index: Tensor | None, batch_size: int, name: str = "context") -> Any:
    """Selects the part of a value that belongs to the chosen images of a batch.

    Tensors, arrays, lists, tuples and other sequences must have one entry per image and are indexed, a pandas Series
    by position. Dictionaries, including a BatchEncoding, are processed entry by entry. Numbers, strings, scalar
    tensors, other objects and tensors with one row, which broadcast, are returned unchanged; `Shared` is unwrapped.

    Args:
        value: value for the whole batch.
        index: (n,) positions of the chosen images, on an accelerator in increasing order; None for all images.
        batch_size: B.
        name: name of the value in the error message.

    Raises:
        ValueError: the length of a tensor, array or sequence differs from B.
    """
    if isinstance(value, Tensor):
        count = value.shape[0] if value.ndim > 0 else 1
    elif isinstance(value, Shared):
        return value.value
    elif isinstance(value, Mapping):
        part = copy.copy(value)
        for key, entry in value.items():
            part[key] = cut(entry, index, batch_size, f"{name}[{key!r}]")
        return part
    elif not _is_sequence(value):
        return value
    else:
        count = len(value)
    if count == 1 and hasattr(value, "shape"):
        return value
    if count != batch_size:
        raise ValueError(
            f"{name} has {count} entries for a batch of {batch_size}: pass one per image, or"
            f" Shared({name.split('[')[0]}) for a value of the whole batch"
        )
    if index is None or (index.shape[0] == batch_size and _are_in_order(index)):  # all images
        return value
    if isinstance(value, Tensor):
        return value[index.to(value.device, non_blocking=True)]
    if isinstance(value, Sequence):
        chosen = [value[i] for i in index.tolist()]
        return tuple(chosen) if isinstance(value, tuple) else chosen
    return getattr(value, "iloc", value)[index.tolist()]  # a plain index would select pandas labels, not positions


def repeat(value: Any, times: int, batch_size: int) -> Any:
    """Repeats a value for `times` copies of a batch, one after the other; values of the whole batch are unchanged."""
    if isinstance(value, Mapping):
        repeated = copy.copy(value)
        for key, entry in value.items():
            repeated[key] = repeat(entry, times, batch_size)
        return repeated
    if not _is_sequence(value) or len(value) != batch_size:
        return value
    if isinstance(value, Tensor):
        return value.repeat(times, *(1,) * (value.ndim - 1))
    if isinstance(value, Sequence):
        return (value if isinstance(value, tuple) else list(value)) * times
    return getattr(value, "iloc", value)[list(range(batch_size)) * times]


def _are_in_order(index: Tensor) -> bool:
    if index.device.type != "cpu":  # where reading it would wait
        return True
    return torch.equal(index, torch.arange(len(index), device="cpu"))


def unwrap(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values for the whole batch, with each `Shared` unwrapped, also inside dictionaries."""
    return {name: _unwrapped(value) for name, value in values.items()}


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yields all tensors in a value, including those in dictionaries, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from tensors_in(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from tensors_in(entry)


def _unwrapped(value: Any) -> Any:
    if isinstance(value, Shared):
        return value.value
    if not isinstance(value, Mapping) or not _holds_shared(value):
        return value
    part = copy.copy(value)
    for key, entry in value.items():
        part[key] = _unwrapped(entry)
    return part


def _holds_shared(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_shared(entry) for entry in value.values())
    return isinstance(value, Shared)


def _is_sequence(value: Any) -> bool:
    if isinstance(value, Sequence):
        return not isinstance(value, str | bytes)
    return len(getattr(value, "shape", ())) > 0
