r"""What any network can at best know of the image: denoisers that are computed from the data, without training.

For a finite data set with all images equally likely, the best guess of the clean image is exact:

    D(x_t) = E[x_0 | x_t] = sum_i softmax_i( -|x_t - alpha x_i|^2 / (2 sigma^2) ) x_i.

It knows the images of its set by heart, and has nothing else to offer where the noise is low: of an image that is not
in the set it makes the most similar one that is. There the linear denoiser is better,

    D(x_t) = m + alpha C (alpha^2 C + sigma^2 I)^-1 (x_t - alpha m),

the best guess for Gaussian data of mean m and covariance C, and the best among affine maps for any data. Which of the
two is nearer to the truth is seen on images that both have never met.

Sources: the posterior mean of a finite set, Karras et al. 2022 (arXiv:2206.00364) app. B.3; the linear one is the
Wiener filter, for diffusion Wang & Vastola 2023 (arXiv:2311.10892); directions that a small set does not span get one
variance, as in probabilistic principal components (Tipping & Bishop 1999).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["IdealDenoiser", "LinearDenoiser"]

_VALUES_AT_A_TIME = 2**24  # of the matrix of distances: 128 MB


class IdealDenoiser:
    """E[x_0 | x_t] of a finite set of images, in double precision.

    Args:
        images: (M, C, H, W), the set.
    """

    def __init__(self, images: Tensor):
        self._images = images.flatten(1).double()
        self._half_norms = (self._images**2).sum(1) / 2

    def __call__(self, noisy_samples: Tensor, alpha: float, sigma: float) -> Tensor:
        """The best guess of the clean image.

        Args:
            noisy_samples: (B, C, H, W) = alpha x_0 + sigma eps.
            alpha: factor of the image, at least 0.
            sigma: factor of the noise, above 0.

        Returns:
            (B, C, H, W), as `noisy_samples`.
        """
        rows = max(_VALUES_AT_A_TIME // len(self._images), 1)
        guesses = []
        for samples in noisy_samples.flatten(1).double().split(rows):
            # |x_t|^2 is the same for all images of the set and drops out of the softmax.
            closeness = samples @ self._images.T * (alpha / sigma**2) - (alpha / sigma) ** 2 * self._half_norms
            guesses.append(closeness.softmax(1) @ self._images)
        return torch.cat(guesses).to(noisy_samples.dtype).reshape(noisy_samples.shape)


class LinearDenoiser:
    """The best affine guess of the clean image, from the mean and covariance of a set of images.

    Args:
        images: (M, C, H, W), the set.
        held_out: (N, C, H, W), others, that tell how much images vary in directions that the set does not span.
    """

    def __init__(self, images: Tensor, held_out: Tensor):
        samples = images.flatten(1).double()
        self._mean = samples.mean(0)
        samples = samples - self._mean
        number, size = samples.shape
        if number > size:
            variances, directions = torch.linalg.eigh(samples.T @ samples / (number - 1))
        else:  # the same directions from the smaller matrix of all products between images
            variances, weights = torch.linalg.eigh(samples @ samples.T / (number - 1))
            variances, weights = variances[1:], weights[:, 1:]  # one direction is lost with the mean
            directions = samples.T @ weights
            directions = directions / directions.norm(dim=0).clamp(min=1e-12)
        self._variances, self._directions = variances.clamp(min=0), directions
        others = held_out.flatten(1).double() - self._mean
        outside = others - others @ directions @ directions.T
        unspanned = size - directions.shape[1]
        self._outside_variance = outside.square().sum(1).mean().item() / unspanned if unspanned else 0.0

    def __call__(self, noisy_samples: Tensor, alpha: float, sigma: float) -> Tensor:
        """The best affine guess of the clean image; arguments and result as for `IdealDenoiser`."""
        centred = noisy_samples.flatten(1).double() - alpha * self._mean
        coordinates = centred @ self._directions
        gain = alpha * self._variances / (alpha**2 * self._variances + sigma**2)
        outside_gain = alpha * self._outside_variance / (alpha**2 * self._outside_variance + sigma**2)
        guess = self._mean + outside_gain * centred + (coordinates * (gain - outside_gain)) @ self._directions.T
        return guess.to(noisy_samples.dtype).reshape(noisy_samples.shape)


def spread(images: Tensor) -> float:
    """How much images (M, C, H, W) differ: the root mean square, over pixels and images, of image minus mean image."""
    return math.sqrt((images.double() - images.double().mean(0)).square().mean().item())
