"""Weights of the denoising loss by noise level, and densities of the timesteps of training.

A loss weighting is a function of the noise levels of a batch, `NoiseLevel -> (B,)`: the factor of each image's squared
error. `RegularizedLoss` multiplies w_d by it, so `weighting.matched` follows. The noise level in the formulas is
s = sigma / (alpha + sigma), which is sigma for flow matching.

A density is a function of uniform quantiles, (N,) -> (N,) in [0, 1]: where in the training schedule they lie.

Sources: Esser et al. 2024 (arXiv:2403.03206), sec. 3.1, and the SD3 scripts of diffusers, for all but `velocity`; Li &
He 2025 (arXiv:2511.13720), for x-prediction with the loss of the velocity.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .prediction import NoiseLevel

__all__ = ["DENSITIES", "LOSS_WEIGHTINGS", "cosmap", "logit_normal", "mode", "sigma_sqrt", "velocity"]

_SMALLEST_SIGMA = 0.05  # the velocity's weight 1 / sigma^2 is at most 400, as in JiT
_MODE_SCALE = 1.29  # diffusers' default


def sigma_sqrt(level: NoiseLevel) -> Tensor:
    """Weights low noise most: w(t) = 1 / s^2."""
    return _share(level) ** -2


def cosmap(level: NoiseLevel) -> Tensor:
    """Weights medium noise up to twice as much as the ends: w(t) = 2 / (pi (1 - 2 s + 2 s^2))."""
    s = _share(level)
    return 2 / (math.pi * (1 - 2 * s + 2 * s**2))


def velocity(level: NoiseLevel) -> Tensor:
    """Weights any prediction as the loss of the velocity would: in x_0 units w_d = 1 / max(sigma, 0.05)^2.

    That is ||v - v_hat||^2, for flow matching and for schedules with alpha^2 + sigma^2 = 1.
    """
    return level.sigma.clamp(min=_SMALLEST_SIGMA) ** -2 / level.denoising_weight


def logit_normal(quantiles: Tensor) -> Tensor:
    """Samples medium noise most: 1 / (1 + exp(-n)) with n standard normal (arXiv:2403.03206, sec. 3.1)."""
    return torch.special.ndtri(quantiles.double()).sigmoid()


def mode(quantiles: Tensor) -> Tensor:
    """Samples medium noise more, and the ends at least a little (arXiv:2403.03206, sec. 3.1, with scale 1.29)."""
    u = quantiles.double()
    return 1 - u - _MODE_SCALE * ((math.pi / 2 * u).cos() ** 2 - 1 + u)


# The names of the command line.
LOSS_WEIGHTINGS = {"none": None, "sigma_sqrt": sigma_sqrt, "cosmap": cosmap, "v": velocity}
DENSITIES = {"uniform": None, "logit_normal": logit_normal, "mode": mode}


def _share(level: NoiseLevel) -> Tensor:
    return level.sigma / (level.alpha + level.sigma)
