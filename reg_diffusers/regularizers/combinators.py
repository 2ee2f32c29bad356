"""Regularizers made from other functions: with a threshold, on resized or cropped images, from a residual.

What the function needs in addition to the image is passed on, and a network in it is frozen and moved with the loss.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .contract import Regularizer, at_least_float32, needs_of, regularizer_name

__all__ = ["equality", "inequality", "random_crop", "resized", "threshold"]


def threshold(regularizer: Regularizer, level: float) -> Regularizer:
    """Returns max(0, L' - level), which leaves images below the level alone.

    With the mean of L' over the data as level, no image is pushed beyond what the data have.

    Args:
        regularizer: L'.
        level: in the unit of L'.
    """
    return _Made(regularizer, lambda inner, x0_hat, context: (inner(x0_hat, **context) - level).clamp_min(0))


def resized(regularizer: Regularizer, size: int | tuple[int, int]) -> Regularizer:
    """Returns L' of the resized image, bilinear with antialiasing.

    Context with the height and width of the image, such as original_samples, is resized as well.

    Args:
        regularizer: L'.
        size: height and width, or one number for both.
    """
    size = _pair(size)

    def resize(image: Tensor) -> Tensor:
        image = at_least_float32(image)
        return nn.functional.interpolate(image, size, mode="bilinear", antialias=True, align_corners=False)

    return _Made(regularizer, lambda inner, x0_hat, context: inner(resize(x0_hat), **_alike(context, x0_hat, resize)))


def random_crop(regularizer: Regularizer, size: int | tuple[int, int]) -> Regularizer:
    """Returns L' of a random window of the image, for networks that need a fixed size or much memory.

    Each call draws one window for the batch, from the global random numbers of the CPU. Context with the height and
    width of the image, such as original_samples, is cropped to the same window.

    Args:
        regularizer: L'.
        size: height and width of the window, or one number for both.

    Raises:
        ValueError: in the call, the image is smaller than the window.
    """
    height, width = _pair(size)

    def call(inner: Regularizer, x0_hat: Tensor, context: dict) -> Tensor:
        free = x0_hat.shape[-2] - height, x0_hat.shape[-1] - width
        if min(free) < 0:
            raise ValueError(f"random_crop of {height} x {width} from an image of {tuple(x0_hat.shape[-2:])}")
        top, left = (int(torch.randint(space + 1, ())) for space in free)

        def crop(image: Tensor) -> Tensor:
            return image[..., top : top + height, left : left + width]

        return inner(crop(x0_hat), **_alike(context, x0_hat, crop))

    return _Made(regularizer, call)


def equality(residual: Callable[..., Tensor]) -> Regularizer:
    """Makes a regularizer of an equation, residual(u) = 0: mean residual(u)^2.

    Args:
        residual: function of images (B, C, H, W), and of what its `needs` names, -> (B, ...).
    """
    return _Made(residual, lambda inner, x0_hat, context: _mean_square(inner(x0_hat, **context)))


def inequality(residual: Callable[..., Tensor]) -> Regularizer:
    """Makes a regularizer of an inequality, residual(u) <= 0: mean max(0, residual(u))^2.

    Args:
        residual: function of images (B, C, H, W), and of what its `needs` names, -> (B, ...).
    """
    return _Made(residual, lambda inner, x0_hat, context: _mean_square(inner(x0_hat, **context).clamp_min(0)))


class _Made(nn.Module):
    """A regularizer with the name, needs and networks of the function it is made from."""

    def __init__(self, source: Callable[..., Tensor], call: Callable[[Callable, Tensor, dict], Tensor]):
        super().__init__()
        if not callable(source):
            raise TypeError(f"a function of the image is needed, not {type(source).__name__}")
        self.source = source  # a network becomes a submodule
        self.needs = needs_of(source)
        self.__name__ = regularizer_name(source)
        self._call = call

    def forward(self, x0_hat: Tensor, /, **context) -> Tensor:
        return self._call(self.source, x0_hat, context)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _alike(context: dict, x0_hat: Tensor, change: Callable[[Tensor], Tensor]) -> dict:
    """The context, with what has the height and width of the image changed as the image is."""

    def is_image(value) -> bool:
        return isinstance(value, Tensor) and value.ndim == x0_hat.ndim and value.shape[-2:] == x0_hat.shape[-2:]

    return {name: change(value) if is_image(value) else value for name, value in context.items()}


def _mean_square(residual: Tensor) -> Tensor:
    squared = at_least_float32(residual).square()
    return squared.flatten(1).mean(1) if squared.ndim > 1 else squared
