r"""Optimal denoisers computed from the data, without training: the best that any network can achieve.

For a finite data set with equally likely images, the optimal denoiser is known exactly:

    D(x_t) = E[x_0 | x_t] = sum_i softmax_i( -|x_t - alpha x_i|^2 / (2 sigma^2) ) x_i.

It memorizes the images of the set. At low noise, it replaces an image outside the set by the most similar image
inside. There the linear denoiser is better,

    D(x_t) = m + alpha C (alpha^2 C + sigma^2 I)^-1 (x_t - alpha m),

which is optimal for Gaussian data with mean m and covariance C, and the best affine denoiser for any data. Images
outside the set show which of the two is closer to the truth.

Sources: the posterior mean of a finite set, Karras et al. 2022 (arXiv:2206.00364) app. B.3; the linear denoiser is the
Wiener filter, for diffusion Wang & Vastola 2023 (arXiv:2311.10892); directions outside the span of a small set share
one variance, as in probabilistic principal components (Tipping & Bishop 1999).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["IdealDenoiser", "LinearDenoiser"]

_VALUES_AT_A_TIME = 2**24  # of the distance matrix: 128 MB


class IdealDenoiser:
    """Computes E[x_0 | x_t] for a finite set of images, in double precision.

    Args:
        images: (M, C, H, W), the set.
    """

    def __init__(self, images: Tensor):
        self._images = images.flatten(1).double()
        self._half_norms = (self._images**2).sum(1) / 2

    def __call__(self, noisy_samples: Tensor, alpha: float, sigma: float) -> Tensor:
        """Denoises images.

        Args:
            noisy_samples: (B, C, H, W) = alpha x_0 + sigma eps.
            alpha: factor of the image, at least 0.
            sigma: factor of the noise, above 0.

        Returns:
            (B, C, H, W), in the dtype of `noisy_samples`.
        """
        rows = max(_VALUES_AT_A_TIME // len(self._images), 1)
        guesses = []
        for samples in noisy_samples.flatten(1).double().split(rows):
            # |x_t|^2 is the same for all images of the set and drops out of the softmax.
            closeness = samples @ self._images.T * (alpha / sigma**2) - (alpha / sigma) ** 2 * self._half_norms
            guesses.append(closeness.softmax(1) @ self._images)
        return torch.cat(guesses).to(noisy_samples.dtype).reshape(noisy_samples.shape)


class LinearDenoiser:
    """Computes the best affine estimate of the clean image, from the mean and covariance of a set of images.

    Args:
        images: (M, C, H, W), the set.
        held_out: (N, C, H, W), other images, for the variance in directions that the set does not span.
    """

    def __init__(self, images: Tensor, held_out: Tensor):
        samples = images.flatten(1).double()
        self._mean = samples.mean(0)
        samples = samples - self._mean
        number, size = samples.shape
        if number > size:
            variances, directions = torch.linalg.eigh(samples.T @ samples / (number - 1))
        else:  # the same directions from the smaller matrix of inner products between images
            variances, weights = torch.linalg.eigh(samples @ samples.T / (number - 1))
            variances, weights = variances[1:], weights[:, 1:]  # subtracting the mean removes one direction
            directions = samples.T @ weights
            directions = directions / directions.norm(dim=0).clamp(min=1e-12)
        self._variances, self._directions = variances.clamp(min=0), directions
        others = held_out.flatten(1).double() - self._mean
        outside = others - others @ directions @ directions.T
        unspanned = size - directions.shape[1]
        self._outside_variance = outside.square().sum(1).mean().item() / unspanned if unspanned else 0.0

    def __call__(self, noisy_samples: Tensor, alpha: float, sigma: float) -> Tensor:
        """Denoises images; arguments and result as for `IdealDenoiser`."""
        centred = noisy_samples.flatten(1).double() - alpha * self._mean
        coordinates = centred @ self._directions
        gain = alpha * self._variances / (alpha**2 * self._variances + sigma**2)
        outside_gain = alpha * self._outside_variance / (alpha**2 * self._outside_variance + sigma**2)
        guess = self._mean + outside_gain * centred + (coordinates * (gain - outside_gain)) @ self._directions.T
        return guess.to(noisy_samples.dtype).reshape(noisy_samples.shape)


def spread(images: Tensor) -> float:
    """Returns the root mean square difference of images (M, C, H, W) from their mean image, over pixels and images."""
    return math.sqrt((images.double() - images.double().mean(0)).square().mean().item())
