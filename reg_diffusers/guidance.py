r"""Guidance: losses on the image that a sampler is heading for, without any training.

At each step the estimate x0_hat of the finished image is moved down an energy before the scheduler uses it,

    x0_hat - Delta,      E(x) = guidance_scale * (N / 2) * sum_k weight_k lambda_k(t) L'_k(x),

N values per image. Samplers are linear in x0_hat, so that this is to sample with another denoiser, whatever the
scheduler; the effect does not grow with the number of steps. Three ways to choose Delta:

| method | Delta                                                                    | beyond plain sampling |
|--------|--------------------------------------------------------------------------|-----------------------|
| mpgd   | grad E at x0_hat                                                         | L' and its gradient   |
| dps    | (sigma^2 / alpha) d E(x0_hat(x_t)) / d x_t                               | backward pass         |
| lgd    | the same for -log mean_j exp(-E(x0_hat + r eps_j)), r^2 = sigma^2 / (alpha^2 + sigma^2) | the same |

By Tweedie's formula dps is Cov[x_0 | x_t] grad E: the score of p(x_0) exp(-E(x_0)) with E taken at the mean of
x_0 | x_t, where lgd averages over a Gaussian around that mean; mpgd has the identity in place of the covariance. The
factor N / 2 makes mpgd with guidance_scale=1 the displacement that training with the same `Term` gives a perfect
network, to first order (see `weighting`, with w_d = 1, because in sampling there is no denoising loss to share with:
`matched` is its gate g alone; training moves less above the cap of w_d). Where all weightings are 0 nothing is
computed.

Sources: MPGD, He et al. 2024 (arXiv:2311.16424), without its autoencoder; DPS, Chung et al. 2023 (arXiv:2209.14687),
eq. 16, with a step size that follows the noise level; LGD, Song et al. 2023 (ICML, PMLR 202), eq. 8. MPGD keeps the
predicted noise where here it follows the moved x0_hat, as diffusers does after clipping.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .prediction import model_output_for, noise_level, predict_original_sample, without_learned_variance
from .term import Term, checked_values, checked_weights, term_context

__all__ = ["GUIDANCE_METHODS", "Guidance"]

GUIDANCE_METHODS = ("mpgd", "dps", "lgd")


class Guidance:
    """Losses on x0_hat that steer a sampler.

    Args:
        terms: the losses; a bare regularizer counts as `Term(regularizer, 1.0)`.
        scale: factor of all of them, finite and at least 0; 0 is no guidance.
        method: "mpgd", "dps" or "lgd".
        samples: noisy images per x0_hat that "lgd" averages over.

    Raises:
        ValueError: an unknown method, a scale or number of samples out of range, a term with an estimator of its own.
        TypeError: a term that is neither a `Term` nor callable.
    """

    def __init__(self, terms: Iterable = (), scale: float = 1.0, method: str = "mpgd", samples: int = 8):
        if isinstance(terms, Term) or callable(terms):
            raise TypeError("guidance must be a sequence: [Term(...)]")
        if method not in GUIDANCE_METHODS:
            raise ValueError(f"guidance_method must be one of {', '.join(GUIDANCE_METHODS)}, not {method!r}")
        if not (math.isfinite(scale) and scale >= 0):
            raise ValueError(f"guidance_scale must be finite and at least 0, not {scale}")
        if samples < 1:
            raise ValueError(f"guidance_samples must be at least 1, not {samples}")
        self.terms = tuple(term if isinstance(term, Term) else Term(term, 1.0) for term in terms)
        if any(term.estimator is not predict_original_sample for term in self.terms):
            raise ValueError("guidance moves the scheduler's own x0_hat: a Term in it cannot have another estimator")
        self.scale = scale
        self.method = method
        self.samples = samples

    def factors(self, scheduler, timestep) -> list[float]:
        """guidance_scale * weight * weighting of each term at a timestep, with w_d = 1."""
        level = noise_level(scheduler, timestep)
        level = replace(level, denoising_weight=torch.ones_like(level.snr))
        return [self.scale * term.weight * checked_weights(term, level).item() for term in self.terms]

    def model_output(
        self, model: Callable, scheduler, timestep, sample: Tensor, *, generator=None, context: dict | None = None
    ) -> Tensor:
        """What the scheduler is to be given: the output of the network that stands for x0_hat - Delta.

        Args:
            model: the network as a function of x_t, (B, C, ...) -> (B, C, ...) or (B, 2C, ...), conditions and
                timestep bound.
            scheduler: a diffusers scheduler, in the middle of its steps.
            timestep: the current entry of `scheduler.timesteps`.
            sample: (B, C, ...) x_t, in the coordinates of `scheduler.step`.
            generator: source of the noise of "lgd"; one, or one per image.
            context: what regularizers may list in `needs`.

        Raises:
            TermError: a regularizer or weighting breaks its contract.
        """
        factors = self.factors(scheduler, timestep) if self.terms else []
        if not any(factors):
            return model(sample)
        through_network = self.method != "mpgd"
        with torch.set_grad_enabled(through_network):
            leaf = sample.detach().to(torch.promote_types(sample.dtype, torch.float32)).requires_grad_(through_network)
            model_output = model(leaf.to(sample.dtype))
            x0_hat = predict_original_sample(scheduler, model_output, timestep, leaf)
        with torch.enable_grad():
            moved = x0_hat if through_network else x0_hat.detach().requires_grad_()
            energy = self._smoothed if self.method == "lgd" else self._energy
            energies = energy(factors, moved, scheduler, timestep, generator, context or {})
            (gradient,) = torch.autograd.grad(energies.sum(), leaf if through_network else moved)
        if through_network:
            level = noise_level(scheduler, timestep)
            gradient = gradient * (level.sigma**2 / level.alpha).to(gradient.device)
        # An image whose gradient is not finite is left alone.
        finite = gradient.isfinite().flatten(1).all(1).reshape(-1, *(1,) * (gradient.ndim - 1))
        displacement = torch.where(finite, gradient, 0)
        return _with_x0_hat(scheduler, model_output.detach(), x0_hat.detach() - displacement, timestep, leaf.detach())

    def _energy(self, factors: list[float], x0_hat: Tensor, scheduler, timestep, generator, context: dict) -> Tensor:
        """E of each image, (B,)."""
        half = x0_hat[0].numel() / 2
        energies = 0
        for factor, term in zip(factors, self.terms, strict=True):
            if factor:
                energies = energies + half * factor * checked_values(term, x0_hat, term_context(term, context))
        return energies

    def _smoothed(self, factors: list[float], x0_hat: Tensor, scheduler, timestep, generator, context: dict) -> Tensor:
        """-log mean_j exp(-E(x0_hat + r eps_j)) of each image, (B,), all its noisy versions in one batch."""
        level = noise_level(scheduler, timestep)
        radius = (level.sigma / (level.alpha**2 + level.sigma**2).sqrt()).item()
        noise = [
            randn_tensor(x0_hat.shape, generator=generator, device=x0_hat.device, dtype=x0_hat.dtype)
            for _ in range(self.samples)
        ]
        noisy = (x0_hat + radius * torch.stack(noise)).flatten(0, 1)
        repeated = {name: _repeat(value, len(x0_hat), self.samples) for name, value in context.items()}
        energies = self._energy(factors, noisy, scheduler, timestep, generator, repeated)
        return math.log(self.samples) - torch.logsumexp(-energies.reshape(self.samples, -1), dim=0)


def _with_x0_hat(scheduler, model_output: Tensor, x0_hat: Tensor, timestep, sample: Tensor) -> Tensor:
    """A model output like `model_output`, its learned variance included, that stands for `x0_hat`."""
    image_part = without_learned_variance(scheduler, model_output, sample)
    moved = model_output_for(scheduler, x0_hat, timestep, sample).to(model_output.dtype)
    return torch.cat([moved, model_output[:, image_part.shape[1] :]], dim=1)


def _repeat(value, batch_size: int, times: int):
    is_batched = isinstance(value, Tensor) and value.ndim > 0 and len(value) == batch_size
    return value.repeat(times, *(1,) * (value.ndim - 1)) if is_batched else value
