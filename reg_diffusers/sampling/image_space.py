"""The space of a pipeline's samples: images, fields, or latents of an autoencoder."""

from __future__ import annotations

import torch
from torch import Tensor

from ..autoencoder import downsampling, encoded
from ..prediction import image_channels
from ..views import Affine, DecodedImage
from .call_inputs import at_least_one

__all__ = ["ImageSpace"]


class ImageSpace:
    """Converts between samples and images; the part of `RegDDPMPipeline` that knows its autoencoder and units."""

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Converts samples (B, c, h, w) to images (B, C, H, W) in about [-1, 1], not clipped.

        A model without an autoencoder returns them unchanged.
        """
        return latents if self.vqvae is None else self._view(latents)

    def encode(self, images: Tensor) -> Tensor:
        """Converts images (B, C, H, W) in [-1, 1] to samples (B, c, h, w); the inverse of `decode`."""
        return images if self.vqvae is None else torch.cat([encoded(self.vqvae, image) for image in images.split(1)])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images it draws."""
        if self.vqvae is None:
            return self._channels, *self._size
        factor = downsampling(self.vqvae)
        return self.vqvae.config.out_channels, *(factor * side for side in self._size)

    def _size_of(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Returns the height and width of the samples for images of this size in pixels; None: that of the network.

        Raises:
            ValueError: the network cannot draw images of this size.
        """
        factor = 1 if self.vqvae is None else downsampling(self.vqvae)
        own, given = self._size, {"height": height, "width": width}
        asked = [
            factor * side if given[name] is None else at_least_one(name, given[name])
            for name, side in zip(given, own, strict=True)
        ]
        if asked == [factor * side for side in own]:
            return own
        named = f"height {asked[0]}, width {asked[1]}"
        if self._multiple is None:
            raise ValueError(f"{named}: this network draws images of {factor * own[0]} x {factor * own[1]} only")
        if any(side % (factor * self._multiple) for side in asked):
            raise ValueError(f"{named}: both must be multiples of {factor * self._multiple} for this network")
        return tuple(side // factor for side in asked)

    @property
    def _multiple(self) -> int | None:
        """What the sides of samples must be multiples of; None for a network of one size."""
        channels = self.unet.config.get("block_out_channels")
        return channels and 2 ** (len(channels) - 1)

    @property
    def _channels(self) -> int:
        """Channels of the network's images, without those of a learned variance."""
        return image_channels(self.unet.config.out_channels, self.scheduler.config)

    @property
    def learns_variance(self) -> bool:
        """Whether the output of the network holds a variance behind the image part."""
        return self._channels != self.unet.config.out_channels

    @property
    def _view(self) -> Affine | DecodedImage | None:
        """What losses see: decoded latents, fields in their own units; None for pictures."""
        if self.vqvae is not None:
            return DecodedImage(self.vqvae)
        normalization = self.config.normalization
        return None if normalization is None else Affine(normalization["scale"], normalization["offset"])

    @property
    def _size(self) -> tuple[int, int]:
        """Height and width of the network's images."""
        size = self.unet.config.sample_size
        return (size, size) if isinstance(size, int) else tuple(size)
