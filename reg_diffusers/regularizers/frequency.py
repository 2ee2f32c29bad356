r"""Losses on the frequencies of x0_hat: Fourier spectrum, Haar wavelets, radial power spectrum.

Parseval's identity: an orthonormal transform W keeps the squared distance, ||W u - W v||^2 = ||u - v||^2. So the mean
squared difference of all Fourier or Haar coefficients is the denoising loss with another weight per timestep, and
nothing new. The losses here differ from it: the sum of absolute values weighs small coefficients more, amplitudes
ignore the phase, and unequal weights favour some bands.

Transforms run over the last two dimensions and treat the image as periodic. Inputs in half precision are computed in
float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .contract import at_least_float32, refuse_another_size

__all__ = ["RadialSpectrum", "mean_radial_spectrum", "radial_spectrum", "spectrum", "wavelet"]

_KINDS = ("complex", "amplitude", "log_amplitude")
_SMALLEST_AMPLITUDE = 1e-3  # rounding to 8 bits has the amplitude 2.3e-3
_HUBER_DELTA = 0.05
_PARSEVAL = (
    "By Parseval's identity, the squared difference in an orthonormal basis is the squared difference of the pixels,"
    " which the denoising loss already measures"
)


def spectrum(
    x0_hat: Tensor,
    /,
    *,
    original_samples: Tensor,
    kind: str = "complex",
    focal: float = 0.0,
    bands: Sequence[float] | None = None,
) -> Tensor:
    r"""Compares the Fourier spectrum of x0_hat with that of its own image: mean w |d|. Paired.

    With U and V the orthonormal discrete Fourier transforms of x0_hat and original_samples, and
    |U| = sqrt(re^2 + im^2 + 1e-12), which has a finite gradient at 0, d is one of

        "complex"          U - V                zero only for the image itself
        "amplitude"        |U| - |V|            also for copies shifted periodically or rotated by 180 degrees
        "log_amplitude"    log |U| - log |V|    the same; a weak frequency counts as much as a strong one

    The weight is w = f b. f = |d|^focal / mean |d|^focal per image is detached, so it favours the frequencies with
    large errors and leaves the scale unchanged. b is the weight of the radial band that the frequency is in.

    A difference without spatial correlation has the same value at every resolution. A smooth difference has half the
    value at twice the resolution, because its energy is in the same few frequencies of four times as many.

    It is informative at higher noise than a loss of x0_hat alone, since it compares an image with itself:
    `weighting.gated(0.2)` to `gated(3)` are in use for paired losses.

    Source: Jiang et al. 2021 (arXiv:2012.12821) for the focal weights, which they normalize by the maximum.

    Args:
        x0_hat: (B, C, H, W).
        original_samples: (B, C, H, W), its own images.
        kind: "complex", "amplitude" or "log_amplitude"; in the latter, amplitudes below 1e-3 count as 1e-3.
        focal: exponent of the focal weights; 0 weighs all frequencies equally.
        bands: weights of equally wide radial bands from frequency 0 to the Nyquist frequency of the axes. The first
            contains the mean of the image, the last also the frequencies beyond, in the corners. None: all 1.

    Returns:
        (B,), in pixel values; without unit for "log_amplitude" (a factor e in every amplitude is 1).

    Raises:
        ValueError: `kind` is unknown, such as a squared difference, `focal` is negative, `bands` is not a sequence
            of weights that are finite and at least 0, or the images have another size than x0_hat.
    """
    if kind not in _KINDS:
        raise ValueError(f"kind must be one of {', '.join(_KINDS)}, not {kind!r}. {_PARSEVAL}")
    if not focal >= 0:
        raise ValueError(f"focal must be at least 0, not {focal}")
    refuse_another_size(x0_hat, original_samples)
    ours, theirs = (torch.fft.fft2(at_least_float32(image), norm="ortho") for image in (x0_hat, original_samples))
    if kind == "complex":
        difference = _modulus(ours - theirs, 1e-6) - 1e-6
    elif kind == "amplitude":
        difference = (_modulus(ours, 1e-6) - _modulus(theirs, 1e-6)).abs()
    else:
        floor = _SMALLEST_AMPLITUDE
        difference = (_modulus(ours, floor).log() - _modulus(theirs, floor).log()).abs()
    weight = torch.ones_like(difference)
    if focal:
        focus = difference.detach() ** focal
        weight = focus / focus.flatten(1).mean(1).clamp_min(1e-30).reshape(-1, *[1] * (focus.ndim - 1))
    if bands is not None:
        chosen = torch.as_tensor(_weights(bands, "bands"), dtype=weight.dtype, device=weight.device)
        weight = weight * chosen[(_band(*x0_hat.shape[-2:], len(chosen), weight.device) - 1).clamp_min(0)]
    return (weight * difference).flatten(1).mean(1)


def wavelet(
    x0_hat: Tensor,
    /,
    *,
    original_samples: Tensor,
    levels: int = 2,
    weights: Sequence[float] | None = None,
    loss: str = "l1",
) -> Tensor:
    r"""Compares the Haar wavelet coefficients of x0_hat with those of its own image: mean w loss(W u - W v). Paired.

    W is the orthonormal two-dimensional Haar transform. Each level splits the image into averages and differences of
    2 x 2 pixels and goes on with the averages. Zero only for the image itself. Unlike the Fourier transform, it
    has no borders: blocks never reach across them.

    The value of a smooth difference does not depend on the resolution: it is that of the averages, mean |u - v| /
    2^levels. Use the gates of `spectrum`.

    Source: Haar 1910; Mallat 1999, sec. 7.7 (separable bases).

    Args:
        x0_hat: (B, C, H, W), H and W divisible by 2^levels.
        original_samples: (B, C, H, W), its own images.
        levels: how many times the image is halved, at least 1.
        weights: levels + 1 weights: of the averages, and of the differences from the coarsest to the finest level.
            (0, 1, 1) compares details only. None: all 1.
        loss: "l1", |d|; or "huber", d^2 / (2 delta) up to delta = 0.05 and |d| - delta / 2 above. Few differences of
            images in [-1, 1] exceed a delta of 1, which would make it a squared difference.

    Returns:
        (B,), in pixel values.

    Raises:
        ValueError: H or W is not divisible by 2^levels, `loss` is unknown, such as a squared difference, or
            `weights` does not have levels + 1 entries that are finite and at least 0, or the images have another size
            than x0_hat.
    """
    if loss not in ("l1", "huber"):
        raise ValueError(f"loss must be 'l1' or 'huber', not {loss!r}. {_PARSEVAL}")
    height, width = x0_hat.shape[-2:]
    if levels < 1 or height % 2**levels or width % 2**levels:
        possible = max((n for n in range(1, 20) if not (height % 2**n or width % 2**n)), default=0)
        fix = f"use levels={possible}" if possible else "resize or crop the images to even sizes"
        raise ValueError(
            f"wavelet with levels={levels} needs sizes divisible by {2**levels}, not {height} x {width}: {fix}"
        )
    weights = _weights([1.0] * (levels + 1) if weights is None else weights, "weights")
    if len(weights) != levels + 1:
        raise ValueError(f"weights must have levels + 1 = {levels + 1} entries, not {len(weights)}")
    refuse_another_size(x0_hat, original_samples)
    averages, total = at_least_float32(x0_hat) - at_least_float32(original_samples), 0.0
    size = averages[0].numel()
    for weight in reversed(weights[1:]):
        averages, *details = _haar(averages)
        total = total + weight * sum(_penalty(band, loss) for band in details)
    return (total + weights[0] * _penalty(averages, loss)) / size


def radial_spectrum(x0_hat: Tensor, /, *, target: Tensor | Sequence[float]) -> Tensor:
    r"""Compares the radial power spectrum of x0_hat with that of the data: mean_k (log P_k - target_k)^2.

    P_k is the mean of |U|^2 over channels and over the frequencies of band k, plus 1e-6, with U the orthonormal
    discrete Fourier transform. The K bands have equal widths from 0 to the Nyquist frequency of the axes; the last
    also contains the frequencies beyond, in the corners. Frequency 0, the mean of the image, counts in none. 1e-6 is
    below the power of rounding to 8 bits, 5e-6.

    Zero for images whose radial spectrum is the target, whatever their phases and directions. Unpaired: it needs no
    original_samples. x0_hat is a mean of images at high noise and lacks fine detail there even if the model is
    perfect, so use `weighting.matched`, or a gate at SNR >= 10 and above. The power of a frequency grows by 4 where
    the resolution of a smooth picture doubles, so a target belongs to one size.

    Source: Durall et al. 2020 (arXiv:2003.01826), with a squared difference of logarithms.

    Args:
        x0_hat: (B, C, H, W).
        target: (K,) from `mean_radial_spectrum`, a tensor or a sequence of numbers. `RadialSpectrum` keeps it with
            the loss and reads it from a file.

    Returns:
        (B,), without unit: a factor e in every power is 1.

    Raises:
        ValueError: the image is too small for K bands: max(H, W) is below 2 K.
    """
    target = torch.as_tensor(target, device=x0_hat.device)
    powers = _log_radial_power(x0_hat, len(target))
    return (powers - target.to(powers.dtype)).square().mean(1)


radial_spectrum.needs = ("target",)
spectrum.needs = wavelet.needs = ("original_samples",)


def mean_radial_spectrum(images: Tensor, bands: int | None = None) -> Tensor:
    """Estimates the target of `radial_spectrum`: the mean log radial power spectrum of images.

    Args:
        images: (N, C, H, W), in the units that the loss sees.
        bands: K. Default: min(H, W) / 2, one per frequency of the shorter axis.

    Returns:
        (K,), float32 on the CPU (float64 for images in float64).
    """
    bands = max(min(images.shape[-2:]) // 2, 1) if bands is None else bands
    chunks = images.detach().split(256)
    return (sum(_log_radial_power(chunk, bands).sum(0) for chunk in chunks) / len(images)).cpu()


class RadialSpectrum(nn.Module):
    """Keeps the target of `radial_spectrum`, and moves it with the loss.

        RadialSpectrum.of(images).save("spectrum.pt")
        term = Term(RadialSpectrum("spectrum.pt"), weight=0.01)

    On the command line: `--regularizer "RadialSpectrum('spectrum.pt')"`.

    Args:
        target: (K,) from `mean_radial_spectrum`, or the path of a file that `save` wrote.

    Raises:
        ValueError: the file does not exist or contains no such tensor, or the target does not have shape (K,).
    """

    __name__ = "radial_spectrum"

    def __init__(self, target: Tensor | Sequence[float] | str | Path):
        super().__init__()
        values = _read(target) if isinstance(target, str | Path) else torch.as_tensor(target)
        if values.ndim != 1 or not len(values) or not values.isfinite().all():
            raise ValueError(f"the target of RadialSpectrum must be finite and (K,), not {tuple(values.shape)}")
        self.register_buffer("target", values.detach().clone())

    @classmethod
    def of(cls, images: Tensor, bands: int | None = None) -> RadialSpectrum:
        """Estimates the target from images (N, C, H, W); see `mean_radial_spectrum`."""
        return cls(mean_radial_spectrum(images, bands))

    def save(self, path: str | Path) -> None:
        """Writes the target to a file."""
        torch.save(self.target.cpu(), path)

    def forward(self, x0_hat: Tensor, /) -> Tensor:
        """Computes `radial_spectrum` of images (B, C, H, W): (B,)."""
        return radial_spectrum(x0_hat, target=self.target)


def _read(path: str | Path) -> Tensor:
    try:
        values = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise ValueError(
            f"{path} does not exist: write it with RadialSpectrum.of(images).save({str(path)!r})"
        ) from None
    if not isinstance(values, Tensor):
        raise ValueError(f"{path} contains no tensor: write it with RadialSpectrum.of(images).save({str(path)!r})")
    return values


def _modulus(coefficients: Tensor, smallest: float) -> Tensor:
    """|F| with a finite gradient at 0."""
    return (coefficients.real**2 + coefficients.imag**2 + smallest**2).sqrt()


def _weights(weights: Sequence[float], name: str) -> list[float]:
    weights = [float(weight) for weight in weights]
    if not weights or not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise ValueError(f"{name} must be weights that are finite and at least 0, not {weights}")
    return weights


def _band(height: int, width: int, bands: int, device) -> Tensor:
    """The radial band of each frequency, (H, W): 0 for frequency 0, then 1 to `bands`."""
    f_y = torch.fft.fftfreq(height, d=0.5, device=device)
    f_x = torch.fft.fftfreq(width, d=0.5, device=device)
    radius = (f_y[:, None] ** 2 + f_x**2).sqrt()
    return (radius * bands - 1e-4).ceil().long().clamp(0, bands)  # 1e-4: rounding moves no frequency to the next band


def _log_radial_power(images: Tensor, bands: int) -> Tensor:
    """Logarithm of the mean power in each band, (B, K)."""
    height, width = images.shape[-2:]
    if max(height, width) < 2 * bands:
        raise ValueError(f"images of {height} x {width} have at most {max(height, width) // 2} bands, not {bands}")
    coefficients = torch.fft.fft2(at_least_float32(images), norm="ortho")
    power = (coefficients.real**2 + coefficients.imag**2).flatten(1, -3).mean(1).flatten(1)
    band = _band(height, width, bands, images.device).flatten()
    sums = power.new_zeros(len(power), bands + 1).index_add(1, band, power)
    return (sums / band.bincount(minlength=bands + 1) + 1e-6)[:, 1:].log()


def _haar(image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One level of the orthonormal Haar transform: averages, and differences along y, x and both."""
    top, bottom = image[..., 0::2, :], image[..., 1::2, :]
    sums, differences = top + bottom, top - bottom
    a, b = sums[..., 0::2], sums[..., 1::2]
    c, d = differences[..., 0::2], differences[..., 1::2]
    return (a + b) / 2, (c + d) / 2, (a - b) / 2, (c - d) / 2


def _penalty(band: Tensor, loss: str) -> Tensor:
    """Sum of the loss over all dimensions but the batch, (B,)."""
    size = band.abs()
    if loss == "huber":
        small = size <= _HUBER_DELTA
        size = torch.where(small, band**2 / (2 * _HUBER_DELTA), size - _HUBER_DELTA / 2)
    return size.flatten(1).sum(1)
