"""Losses on the pixel values of x0_hat: differences of neighbours, range, mirror image, mean.

Inputs in half precision are computed in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import at_least_float32

__all__ = [
    "gradient_energy",
    "high_frequency_energy",
    "isotropic_total_variation",
    "laplacian_energy",
    "mean_intensity",
    "near_background",
    "out_of_range",
    "sparsity",
    "symmetry",
    "total_variation",
]


def total_variation(x0_hat: Tensor, /, *, isotropic: bool = False, smoothing: float = 1e-3) -> Tensor:
    r"""Total variation: measures how much neighbouring pixels differ.

    Anisotropic: mean |d_x u| + mean |d_y u|. Isotropic: mean sqrt(|d_x u|^2 + |d_y u|^2 + s^2) - s, which does not
    prefer edges along the axes. d_x and d_y are differences of adjacent pixels; the smoothing s keeps the gradient
    finite in flat regions. Zero only for constant images. Favours flat regions with sharp edges.

    Source: Rudin, Osher & Fatemi 1992 (isotropic); Esedoglu & Osher 2004 (anisotropic).

    Args:
        x0_hat: (B, C, H, W).
        isotropic: use the rotation-invariant form, on the pixels that have both neighbours.
        smoothing: s, in pixel values; used by the isotropic form only.

    Returns:
        (B,), in pixel values per pixel; at most 4 for images in [-1, 1].

    Raises:
        ValueError: smoothing is negative.
    """
    if not smoothing >= 0:
        raise ValueError(f"smoothing must be at least 0, not {smoothing}")
    x0_hat = at_least_float32(x0_hat)
    if not isotropic:
        return _mean(_difference(x0_hat, -1).abs()) + _mean(_difference(x0_hat, -2).abs())
    d_x = _difference(x0_hat, -1)[..., :-1, :]
    d_y = _difference(x0_hat, -2)[..., :, :-1]
    return _mean((d_x**2 + d_y**2 + smoothing**2).sqrt() - smoothing)


def isotropic_total_variation(x0_hat: Tensor, /) -> Tensor:
    """Isotropic `total_variation` under its own name, for the command line."""
    return total_variation(x0_hat, isotropic=True)


def gradient_energy(x0_hat: Tensor, /) -> Tensor:
    r"""Dirichlet energy: mean |d_x u|^2 + mean |d_y u|^2.

    Zero only for constant images. Favours smooth slopes and blurs edges, because differences are squared.

    Source: Tikhonov regularization of the gradient; Evans, Partial Differential Equations, sec. 2.2.5.

    Args:
        x0_hat: (B, C, H, W).

    Returns:
        (B,), in squared pixel values; at most 8 for images in [-1, 1].
    """
    x0_hat = at_least_float32(x0_hat)
    return _mean(_difference(x0_hat, -1) ** 2) + _mean(_difference(x0_hat, -2) ** 2)


def laplacian_energy(x0_hat: Tensor, /) -> Tensor:
    r"""Bending energy: mean (Delta u)^2 over the inner pixels, with Delta the five-point Laplacian.

    Zero for discrete harmonic images, including every plane a + b x + c y: it penalizes curvature but not slope.

    Source: LeVeque 2007, ch. 3 (five-point Laplacian); Wahba 1990, ch. 2 (the thin-plate penalty).

    Args:
        x0_hat: (B, C, H, W); if H or W is below 3, there are no inner pixels and the value is 0.

    Returns:
        (B,), in squared pixel values; at most 64 for images in [-1, 1].
    """
    x0_hat = at_least_float32(x0_hat)
    curvature_x = _difference(_difference(x0_hat, -1), -1)[..., 1:-1, :]
    curvature_y = _difference(_difference(x0_hat, -2), -2)[..., :, 1:-1]
    return _mean((curvature_x + curvature_y) ** 2)


def out_of_range(x0_hat: Tensor, /, *, low: float = -1.0, high: float = 1.0) -> Tensor:
    r"""Squared distance to an interval: mean max(low - u, 0, u - high)^2.

    Zero for images inside [low, high]: a soft form of the clipping in samplers.

    Source: the quadratic exterior penalty, Nocedal & Wright 2006, ch. 17.

    Args:
        x0_hat: (B, C, H, W).
        low: lower end of the interval.
        high: upper end of the interval.

    Returns:
        (B,), in squared pixel values.

    Raises:
        ValueError: low exceeds high.
    """
    if not low <= high:
        raise ValueError(f"low must be at most high, not {low} with high {high}")
    x0_hat = at_least_float32(x0_hat)
    return _mean((x0_hat - x0_hat.clamp(low, high)) ** 2)


def high_frequency_energy(x0_hat: Tensor, /, *, cutoff: float = 0.5) -> Tensor:
    r"""Energy above a spatial frequency: sum over |f| > cutoff of |U(f)|^2 / (H W), averaged over channels.

    U is the orthonormal discrete Fourier transform, and |f| the radius in units of the Nyquist frequency (1 for the
    finest stripes along an axis, sqrt(2) for a checkerboard). By Parseval's identity, this is the mean square of the
    image after an ideal high-pass filter. Zero for images without frequencies above the cutoff, such as constant
    images. The transform treats the image as periodic, so a difference between opposite borders counts.

    Source: Gonzalez & Woods 2018, ch. 4 (ideal high-pass filter).

    Args:
        x0_hat: (B, C, H, W).
        cutoff: radius in units of the Nyquist frequency, from 0 to below sqrt(2).

    Returns:
        (B,), in squared pixel values; at most the mean square of the image.

    Raises:
        ValueError: the cutoff is not from 0 to below sqrt(2), above which there are no frequencies.
    """
    if not 0 <= cutoff < 2**0.5:
        raise ValueError(f"cutoff must be at least 0 and below sqrt(2), the highest frequency, not {cutoff}")
    x0_hat = at_least_float32(x0_hat)
    height, width = x0_hat.shape[-2:]
    f_y = torch.fft.fftfreq(height, d=0.5, device=x0_hat.device, dtype=x0_hat.dtype)
    f_x = torch.fft.fftfreq(width, d=0.5, device=x0_hat.device, dtype=x0_hat.dtype)
    kept = f_y[:, None] ** 2 + f_x**2 > cutoff**2
    spectrum = torch.fft.fft2(x0_hat, norm="ortho")
    return _mean((spectrum.real**2 + spectrum.imag**2) * kept)


def symmetry(x0_hat: Tensor, /, *, dim: int = -1) -> Tensor:
    r"""Difference from the mirror image: mean (u - flip u)^2.

    Zero for images that equal their mirror image. This is four times the mean squared distance to the nearest
    symmetric image, (u + flip u) / 2.

    Source: the orthogonal projection onto the symmetric images.

    Args:
        x0_hat: (B, C, H, W).
        dim: dimension to flip: -1 mirrors left and right, -2 top and bottom.

    Returns:
        (B,), in squared pixel values; at most 4 for images in [-1, 1].

    Raises:
        ValueError: the images lack the dimension, or it is that of the batch.
    """
    if not (-x0_hat.ndim < dim < x0_hat.ndim and dim != 0):
        raise ValueError(f"dim must be a dimension of each image, such as -1 or -2, not {dim}")
    x0_hat = at_least_float32(x0_hat)
    return _mean((x0_hat - x0_hat.flip(dim)) ** 2)


def mean_intensity(x0_hat: Tensor, /, *, target: float = 0.0) -> Tensor:
    r"""Squared difference between the mean of the image and a target: (mean u - target)^2.

    Zero for images with this mean brightness (0 is mid-grey). Constrains one number per image and nothing else.

    Source: the exposure loss of Guo et al. 2020 (arXiv:2001.06826), over the whole image and squared.

    Args:
        x0_hat: (B, C, H, W).
        target: desired mean, in pixel values.

    Returns:
        (B,), in squared pixel values.
    """
    return (_mean(at_least_float32(x0_hat)) - target) ** 2


def sparsity(x0_hat: Tensor, /, *, background: float = 0.0) -> Tensor:
    r"""Mean absolute difference from a background value: mean |u - background|.

    Zero only for the image that equals the background everywhere. The default suits fields with a natural zero; for
    pictures on black use `partial(sparsity, background=-1.0)`.

    Source: the l1 penalty, Tibshirani 1996; Chen, Donoho & Saunders 1998.

    Args:
        x0_hat: (B, C, H, W).
        background: pixel value without penalty.

    Returns:
        (B,), in pixel values.
    """
    return _mean((at_least_float32(x0_hat) - background).abs())


def near_background(x0_hat: Tensor, /, *, background: float = -1.0, gap: float = 0.4) -> Tensor:
    r"""Share of pixels that are almost background: mean w(d) with d = (u - background) / gap.

    w = 4 d (1 - d) for 0 < d < 1, 4 d^2 for d < 0, and 0 for d >= 1: a pixel halfway into the gap counts 1. Zero for
    images whose every pixel equals the background or differs from it by at least the gap. The gradient takes pixels of
    the first half of the gap to the background, and those of the second half out of the gap. For objects on a plain
    ground that a smooth network leaves hazy; the defaults are for bright objects on black, and background=1.0,
    gap=-0.4 for dark ones on white.

    Source: the double obstacle potential of Blowey & Elliott 1991 between the ends of the gap, with the lower obstacle
    as a quadratic penalty and without the upper one.

    Args:
        x0_hat: (B, C, H, W).
        background: pixel value of the ground.
        gap: smallest difference of an object from the ground, in pixel values; negative for darker objects.

    Returns:
        (B,), without unit; at most 1 for images without pixels beyond the background.

    Raises:
        ValueError: the gap is 0.
    """
    if gap == 0:
        raise ValueError("gap is 0: it must be the smallest difference between an object and the background")
    d = (at_least_float32(x0_hat) - background) / gap
    return 4 * _mean(torch.where((d > 0) & (d < 1), d * (1 - d), d.clamp(max=0) ** 2))


def _difference(image: Tensor, dim: int) -> Tensor:
    """Returns the right (or lower) neighbour of each pixel minus the pixel, one entry fewer than there are pixels."""
    return image.diff(dim=dim) if image.shape[dim] else image


def _mean(image: Tensor) -> Tensor:
    """Returns the mean over all dimensions but the batch, (B,); 0 for an empty image."""
    values = image.flatten(1)
    return values.sum(1) / max(values.shape[1], 1)
