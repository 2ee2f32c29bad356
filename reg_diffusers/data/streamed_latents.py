"""Latents of a stream of images, encoded in each step: a stream is never stored, and never read twice for its latents.

The batches of its loader are those of the images. They are cropped and flipped before they are encoded, because the
latents of a window or of a mirror image are not the window or the mirror image of the latents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .columns import Column
from .latents import AT_A_TIME, check_deviation, check_finite
from .normalization import Normalization
from .prompts import Prompts, PromptsOnDemand
from .streaming import StreamedPictures

__all__ = ["StreamedLatents"]

_LOOKED_AT = 16  # images, for the standard deviation of their latents


class StreamedLatents:
    """The latents of a stream of images, with what belongs to the images.

    Args:
        images: the stream.
        encode: (B, C, H, W) in [-1, 1] on the device -> (B, c, h, w).
        device: the device that encodes.
        prompts: the texts of the images, or one text for all; None without texts.
        with_images: whether batches also have the images themselves, for losses that compare with them.

    Attributes:
        images: the stream.
        shape: (c, h, w).
        normalization: the identity, because latents are in the coordinates of the diffusion model.
        classes, columns, white, number, content, is_cropped: those of the images.
        condition_channels: 0.
        downsampling: pixels of an image per pixel of its latents, along each axis.
        note: a line to print at the start, next to the number and shape of the data.
        examples: the first images, encoded each time.
        prompts: the texts of the images, or None.

    Raises:
        UsageError: the latents of one of the first images are non-finite.
    """

    normalization = Normalization((0.0,), (1.0,))
    is_picture = True
    condition_channels = 0

    def __init__(
        self,
        images: StreamedPictures,
        encode: Callable[[Tensor], Tensor],
        device: torch.device,
        prompts: Prompts | PromptsOnDemand | None = None,
        *,
        with_images: bool = False,
    ):
        self.images, self.prompts = images, prompts
        self._encode, self._device, self._with_images = encode, device, with_images
        self.classes, self.white, self.number = images.classes, images.white, images.number
        self.is_cropped = images.is_cropped
        self.examples = _Examples(self)
        rows = range(min(len(self.examples), _LOOKED_AT))
        some = self.examples.__getitems__(list(rows))["values"]
        check_finite(some, rows)
        self.shape = tuple(some.shape[1:])
        self.downsampling = images.shape[1] // self.shape[1]
        deviation = float(some.std())
        check_deviation(deviation)
        self.note = f"encoded in each step; standard deviation {deviation:.3g} of the first {len(some)}"

    @property
    def columns(self) -> tuple[Column, ...]:
        return self.images.columns

    @property
    def content(self) -> str:
        """Identifies the first few images and what belongs to them."""
        return self.images.content

    def seen(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Returns a batch of the images as one of latents, in the form of `LatentData`, on the device.

        Args:
            batch: a batch of the images, after crops and flips, with the "values" in [-1, 1].
        """
        batch = dict(batch)
        pixels, texts = batch["values"].to(self._device), batch.pop("texts", None)
        batch["values"] = torch.cat([self._encode(some) for some in pixels.split(AT_A_TIME)])
        if self._with_images:
            batch["columns"] = {**batch.get("columns", {}), "original_images": pixels}
        if self.prompts is not None:
            of_all = texts is None
            embedded = self.prompts.__getitems__([0] * len(pixels)) if of_all else self.prompts.embed(texts)
            batch |= {name: value.to(self._device) for name, value in embedded.items()}
        return batch


class _Examples:
    """The first images of the stream."""

    def __init__(self, data: StreamedLatents):
        self._data = data

    def __len__(self) -> int:
        return len(self._data.images.examples)

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        images = self._data.images
        batch = images.examples.__getitems__(indices)
        return self._data.seen({**batch, "values": images.normalization.normalize(batch["values"])})
