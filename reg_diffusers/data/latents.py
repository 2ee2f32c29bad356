"""Images as latents of an autoencoder, computed once and mapped into memory.

The file is named after a hash of the images, their size and the autoencoder, so another data set, file, resolution or
weight never finds it. It is written under another name and renamed when it is complete.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .. import __version__
from ..runtime.errors import UsageError, warn
from ..runtime.messages import bars_are_hidden
from .columns import Column
from .normalization import Normalization
from .pictures_data import PictureData
from .prompts import Prompts
from .stored_rows import stored_rows

__all__ = ["AT_A_TIME", "LatentData", "check_deviation", "check_finite", "latents_of"]

AT_A_TIME = 8  # images that are encoded together
_LOOKED_AT = 1000  # latents, for their standard deviation
_USUAL = (1 / 3, 3)  # standard deviation of latents, which the noise schedules expect to be about 1


class LatentData(torch.utils.data.Dataset):
    """The latents of a data set of images, with the class labels of the images.

    Attributes:
        shape: (c, h, w).
        normalization: the identity, because latents are stored in the coordinates of the diffusion model.
        classes: names of the classes, or None.
        condition_channels: 0.
        columns: columns that regularizers need, in the size of the images.
        white: that of the images.
        downsampling: pixels of an image per pixel of its latents, along each axis.
        note: a line to print at the start, next to the number and shape of the data.
        number: number of images.
        examples: all latents.
        prompts: the texts of the images, or None.
    """

    normalization = Normalization((0.0,), (1.0,))
    is_picture = True
    condition_channels = 0

    def __init__(
        self,
        images: PictureData,
        latents: np.ndarray,
        path: Path,
        prompts: Prompts | None = None,
        *,
        with_images: bool = False,
    ):
        self._images, self._with_images = images, with_images
        self._latents = latents  # (N, 1 or 2, c, h, w): of the image, of its mirror image
        self.prompts = prompts
        self.shape = tuple(self._latents.shape[2:])
        self.classes, self.white = images.classes, images.white
        self.downsampling = images.shape[1] // self.shape[1]
        some = self._latents[np.linspace(0, len(self) - 1, min(len(self), _LOOKED_AT)).astype(int), 0]
        self.deviation = float(some.std())
        self.note = f"standard deviation {self.deviation:.3g}, in {path}"

    def __len__(self) -> int:
        return len(self._latents)

    @property
    def number(self) -> int:
        return len(self)

    @property
    def examples(self) -> LatentData:
        return self

    @property
    def content(self) -> str:
        """Identifies the images and what belongs to them."""
        return self._images.content

    @property
    def columns(self) -> tuple[Column, ...]:
        return self._images.columns

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Reads the batch of these indices: {"values": (B, c, h, w), "ids": (B,), "class_labels": (B,)}.

        With mirror images, also their latents: {"mirrored": (B, c, h, w)}. With texts, their embeddings by name;
        with columns that regularizers need, {"columns": {...}}, see `column_values`; they include the images
        themselves, as "original_images" in [-1, 1], if losses compare with them.
        """
        found = torch.from_numpy(np.array(self._latents[indices]))
        latents = dict(zip(("values", "mirrored"), found.unbind(1), strict=False))
        texts = {} if self.prompts is None else self.prompts.__getitems__(indices)
        belonging = self._images.__getitems__(indices) if self._with_images else self._images.labels(indices)
        if self._with_images:
            pixels = self._images.normalization.normalize(belonging.pop("values"))
            belonging["columns"] = {**belonging.get("columns", {}), "original_images": pixels}
        return {**belonging, **latents, **texts}


def latents_of(
    images: PictureData,
    encode: Callable[[Tensor], Tensor],
    key: str,
    cache_dir: Path,
    device: torch.device,
    *,
    mirrored: bool,
    prompts: Prompts | None = None,
    with_images: bool = False,
) -> LatentData:
    """Encodes all images, or finds their latents in the cache.

    Args:
        images: the images.
        encode: (B, C, H, W) in [-1, 1] on the device -> (B, c, h, w).
        key: a hash of everything that affects `encode`.
        cache_dir: the folder that keeps the latents for the next run.
        device: the device that encodes.
        mirrored: whether to also encode each image flipped left to right, for --random_flip: the latents of the mirror
            image are not the mirrored latents.
        prompts: the texts of the images, for a text-to-image model.
        with_images: whether batches also have the images themselves, for losses that compare with them.

    Raises:
        UsageError: a latent is non-finite, or the cache cannot be written.
    """
    settings = (images.fingerprint, images.shape, key, mirrored, __version__)
    path = cache_dir / f"latents-{hashlib.sha256(repr(settings).encode()).hexdigest()}.npy"
    rows = stored_rows(path, len(images), partial(_pieces, images, encode, device, mirrored))
    return LatentData(images, rows, path, prompts, with_images=with_images)


def check_finite(latents: Tensor, rows: Sequence[int]) -> None:
    """Raises `UsageError` if one of the latents, which are those of the images in these rows, is non-finite."""
    finite = latents.isfinite().flatten(1).all(1)
    if not finite.all():
        bad = rows[int((~finite).nonzero()[0])]
        raise UsageError(f"the latents of image {bad} are not finite: check the image and the autoencoder")


def check_deviation(deviation: float) -> None:
    """Warns if the standard deviation of latents is not about 1."""
    if not _USUAL[0] <= deviation <= _USUAL[1]:
        warn(
            f"the latents have a standard deviation of {deviation:.3g}, but noise schedules expect about 1:"
            " multiply scaling_factor in the config of the autoencoder by"
            f" {1 / deviation if deviation else float('inf'):.3g}"
        )


def _pieces(images: PictureData, encode, device: torch.device, mirrored: bool, first: int) -> Iterator[Tensor]:
    """Yields the latents of a few images at a time, from the first on, (n, 1 or 2, c, h, w)."""
    for start in tqdm(
        range(first, len(images), AT_A_TIME), desc="encoding images, once", unit="batch", disable=bars_are_hidden()
    ):
        indices = list(range(start, min(start + AT_A_TIME, len(images))))
        pixels = images.normalization.normalize(images.__getitems__(indices)["values"].to(device))
        views = [pixels, pixels.flip(-1)] if mirrored else [pixels]
        latents = torch.stack([encode(view) for view in views], dim=1)
        check_finite(latents, indices)
        yield latents
