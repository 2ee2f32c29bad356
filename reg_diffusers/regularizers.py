"""Losses L' on the denoised image.

A regularizer is any callable `(B, C, H, W) in [-1, 1] -> (B,)`: one number per image, so that each image can be
weighted by its noise level. The ones below are means over channels and pixels, treat every image of the batch alone,
accept any number of channels and are differentiable wherever their formula is. Differences are taken per pixel: the
same smooth picture at twice the resolution has half the total variation, a quarter of the gradient energy.

A loss that needs more than x0_hat lists it in `needs`, and receives it as keyword arguments:

    def masked_error(x0_hat, /, *, original_samples, mask):
        return (mask * (x0_hat - original_samples) ** 2).flatten(1).mean(1)

    masked_error.needs = ("original_samples", "mask")

Fixed parameters are bound with `functools.partial(mean_intensity, target=0.2)`.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
from torch import Tensor

__all__ = [
    "gradient_energy",
    "high_frequency_energy",
    "isotropic_total_variation",
    "laplacian_energy",
    "mean_intensity",
    "out_of_range",
    "sparsity",
    "symmetry",
    "total_variation",
]


class Regularizer(Protocol):
    """A differentiable wish about an image: small where the image fulfils it.

    `needs`, an optional attribute, names the keyword arguments wanted beside the image; tensors among them have the
    batch as first dimension.
    """

    def __call__(self, x0_hat: Tensor, /, **context) -> Tensor:
        """Maps images (B, C, H, W), float32 in about [-1, 1], to one value each, (B,)."""
        ...


def regularizer_name(regularizer: Regularizer) -> str:
    """The name under which a regularizer is logged: its function's or its class's."""
    if isinstance(regularizer, partial):
        return regularizer_name(regularizer.func)
    return getattr(regularizer, "__name__", type(regularizer).__name__)


def score(regularizer: Regularizer, samples: Tensor, /, **context) -> Tensor:
    """L' of each finished sample (B, C, H, W), (B,) float32 without a graph; `context` is what it lists in `needs`.

    Gradients are enabled inside, because a regularizer may take them with respect to its argument.
    """
    with torch.enable_grad():
        return regularizer(samples.detach().float().requires_grad_(), **context).detach()


def total_variation(x0_hat: Tensor, /, *, isotropic: bool = False, smoothing: float = 1e-3) -> Tensor:
    r"""Total variation: how much neighbouring pixels differ.

    Anisotropic: mean |d_x u| + mean |d_y u|. Isotropic: mean sqrt(|d_x u|^2 + |d_y u|^2 + s^2) - s, which does not
    prefer edges along the axes; the smoothing s keeps its gradient finite in flat regions. d_x, d_y are differences of
    adjacent pixels. Zero for constant images only. Favours flat regions with sharp edges.

    Source: Rudin, Osher & Fatemi 1992 (isotropic); Esedoglu & Osher 2004 (anisotropic).

    Args:
        x0_hat: (B, C, H, W).
        isotropic: the rotation-invariant form, on the pixels that have both neighbours.
        smoothing: s, in units of the pixel values; used by the isotropic form only.

    Returns:
        (B,), in units of the pixel values per pixel; at most 4 for images in [-1, 1].
    """
    if not isotropic:
        return _mean(_difference(x0_hat, -1).abs()) + _mean(_difference(x0_hat, -2).abs())
    d_x = _difference(x0_hat, -1)[..., :-1, :]
    d_y = _difference(x0_hat, -2)[..., :, :-1]
    return _mean((d_x**2 + d_y**2 + smoothing**2).sqrt() - smoothing)


def isotropic_total_variation(x0_hat: Tensor, /) -> Tensor:
    """Isotropic `total_variation`, with a name of its own for the command line."""
    return total_variation(x0_hat, isotropic=True)


def gradient_energy(x0_hat: Tensor, /) -> Tensor:
    r"""Dirichlet energy: mean |d_x u|^2 + mean |d_y u|^2.

    Zero for constant images only. Favours smooth slopes; blurs edges, which it punishes by their square.

    Source: Tikhonov regularization of the gradient; Evans, Partial Differential Equations, sec. 2.2.5.

    Args:
        x0_hat: (B, C, H, W).

    Returns:
        (B,), in squared units of the pixel values; at most 8 for images in [-1, 1].
    """
    return _mean(_difference(x0_hat, -1) ** 2) + _mean(_difference(x0_hat, -2) ** 2)


def laplacian_energy(x0_hat: Tensor, /) -> Tensor:
    r"""Bending energy: mean (Delta u)^2 over the inner pixels, Delta by the five-point stencil.

    Zero for discrete harmonic images, among them every plane a + b x + c y: slopes are free, curvature is not.

    Source: LeVeque 2007, ch. 3 (five-point Laplacian); Wahba 1990, ch. 2 (the thin-plate penalty).

    Args:
        x0_hat: (B, C, H, W); with H or W below 3 there are no inner pixels and the value is 0.

    Returns:
        (B,), in squared units of the pixel values; at most 64 for images in [-1, 1].
    """
    curvature_x = _difference(_difference(x0_hat, -1), -1)[..., 1:-1, :]
    curvature_y = _difference(_difference(x0_hat, -2), -2)[..., :, 1:-1]
    return _mean((curvature_x + curvature_y) ** 2)


def out_of_range(x0_hat: Tensor, /, *, low: float = -1.0, high: float = 1.0) -> Tensor:
    r"""Squared distance to the interval: mean max(low - u, 0, u - high)^2.

    Zero for images inside [low, high]: a soft form of the clipping that samplers do.

    Source: the quadratic exterior penalty, Nocedal & Wright 2006, ch. 17.

    Args:
        x0_hat: (B, C, H, W).
        low: lower end of the interval.
        high: upper end of the interval.

    Returns:
        (B,), in squared units of the pixel values.
    """
    return _mean((x0_hat - x0_hat.clamp(low, high)) ** 2)


def high_frequency_energy(x0_hat: Tensor, /, *, cutoff: float = 0.5) -> Tensor:
    r"""Energy above a spatial frequency: sum over |f| > cutoff of |U(f)|^2 / (H W), per channel and pixel.

    U is the orthonormal discrete Fourier transform and |f| the radius in units of the Nyquist frequency (1 is the
    finest stripe along an axis, sqrt(2) the chequerboard). By Parseval's identity this is the mean square of the image
    after an ideal high-pass filter. Zero for images without frequencies above the cutoff, such as constant ones. The
    transform sees the image as periodic, so a difference between opposite borders counts.

    Source: Gonzalez & Woods 2018, ch. 4 (ideal high-pass filter).

    Args:
        x0_hat: (B, C, H, W).
        cutoff: radius in units of the Nyquist frequency, 0 to sqrt(2).

    Returns:
        (B,), in squared units of the pixel values; at most the image's mean square.
    """
    height, width = x0_hat.shape[-2:]
    f_y = torch.fft.fftfreq(height, d=0.5, device=x0_hat.device, dtype=x0_hat.dtype)
    f_x = torch.fft.fftfreq(width, d=0.5, device=x0_hat.device, dtype=x0_hat.dtype)
    kept = f_y[:, None] ** 2 + f_x**2 > cutoff**2
    spectrum = torch.fft.fft2(x0_hat, norm="ortho")
    return _mean((spectrum.real**2 + spectrum.imag**2) * kept)


def symmetry(x0_hat: Tensor, /, *, dim: int = -1) -> Tensor:
    r"""Difference to the mirror image: mean (u - flip u)^2.

    Zero for images that equal their mirror image. dim = -1 mirrors left and right, -2 top and bottom.

    Source: four times the squared distance to the nearest symmetric image, which is (u + flip u) / 2.

    Args:
        x0_hat: (B, C, H, W).
        dim: the dimension that is flipped.

    Returns:
        (B,), in squared units of the pixel values; at most 4 for images in [-1, 1].
    """
    return _mean((x0_hat - x0_hat.flip(dim)) ** 2)


def mean_intensity(x0_hat: Tensor, /, *, target: float = 0.0) -> Tensor:
    r"""Squared difference of the image's mean to a target: (mean u - target)^2.

    Zero for images of that mean brightness (0 is mid-grey). One number per image is constrained, nothing else.

    Source: the exposure loss of Guo et al. 2020 (arXiv:2001.06826), taken over the whole image and squared.

    Args:
        x0_hat: (B, C, H, W).
        target: wanted mean, in units of the pixel values.

    Returns:
        (B,), in squared units of the pixel values.
    """
    return (_mean(x0_hat) - target) ** 2


def sparsity(x0_hat: Tensor, /, *, background: float = 0.0) -> Tensor:
    r"""Mean absolute difference to a background value: mean |u - background|.

    Zero for the empty image only. The default suits fields with a natural zero; for pictures on black it is
    `partial(sparsity, background=-1.0)`.

    Source: the l1 penalty, Tibshirani 1996; Chen, Donoho & Saunders 1998.

    Args:
        x0_hat: (B, C, H, W).
        background: the value that costs nothing.

    Returns:
        (B,), in units of the pixel values.
    """
    return _mean((x0_hat - background).abs())


def _difference(image: Tensor, dim: int) -> Tensor:
    """Each pixel's right (or lower) neighbour minus itself, one fewer than there are pixels."""
    return image.diff(dim=dim) if image.shape[dim] else image


def _mean(image: Tensor) -> Tensor:
    """Mean over everything but the batch, (B,); 0 where there is nothing to average."""
    values = image.flatten(1)
    return values.sum(1) / max(values.shape[1], 1)
