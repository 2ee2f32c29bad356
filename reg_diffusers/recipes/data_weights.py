r"""Weights of the denoising loss by noise level: min-SNR and EDM.

    min-SNR   L = min(SNR, gamma) |x_0 - x0_hat|^2
    EDM       L = (sigma^2 + s^2) / (sigma s)^2 |x_0 - x0_hat|^2,      s = sigma_data,   ln sigma ~ N(-1.2, 1.2^2)

Weightings of terms, such as `matched`, follow these weights.

Source: Hang et al. 2023 (arXiv:2303.09556), sec. 3.4; Karras et al. 2022 (arXiv:2206.00364), eq. 2 and 8, table 1.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..affine_schedule import AffineSchedule
from ..objective import RegularizedLoss
from ..term import Term

__all__ = ["draw_sigma", "edm", "min_snr"]


def min_snr(scheduler, terms: Iterable[Term] = (), gamma: float = 5.0) -> RegularizedLoss:
    """Returns the min-SNR-gamma objective, for every prediction type: the weight is that of |x_0 - x0_hat|^2."""
    return RegularizedLoss(scheduler, terms, snr_gamma=gamma)


def edm(terms: Iterable[Term] = (), sigma_data: float = 0.5) -> RegularizedLoss:
    """Returns the objective of EDM for a network that returns the denoised image, D(x_0 + sigma eps, sigma).

        loss_fn = edm([Term(total_variation, weight=0.1)])
        loss_fn(denoiser, images, timesteps=draw_sigma(len(images))).loss.backward()

    A network F inside D(x, sigma) = c_skip x + c_out F(c_in x, c_noise) has an effective weight of 1. For F itself,
    use diffusers' EDMEulerScheduler with `RegularizedLoss`, which has the same weight without a recipe.
    """

    def weight(sigma: Tensor) -> Tensor:
        return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2

    schedule = AffineSchedule(torch.ones_like, lambda sigma: sigma, "sample", denoising_weight=weight)
    return RegularizedLoss(schedule, terms)


def draw_sigma(batch_size: int, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """Draws noise levels of EDM's training, (B,), on the CPU: exp(mean + std n), n standard normal."""
    return (mean + std * torch.randn(batch_size, device="cpu")).exp()
