"""What a regularizer is: its call, its name and its needs."""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Regularizer", "TermError", "at_least_float32", "is_built_in", "masks_of", "needs_of"]
__all__ += ["refuse_another_size", "regularizer_name"]


class Regularizer(Protocol):
    """A differentiable loss on an image, small for desired images.

    The optional attribute `needs` names keyword arguments that it takes in addition to the image. Tensors among them
    have the batch as their first dimension. The optional attribute `masks` names those that are images of weights from
    0 to 1; any that is called mask, or ends with _mask, is one.
    """

    def __call__(self, x0_hat: Tensor, /, **context) -> Tensor:
        """Maps images (B, C, H, W), float32 in about [-1, 1], to one value per image, (B,)."""
        ...


def regularizer_name(regularizer: Regularizer) -> str:
    """Returns the name of a regularizer for logs: the name of its function or class."""
    if isinstance(regularizer, partial):
        return regularizer_name(regularizer.func)
    return getattr(regularizer, "__name__", type(regularizer).__name__)


def is_built_in(regularizer: Regularizer) -> bool:
    """Whether a regularizer belongs to this package, so that its ValueError is about its arguments or images."""
    func = regularizer.func if isinstance(regularizer, partial) else regularizer
    return str(func.__module__).startswith(f"{__package__}.")


class TermError(ValueError):
    """Raised when a regularizer, weighting, view or estimator violates its contract; the message names the term."""


def needs_of(regularizer: Regularizer) -> tuple[str, ...]:
    """Returns the names in a regularizer's `needs`, without those that a `functools.partial` has bound.

    Raises:
        TermError: `needs` is not a sequence of names.
    """
    needs = getattr(regularizer, "needs", None)
    if needs is None and isinstance(regularizer, partial):
        return tuple(name for name in needs_of(regularizer.func) if name not in regularizer.keywords)
    if needs is None:
        return ()
    is_names = isinstance(needs, tuple | list | set | frozenset) and all(isinstance(name, str) for name in needs)
    if not is_names:
        name = regularizer_name(regularizer)
        raise TermError(f'needs of regularizer {name!r} must be a tuple of names, such as ("mask",), not {needs!r}')
    return tuple(needs)


def masks_of(regularizer: Regularizer) -> tuple[str, ...]:
    """Returns those of a regularizer's `needs` that are images of weights from 0 to 1."""
    func = regularizer.func if isinstance(regularizer, partial) else regularizer
    named = getattr(func, "masks", ())
    return tuple(need for need in needs_of(regularizer) if need in named or need == "mask" or need.endswith("_mask"))


def at_least_float32(images: Tensor) -> Tensor:
    """Converts half precision to float32; float32 and float64 stay as they are."""
    return images.to(torch.promote_types(images.dtype, torch.float32))


def refuse_another_size(x0_hat: Tensor, original_samples: Tensor) -> None:
    """Raises ValueError unless both are images of one size; PyTorch would repeat a channel, row or column silently."""
    ours, theirs = tuple(x0_hat.shape[1:]), tuple(original_samples.shape[1:])
    if ours != theirs:
        raise ValueError(
            f"original_samples have the size {theirs}, x0_hat {ours}: pass images of one size, or original_images= for"
            " what a view shows"
        )
