r"""Weightings lambda(t): how much a loss on x0_hat counts at each noise level.

A weighting is any callable `NoiseLevel -> (B,)`. Let a denoising loss have weight w_d(t) in x_0 units (see
`prediction`) and an extra loss have weight lambda(t), with squared errors summed over the image. Then the optimal
network is, to first order,

    x0_hat = D(x_t) - lambda(t) / (2 w_d(t)) grad L'(D(x_t)),        D(x_t) = E[x_0 | x_t].

The effect on the image depends on the *ratio* lambda(t) / w_d(t). (Training averages over the N values of an image
instead of summing, which replaces grad L' by N grad L'.) For noise prediction and constant lambda the ratio is lambda
/ SNR, which is 2.5e4 lambda at the last step of the linear DDPM schedule: there the network learns L' instead of the
data. `matched` ties lambda to w_d and switches the loss off where x0_hat is a blur rather than an image.

Images with a weighting of exactly 0 are left out before L' runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from .prediction import NoiseLevel

__all__ = ["alpha_bar", "constant", "gated", "low_noise", "matched", "signal_power", "snr", "truncated_snr"]


def constant(level: NoiseLevel) -> Tensor:
    """Weights all noise levels equally: lambda(t) = 1, as in L = ||eps - eps_hat||^2 + lambda L'(x0_hat).

    Included for comparison: the loss acts most strongly at high noise, where x_t contains the least about the image.
    """
    return torch.ones_like(level.snr)


def snr(level: NoiseLevel) -> Tensor:
    """Weights by the signal-to-noise ratio: lambda(t) = SNR(t).

    For noise prediction, x0_hat is displaced equally at every noise level. Unbounded: infinite where sigma is 0, at
    the clean end of a flow-matching schedule.
    """
    return level.snr


def matched(level: NoiseLevel, *, snr0: float = 10.0, cap: float = 100.0, threshold: float = 0.02) -> Tensor:
    """Weights in proportion to the denoising loss, at low noise only: lambda(t) = min(w_d, cap) g.

    The gate is g = 1 / (1 + (snr0 / SNR)^2), and lambda is exactly 0 where g < threshold. The three parts serve these
    purposes:

    - w_d: x0_hat is displaced equally at every noise level, up to the gate, for every prediction type.
    - g: L' of a blurred conditional mean is not L' of an image (Jensen's gap), so high noise is left out.
    - cap: a large weight at low noise dominates the other noise levels through the shared parameters.

    Args:
        level: noise levels of the batch.
        snr0: SNR at which the gate is 1/2.
        cap: upper limit of w_d.
        threshold: gate value below which an image is left out.
    """
    gate = (1 + (snr0 / level.snr) ** 2).reciprocal()
    return (level.denoising_weight.clamp(max=cap) * gate).masked_fill(gate < threshold, 0)


@dataclass(frozen=True)
class gated:
    """Weights all noise levels from an SNR on equally: lambda(t) = 1 where SNR(t) >= min_snr, exactly 0 elsewhere.

    For losses that compare x0_hat with its own image, which are informative at higher noise than `matched` admits. In
    use elsewhere: min_snr 0.184 (PixelGen) and 3 (ControlNet++, LPL).

    Args:
        min_snr: the smallest SNR with a weight, at least 0.

    Raises:
        ValueError: min_snr is not a finite number of at least 0.
    """

    min_snr: float

    def __post_init__(self):
        _check_at_least_0("min_snr", self.min_snr)

    def __call__(self, level: NoiseLevel) -> Tensor:
        return (level.snr >= self.min_snr).to(level.snr.dtype)


def alpha_bar(level: NoiseLevel) -> Tensor:
    """Weights by the signal's share of the variance: lambda(t) = SNR / (1 + SNR), in [0, 1]; for DDPM, abar_t."""
    return level.alpha**2 / (level.alpha**2 + level.sigma**2)


@dataclass(frozen=True)
class signal_power:
    """Weights by a power of the signal: lambda(t) = alpha(t)^exponent.

    For flow matching, alpha = 1 - sigma is the time in papers where time 1 is the image: t^p of PBFM.

    Source: Baldan et al. 2025 (arXiv:2506.08604).

    Args:
        exponent: p, at least 0; 0 weights all noise levels equally.

    Raises:
        ValueError: the exponent is not a finite number of at least 0.
    """

    exponent: float

    def __post_init__(self):
        _check_at_least_0("exponent", self.exponent)

    def __call__(self, level: NoiseLevel) -> Tensor:
        return level.alpha**self.exponent


def truncated_snr(level: NoiseLevel, *, floor: float = 1.0) -> Tensor:
    """Weights by the SNR with a lower bound: lambda(t) = max(SNR, floor).

    Source: "truncated SNR" of Salimans & Ho 2022 (arXiv:2202.00512, sec. 4).

    Args:
        level: noise levels of the batch.
        floor: lower bound of the weighting.
    """
    return level.snr.clamp(min=floor)


def low_noise(level: NoiseLevel, *, max_timestep: float = 200) -> Tensor:
    """Restricts a loss to early timesteps: lambda(t) = 1 for t < max_timestep, else 0.

    Source: the gate of ControlNet++ (Li et al. 2024, arXiv:2404.07987).

    Args:
        level: noise levels of the batch.
        max_timestep: first timestep that is left out; the default is meant for schedules of 1000 timesteps.
    """
    return (level.timesteps < max_timestep).to(level.snr.dtype)


def _check_at_least_0(name: str, value: float) -> None:
    if not (isinstance(value, Real) and math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number of at least 0, not {value!r}")
