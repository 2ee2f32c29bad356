r"""Physics-informed diffusion models: the residual of a law as a virtual observation of variance Sigma_t / c.

    L = min(SNR, 5) |x_0 - x0_hat|^2  +  c / (2 Sigma_t) |R(x0*)|^2

    Sigma_t = (1 - abar_{t-1}) / (1 - abar_t) beta_t,  Sigma_0 = Sigma_1

with x0* = x0_hat (mean estimation), or the end of a DDIM trajectory from x_t (sample estimation).

Source: Bastek, Sun & Kochmann 2025 (arXiv:2403.14404), sec. 3.3, algorithm 1; app. A.4 for the trajectory. Squares are
means over values, as in the authors' code; in the paper they are sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..estimators import Prediction, one_step
from ..objective import RegularizedLoss
from ..prediction import NoiseLevel, predict_original_sample, step_to
from ..regularizers.contract import needs_of
from ..term import Term

__all__ = ["SampleEstimation", "pidm", "posterior_variance"]

_GAMMA = 5.0  # of min-SNR
_LARGEST = -math.log(1e-12)


def pidm(
    scheduler, residual: Callable[..., Tensor], c: float, *, sample: bool = False, largest: float = _LARGEST
) -> RegularizedLoss:
    """Returns the objective of PIDM.

        loss_fn = pidm(scheduler, lambda x: x.square().sum(1) - 1, c=0.1)
        loss_fn(model, points).loss.backward()

    Args:
        scheduler: a DDPM-like scheduler, with alphas_cumprod.
        residual: R, images (n, C, ...) -> (n, ...), 0 where the law holds; with `needs`, it receives what they name.
        c: scale of the residual. In the paper, on the circle 0.1 for the mean and 0.005 for the sample estimation; for
            Darcy flow 1e-3 and 1e-5.
        sample: sample estimation, with a second network call; else mean estimation.
        largest: limit of R^2 / (2 Sigma_t) by value, above which a residual has no gradient. The authors' code has
            this limit, -log(1e-12); the paper has none, `math.inf`.

    Raises:
        ValueError: the scheduler has no alphas_cumprod.
    """
    variance = posterior_variance(scheduler)
    term = Term(
        _SquaredResidual(residual, variance, largest),
        weight=c,
        weighting=_Precision(variance),
        name="residual",
        estimator=SampleEstimation() if sample else one_step,
    )
    return RegularizedLoss(scheduler, [term], snr_gamma=_GAMMA)


def posterior_variance(scheduler) -> Tensor:
    """Returns the variance of q(x_{t-1} | x_t, x_0) of each timestep, (T,) float64; that of t = 0 is that of t = 1.

    Raises:
        ValueError: the scheduler has no alphas_cumprod.
    """
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(f"{type(scheduler).__name__} has no alphas_cumprod: PIDM's variance is that of DDPM's steps")
    alpha_bar = scheduler.alphas_cumprod.double().cpu()
    before = torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])
    variance = (1 - before) / (1 - alpha_bar) * (1 - alpha_bar / before)
    return torch.cat([variance[1:2], variance[1:]])


@dataclass(frozen=True)
class SampleEstimation:
    """Estimates a sample by DDIM steps from x_t to timestep 0, and x0_hat there.

    Unlike `Ddim`, whose last network call is at t / (steps + 1), the last call is at the lowest noise level of the
    schedule. The gradient passes through all calls.

    Attributes:
        steps: number of further network calls, at timesteps evenly spread from t (exclusive) to 0.
    """

    steps: int = 1

    calls_model = True

    def __call__(self, prediction: Prediction) -> Tensor:
        """Estimates the sample, (n, C, ...)."""
        scheduler, sample, timesteps = prediction.scheduler, prediction.sample, prediction.timesteps
        x0_hat = one_step(prediction)
        for left in reversed(range(self.steps)):
            end = prediction.timesteps * left // self.steps
            sample = step_to(scheduler, x0_hat, timesteps, sample, end)
            x0_hat = predict_original_sample(scheduler, prediction.predict(sample, end), end, sample)
            timesteps = end
        return x0_hat


class _Precision:
    """The weighting 1 / (2 Sigma_t)."""

    def __init__(self, variance: Tensor):
        self._precision = 1 / (2 * variance)

    def __call__(self, level: NoiseLevel) -> Tensor:
        return self._precision.to(level.timesteps.device)[level.timesteps.long()].to(level.snr)


class _SquaredResidual(nn.Module):
    """The regularizer mean min(R^2, 2 Sigma_t largest)."""

    def __init__(self, residual: Callable[..., Tensor], variance: Tensor, largest: float):
        super().__init__()
        self.residual = residual
        self.needs = tuple(dict.fromkeys(("timesteps", *needs_of(residual))))
        self._limits = 2 * largest * variance

    def forward(self, x0_hat: Tensor, /, *, timesteps: Tensor, **context) -> Tensor:
        if "timesteps" in needs_of(self.residual):
            context["timesteps"] = timesteps
        squared = self.residual(x0_hat, **context).square().reshape(len(x0_hat), -1)
        limits = self._limits.to(timesteps.device)[timesteps.long()]
        return squared.minimum(limits.to(squared, non_blocking=True).reshape(-1, 1)).mean(1)
