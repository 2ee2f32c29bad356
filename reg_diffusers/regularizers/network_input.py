"""The pictures that a pretrained vision network sees: the preprocessing of its image processor, differentiable."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["NetworkInput", "RangeCheck", "checked_range", "in_colour", "read_processor"]

_RANGES = {"[-1, 1]": (-1.0, 1.0), "[0, 1]": (0.0, 1.0)}
_BILINEAR = 2  # PIL.Image.Resampling.BILINEAR; all others are resized bicubically
_CONVNEXT_CROPS_BELOW = 384  # its processors resize larger pictures without cropping
_CALLS_CHECKED = 3
_OVERSHOOT = 0.5  # of the range's width: decoders exceed it slightly, latents and wrong units by far
_RESOLUTION = 1e-3


@dataclass(frozen=True)
class NetworkInput:
    """Resizes, crops and normalizes images as an image processor of transformers does, differentiably.

    Images in [0, 1] are resized with antialiasing, cropped around their centre, and normalized, (x - mean) / std.
    Values are neither rounded nor clipped, so the gradient is kept. The result differs from that of the processor by
    the rounding to 8 bits.

    Attributes:
        mean: mean by channel, in units of [0, 1].
        std: standard deviation by channel.
        shortest_side: length of the shorter side after resizing; the aspect ratio is kept.
        size: (H', W') after resizing, in place of `shortest_side`; may change the aspect ratio.
        crop: (H', W') of the crop.
        mode: "bicubic" or "bilinear".
    """

    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    shortest_side: int | None = None
    size: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    mode: str = "bicubic"

    @classmethod
    def of(cls, processor, size: int | None = None) -> NetworkInput:
        """Reads the numbers of an image processor.

        Args:
            processor: an image processor of transformers, or a dictionary with its image_mean, image_std, size,
                crop_size, resample and the like. None: the network's input is in [-1, 1], in the size of the images.
            size: the shorter side of the network's input, in place of the processor's size; the longer side is cropped
                to it around the centre.

        Raises:
            ValueError: the size of the processor has another form.
        """
        numbers = processor if isinstance(processor, Mapping) else processor.to_dict() if processor else {}
        normalization = {}
        if processor and numbers.get("do_normalize", True):
            normalization = {name: tuple(map(float, numbers[f"image_{name}"])) for name in ("mean", "std")}
        elif processor:
            normalization = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
        mode = "bilinear" if numbers.get("resample") == _BILINEAR else "bicubic"
        if size is not None:
            return cls(**normalization, shortest_side=size, crop=(size, size), mode=mode)
        return cls(**normalization, **_resizing(numbers), mode=mode)

    def __call__(self, images: Tensor) -> Tensor:
        """Maps images (n, 3, H, W) in [0, 1] to the network's input, (n, 3, H', W').

        Raises:
            ValueError: the crop exceeds the resized images.
        """
        return self.normalized(self.shown(images))

    def shown(self, images: Tensor) -> Tensor:
        """Resizes and crops images (n, 3, H, W)."""
        if (size := self._resized(*images.shape[-2:])) != images.shape[-2:]:
            images = F.interpolate(images, size, mode=self.mode, antialias=True)
        if self.crop is not None:
            top, left = ((side - cropped) // 2 for side, cropped in zip(size, self.crop, strict=True))
            if min(top, left) < 0:
                raise ValueError(f"the network's crop of {self.crop} exceeds images of {size}: pass size=")
            images = images[..., top : top + self.crop[0], left : left + self.crop[1]]
        return images

    def normalized(self, images: Tensor) -> Tensor:
        """Normalizes images (n, 3, H', W') in [0, 1]."""
        mean, std = (images.new_tensor(numbers).reshape(-1, 1, 1) for numbers in (self.mean, self.std))
        return (images - mean) / std

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.size is not None:
            return self.size
        if self.shortest_side is None:
            return height, width
        short, long = min(height, width), max(height, width)
        longer = int(self.shortest_side * long / short)
        return (self.shortest_side, longer) if height <= width else (longer, self.shortest_side)


def read_processor(name_or_folder: str):
    """Loads an image processor, or its numbers where transformers cannot use it without torchvision."""
    from transformers import AutoImageProcessor
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        return AutoImageProcessor.from_pretrained(name_or_folder, trust_remote_code=False)
    except ImportError:
        return ImageProcessingMixin.get_image_processor_dict(name_or_folder)[0]


def _resizing(numbers: Mapping) -> dict:
    """Returns the resizing and the crop of a processor's numbers."""
    size, resized = numbers.get("size"), {}
    if size and numbers.get("do_resize", True):
        if isinstance(size, int):
            size = {"height": size, "width": size}
        if short := size.get("shortest_edge"):
            percentage = numbers.get("crop_pct")
            if percentage and short < _CONVNEXT_CROPS_BELOW:
                return {"shortest_side": int(short / percentage), "crop": (short, short)}
            resized = {"size": (short, short)} if percentage else {"shortest_side": short}
        elif size.get("height") and size.get("width"):
            resized = {"size": (size["height"], size["width"])}
        else:
            raise ValueError(
                f"the image processor's size {dict(size)} is neither a side nor a height and width: pass size="
            )
    crop = numbers.get("crop_size")
    if crop and numbers.get("do_center_crop"):
        crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
        resized["crop"] = (crop["height"], crop["width"])
    return resized


