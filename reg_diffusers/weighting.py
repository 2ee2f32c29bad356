r"""How much a loss on x0_hat counts at each noise level.

A weighting is any callable `NoiseLevel -> (B,)`. With squared errors summed over the image, a denoising loss weighted
by w_d(t) in x_0 units (see `prediction`) and an extra loss by lambda(t), the best network is, to first order,

    x0_hat = D(x_t) - lambda(t) / (2 w_d(t)) grad L'(D(x_t)),        D(x_t) = E[x_0 | x_t],

so that what acts on the image is the *ratio* lambda(t) / w_d(t). (Training takes the mean over the N values of an
image instead of the sum, which puts N grad L' in the place of grad L'.) For noise prediction and constant lambda the
ratio is lambda / SNR, 2.5e4 lambda at the last step of the linear DDPM schedule: there it learns L', not data.
`matched` ties lambda to w_d and switches it off where x0_hat is a blur rather than an image.

Where a weighting is exactly 0 the image is left out before L' runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .prediction import NoiseLevel

__all__ = ["alpha_bar", "constant", "low_noise", "matched", "snr", "truncated_snr"]


def constant(level: NoiseLevel) -> Tensor:
    """lambda(t) = 1: the formula L = ||eps - eps_hat||^2 + lambda L'(x0_hat) to the letter.

    Kept for comparison: it pulls hardest where the network knows least.
    """
    return torch.ones_like(level.snr)


def snr(level: NoiseLevel) -> Tensor:
    """lambda(t) = SNR(t): for noise prediction the same displacement of x0_hat at every noise level.

    Unbounded: infinite where sigma is 0 (the clean end of a flow-matching schedule).
    """
    return level.snr


def matched(level: NoiseLevel, *, snr0: float = 10.0, cap: float = 100.0, threshold: float = 0.02) -> Tensor:
    """lambda(t) = min(w_d, cap) g with the gate g = 1 / (1 + (snr0 / SNR)^2), exactly 0 where g < threshold.

    Tied to the denoising loss, so that the displacement of x0_hat is the same at every noise level, up to the gate,
    and whatever the network predicts; gated, because L' of a blurred conditional mean is not L' of an image (Jensen's
    gap); capped, because a weight that is large at low noise starves the other noise levels through the shared
    parameters.

    Args:
        level: the noise levels of the batch.
        snr0: SNR at which the gate is 1/2.
        cap: largest w_d that is followed.
        threshold: gate below which an image is left out.
    """
    gate = 1 / (1 + (snr0 / level.snr) ** 2)
    return torch.where(gate < threshold, 0, level.denoising_weight.clamp(max=cap) * gate)


def alpha_bar(level: NoiseLevel) -> Tensor:
    """lambda(t) = alpha^2 / (alpha^2 + sigma^2) = SNR / (1 + SNR): abar_t of the DDPM schedule, between 0 and 1."""
    return level.alpha**2 / (level.alpha**2 + level.sigma**2)


def truncated_snr(level: NoiseLevel, *, floor: float = 1.0) -> Tensor:
    """lambda(t) = max(SNR, floor): "truncated SNR" of Salimans & Ho 2022 (arXiv:2202.00512, sec. 4)."""
    return level.snr.clamp(min=floor)


def low_noise(level: NoiseLevel, *, max_timestep: float = 200) -> Tensor:
    """lambda(t) = 1 for t < max_timestep, else 0: the gate of ControlNet++ (Li et al. 2024, arXiv:2404.07987).

    The default is meant for schedules of 1000 timesteps.
    """
    return (level.timesteps < max_timestep).to(level.snr.dtype)
