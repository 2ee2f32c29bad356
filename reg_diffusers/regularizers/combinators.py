"""Regularizers made from other functions: with a threshold, on resized, cropped or masked images, from a residual.

What the function needs in addition to the image is passed on, and a network in it is frozen and moved with the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .contract import Regularizer, at_least_float32, masks_of, needs_of, regularizer_name

__all__ = ["equality", "inequality", "masked", "random_crop", "resized", "threshold"]


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


def masked(regularizer: Regularizer, mask: str = "mask") -> Regularizer:
    """Returns L' of x0_hat where a mask is set, and of the original image elsewhere: L'(m x0_hat + (1 - m) x0).

    Outside the mask the gradient is exactly 0, and a paired L' sees no difference. A mean over pixels still divides by
    all of them: with a mask that covers a tenth of the image, it is a tenth of the mean inside.

    Args:
        regularizer: L'.
        mask: name of the mask in `needs`: (n, 1 or C, H, W), of booleans or integers, set where not 0, or of floating
            numbers from 0 to 1.

    Raises:
        ValueError: in the call, the mask has another shape, or floating values outside [0, 1] (checked on the CPU
            only).
    """
    inner_needs = needs_of(regularizer)

    def call(inner: Regularizer, x0_hat: Tensor, context: dict) -> Tensor:
        original, area = context["original_samples"], _checked_mask(context[mask], mask, x0_hat)
        if area.dtype == torch.bool:
            shown = torch.where(area, x0_hat, original.to(x0_hat))
        else:
            shown = torch.lerp(original.to(x0_hat), x0_hat, area.to(x0_hat).expand_as(x0_hat))
        return inner(shown, **{name: context[name] for name in inner_needs})

    made = _Made(regularizer, call, dict.fromkeys((*inner_needs, "original_samples", mask)))
    made.masks = (*made.masks, mask)
    return made


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
    """A regularizer with the name, needs, masks and networks of the function it is made from."""

    def __init__(
        self,
        source: Callable[..., Tensor],
        call: Callable[[Callable, Tensor, dict], Tensor],
        needs: Iterable[str] | None = None,
    ):
        super().__init__()
        if not callable(source):
            raise TypeError(f"a function of the image is needed, not {type(source).__name__}")
        self.source = source  # a network becomes a submodule
        self.needs = needs_of(source) if needs is None else tuple(needs)
        self.masks = masks_of(source)
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


def _checked_mask(mask: Tensor, name: str, x0_hat: Tensor) -> Tensor:
    """Returns a mask as booleans or as floating numbers from 0 to 1, on the device of the image."""
    expected = x0_hat.shape
    if mask.ndim != len(expected) or mask.shape[2:] != expected[2:] or mask.shape[1] not in (1, expected[1]):
        raise ValueError(f"{name} must have shape {(len(x0_hat), 1, *expected[2:])}, not {tuple(mask.shape)}")
    if not mask.is_floating_point():
        mask = mask != 0
    elif mask.device.type == "cpu" and not ((mask >= 0) & (mask <= 1)).all():  # elsewhere it would wait
        low, high = (value.item() for value in mask.aminmax())
        raise ValueError(f"{name} must have values from 0 to 1, not from {low:.3g} to {high:.3g}")
    return mask.to(x0_hat.device)


def _mean_square(residual: Tensor) -> Tensor:
    squared = at_least_float32(residual).square()
    return squared.flatten(1).mean(1) if squared.ndim > 1 else squared