def checked_range(input_range: str) -> str:
    """Returns the name of a range of pixel values.

    Raises:
        ValueError: it is neither "[-1, 1]" nor "[0, 1]".
    """
    if input_range not in _RANGES:
        raise ValueError(f'input_range must be "[-1, 1]" or "[0, 1]", not {input_range!r}')
    return input_range


def in_colour(images: Tensor, input_range: str, loss: str) -> Tensor:
    """Maps images in `input_range` to [0, 1], and repeats a grey channel three times.

    Args:
        images: (n, 1, H, W) or (n, 3, H, W).
        input_range: "[-1, 1]" or "[0, 1]".
        loss: name of the loss in the error message.

    Returns:
        (n, 3, H, W).

    Raises:
        ValueError: the images have another shape.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"{loss} needs pictures of 1 or 3 channels, (n, C, H, W), not {tuple(images.shape)}: use a view, such as"
            " Term(..., view=DecodedImage(vae)) for latents, or view=lambda x: x[:, :3]"
        )
    low, high = _RANGES[input_range]
    return ((images - low) / (high - low)).expand(-1, 3, -1, -1)


class RangeCheck:
    """Compares the pixel values of the first calls with the range that a loss assumes.

    Each of the first three calls waits for an accelerator.

    Args:
        input_range: "[-1, 1]" or "[0, 1]".
        loss: name of the loss in messages.
    """

    def __init__(self, input_range: str, loss: str):
        self._name, self._loss = checked_range(input_range), loss
        self._calls, self._low, self._high = 0, math.inf, -math.inf

    @torch.no_grad()
    def __call__(self, images: Tensor) -> None:
        """Checks images of the data, (n, C, H, W).

        Raises:
            ValueError: a value is outside the range by more than half of its width.
        """
        if self._calls >= _CALLS_CHECKED or images.is_meta or not images.numel():
            return
        self._calls += 1
        low, high = (value.item() for value in images.aminmax())
        self._low, self._high = min(self._low, low), max(self._high, high)
        start, end = _RANGES[self._name]
        tolerance = _OVERSHOOT * (end - start)
        if low < start - tolerance or high > end + tolerance:
            raise ValueError(
                f'{self._loss} assumes input_range="{self._name}", but the images have values from {low:.3g} to'
                f" {high:.3g}: set input_range, or use a view, DecodedImage for latents or Affine for other units"
            )
        is_half = self._name == "[-1, 1]" and self._low >= -_RESOLUTION and 0.5 < self._high <= 1 + _RESOLUTION
        if self._calls == _CALLS_CHECKED and is_half:
            warnings.warn(
                f'{self._loss} assumes input_range="{self._name}", but no image so far has a value below 0: if they'
                ' are in [0, 1], set input_range="[0, 1]", or use a view, Affine(2.0, -1.0)',
                stacklevel=4,
            )
