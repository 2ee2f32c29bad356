"""The space of a pipeline's samples: images, fields, or latents of an autoencoder."""

from __future__ import annotations

import torch
from torch import Tensor

from ..autoencoder import downsampling, encoded
from ..prediction import image_channels
from ..views import Affine, DecodedImage

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
