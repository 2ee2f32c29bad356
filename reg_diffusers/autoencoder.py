"""Encodes images to the latents of a diffusion model; `views.DecodedImage` is the inverse."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .views import latent_coordinates

__all__ = ["AUTOENCODERS", "downsampling", "encoded", "latent_channels"]

AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny", "VQModel")


@torch.no_grad()
def encoded(vae: nn.Module, images: Tensor) -> Tensor:
    """Encodes images to latents in the coordinates of the diffusion model, without gradient.

    An encoder with a distribution (AutoencoderKL) gives its mean: no random number is drawn.

    Args:
        vae: an autoencoder of a class in `AUTOENCODERS`.
        images: (B, C, H, W) in [-1, 1].

    Returns:
        (B, c, h, w) float32.

    Raises:
        ValueError: the autoencoder packs its latents in patches.
    """
    coordinates, patch = latent_coordinates(vae)
    if patch is not None:
        raise ValueError(f"{type(vae).__name__} packs its latents in patches, which is not supported")
    output = vae.encode(images.to(vae.dtype))
    latents = output.latent_dist.mode() if hasattr(output, "latent_dist") else output.latents
    return coordinates.inverse(latents.float())


def downsampling(vae: nn.Module) -> int:
    """Returns the number of pixels per latent pixel, along each axis."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def latent_channels(vae: nn.Module) -> int:
    """Returns the number of channels of the latents, c."""
    return vae.config.get("vq_embed_dim") or vae.config.latent_channels
