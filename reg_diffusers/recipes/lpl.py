r"""Latent perceptual loss: x0_hat and x_0 compared by the features of the autoencoder's decoder, block by block.

    L = |o - target|^2 + weight mean_{t < 200} L',
    L' = mean_l w_l mean_c sum_p m (u - u')^2 / sum_p m,        u = f(x0_hat) / |f(x_0)|,  u' = f(x_0) / |f(x_0)|

f are the features after the middle block and after each upsampling block, with length |.| over the channels of a
position. m masks outliers of f(x_0), channel by channel: values beyond the 2 % and 98 % quantiles by two standard
deviations. w_l = 2^-l, at least 1/8.

Source: Berrada et al. 2025 (arXiv:2411.04873), sec. 3; the mask follows the authors' implementation in
diffusers/examples/research_projects/lpl.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..frozen import FrozenNetworks
from ..objective import RegularizedLoss
from ..term import Term
from ..views import Affine
from ..weighting import low_noise

__all__ = ["DecoderFeatures", "latent_perceptual", "outlier_mask"]

_QUANTILE = 0.02
_DEVIATIONS = 2
_WINDOWS = {1: (3, 5), 2: (1, 3)}  # sides that close and open the mask, by the size of a pixel of the features
_SMALLEST_LENGTH = 1e-6
_MASKED_FROM = 2  # the middle block and the first upsampling block have no mask
_LAST_HALVED = 3  # w_l is constant from this layer on


def latent_perceptual(scheduler, vae: nn.Module, weight: float = 1.0) -> RegularizedLoss:
    """Returns the objective of LPL.

        loss_fn = latent_perceptual(noise_scheduler, vae)
        loss_fn(unet, latents).loss.backward()

    Args:
        scheduler: noise scheduler of 1000 timesteps.
        vae: an AutoencoderKL; latents are in the coordinates of the diffusion model.
        weight: factor of L'.
    """
    return RegularizedLoss(scheduler, [Term(DecoderFeatures(vae), weight, low_noise, "lpl", normalize="active")])


class DecoderFeatures(nn.Module):
    """L' of LPL. Activations of each block are computed again in the backward pass.

    Args:
        vae: an AutoencoderKL. The module itself is used, not a copy; it is frozen.

    Raises:
        ValueError: the decoder has no upsampling blocks.
    """

    needs = ("original_samples",)

    def __init__(self, vae: nn.Module):
        super().__init__()
        if not hasattr(getattr(vae, "decoder", None), "up_blocks"):
            raise ValueError(f"{type(vae).__name__} has no decoder.up_blocks: LPL needs an AutoencoderKL")
        self.networks = FrozenNetworks([vae])
        self._to_decoder = Affine(1 / (vae.config.scaling_factor or 1.0), vae.config.get("shift_factor") or 0.0)

    def forward(self, x0_hat: Tensor, /, *, original_samples: Tensor) -> Tensor:
        """Computes L' of each latent, (n,).

        Args:
            x0_hat: (n, C, h, w).
            original_samples: (n, C, h, w).
        """
        with torch.no_grad():
            expected = list(self._features(original_samples))
        losses = [
            _distance(found, wanted, layer)
            for layer, (found, wanted) in enumerate(zip(self._features(x0_hat), expected, strict=True))
        ]
        return sum(losses) / len(losses)

    def _features(self, latents: Tensor) -> Iterator[Tensor]:
        """Yields the features of each layer, (n, C_l, h_l, w_l), in at least float32."""
        (vae,) = self.networks
        sample = self._to_decoder(latents).to(vae.dtype)
        if getattr(vae, "post_quant_conv", None) is not None:
            sample = vae.post_quant_conv(sample)
        sample = vae.decoder.conv_in(sample)
        for block in (vae.decoder.mid_block, *vae.decoder.up_blocks):
            is_repeated = torch.is_grad_enabled() and sample.requires_grad
            sample = checkpoint(block, sample, None, use_reentrant=False) if is_repeated else block(sample, None)
            yield sample.to(torch.promote_types(sample.dtype, torch.float32))


def _distance(found: Tensor, wanted: Tensor, layer: int) -> Tensor:
    """Computes the distance of features with the length of the wanted ones, (n,)."""
    mask = torch.ones_like(wanted, dtype=torch.bool)
    if layer >= _MASKED_FROM:
        mask = outlier_mask(wanted, 2 if layer == _MASKED_FROM else 1)
    wanted = wanted * mask
    length = wanted.square().sum(1, keepdim=True).sqrt() + _SMALLEST_LENGTH
    squares = ((found - wanted) / length).square() * mask
    by_channel = squares.sum((2, 3)) / mask.sum((2, 3)).clamp(min=1)
    return 2.0 ** -min(layer, _LAST_HALVED) * by_channel.mean(1)


def outlier_mask(features: Tensor, scale: int = 1) -> Tensor:
    """Finds values that are no outliers in their channel, (n, C, h, w) bool.

    Small holes of the mask are closed, then those that remain grow.

    Args:
        features: (n, C, h, w).
        scale: 1 or 2, size of a pixel of the features in pixels of the image.
    """
    flat = features.flatten(2)
    count = flat.shape[-1]
    low, high = (
        flat.kthvalue(max(int(count * share), 1), dim=-1).values[..., None, None]
        for share in (_QUANTILE, 1 - _QUANTILE)
    )
    margin = _DEVIATIONS * flat.std(-1)[..., None, None]
    mask = ((low - margin < features) & (features < high + margin)).float()
    grown, shrunk = _WINDOWS[scale]
    mask = F.max_pool2d(mask, grown, stride=1, padding=grown // 2)
    return -F.max_pool2d(-mask, shrunk, stride=1, padding=shrunk // 2) > 0
