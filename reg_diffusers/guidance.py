r"""Guidance: steers a sampler by losses on the predicted image, without training.

At each step, the estimate x0_hat of the final image is moved down the gradient of an energy before the scheduler uses
it,

    x0_hat - Delta,      E(x) = regularizer_scale * (N / 2) * sum_k weight_k lambda_k(t) L'_k(x),

with N values per image. Samplers are linear in x0_hat, so this equals sampling with another denoiser, for every
scheduler, and the effect does not grow with the number of steps. There are three choices of Delta:

| method | Delta                                                                    | extra cost            |
|--------|--------------------------------------------------------------------------|-----------------------|
| mpgd   | grad E at x0_hat                                                         | L' and its gradient   |
| dps    | (sigma^2 / alpha) d E(x0_hat(x_t)) / d x_t                               | backward pass         |
| lgd    | the same for -log mean_j exp(-E(x0_hat + r eps_j)), r^2 = sigma^2 / (alpha^2 + sigma^2) | the same |

By Tweedie's formula, dps is Cov[x_0 | x_t] grad E: the score of p(x_0) exp(-E(x_0)) with E evaluated at the mean of
x_0 | x_t. lgd averages over a Gaussian around this mean instead, and mpgd replaces the covariance by the identity.
With the factor N / 2 and regularizer_scale=1, mpgd equals, to first order, the displacement that training with the
same `Term` gives a perfect network (see `weighting`). Here w_d = 1, because sampling has no denoising loss: `matched`
is its gate g alone, and training moves less above the cap of w_d. Steps where all weightings are 0 cost nothing extra.

Sources: MPGD, He et al. 2024 (arXiv:2311.16424), without its autoencoder; DPS, Chung et al. 2023 (arXiv:2209.14687),
eq. 16, with a step size that follows the noise level; LGD, Song et al. 2023 (ICML, PMLR 202), eq. 8. Unlike MPGD,
which keeps the predicted noise, the noise here follows the moved x0_hat, as in diffusers after clipping.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .context import repeat, unwrap
from .estimators import Prediction, calls_model, mean_of_draws, one_step
from .prediction import model_output_for, noise_level, predict_original_sample, without_learned_variance
from .term import (
    Term,
    TermError,
    checked_values,
    checked_weights,
    draw,
    refuse_rules,
    seen_through,
    term_context,
    viewed,
)

__all__ = ["GUIDANCE_METHODS", "Guidance"]

GUIDANCE_METHODS = ("mpgd", "dps", "lgd")


class Guidance:
    """Steers a sampler by losses on x0_hat.

    Args:
        terms: the losses; a bare regularizer is treated as `Term(regularizer, 1.0)`.
        scale: common factor of the losses, finite and at least 0; 0 disables guidance.
        method: "mpgd", "dps" or "lgd".
        samples: number of noisy images per x0_hat that "lgd" averages over.
        view: view for terms that have none, such as a conversion to the units of a field.

    Raises:
        ValueError: the method is unknown, scale or samples is out of range, or the estimator of a term calls the
            network again.
        TypeError: `terms` is not a sequence of `Term` or callables.
    """

    def __init__(
        self,
        terms: Iterable = (),
        scale: float = 1.0,
        method: str = "mpgd",
        samples: int = 8,
        view: Callable[[Tensor], Tensor] | None = None,
    ):
        if isinstance(terms, Term) or callable(terms):
            raise TypeError("guidance must be a sequence, such as [Term(...)]")
        if method not in GUIDANCE_METHODS:
            raise ValueError(f"guidance_method must be one of {', '.join(GUIDANCE_METHODS)}, not {method!r}")
        if not (math.isfinite(scale) and scale >= 0):
            raise ValueError(f"regularizer_scale must be finite and at least 0, not {scale}")
        if samples < 1:
            raise ValueError(f"guidance_samples must be at least 1, not {samples}")
        given = (term if isinstance(term, Term) else Term(term, 1.0) for term in terms)
        self.terms = tuple(seen_through(term, view) for term in given)
        refuse_rules(self.terms, "guidance")
        if asking := [term.name for term in self.terms if calls_model(term.estimator)]:
            raise ValueError(
                f"guidance calls the network once per step, and the estimator of {asking[0]!r} calls it again: leave"
                " estimator= out"
            )
        self.scale = scale
        self.method = method
        self.samples = samples

    def factors(self, scheduler, timestep) -> list[float]:
        """Computes regularizer_scale * weight * weighting of each term at a timestep, with w_d = 1."""
        level = noise_level(scheduler, timestep)
        level = replace(level, denoising_weight=torch.ones_like(level.snr))
        return [self.scale * term.weight * checked_weights(term, level).item() for term in self.terms]

    def model_output(
        self, model: Callable, scheduler, timestep, sample: Tensor, *, generator=None, context: dict | None = None
    ) -> Tensor:
        """Computes the guided model output: the input of `scheduler.step` that corresponds to x0_hat - Delta.

        An image with a non-finite gradient is not moved.

        Args:
            model: the network as a function of x_t alone, (B, C, ...) -> (B, C, ...) or (B, 2C, ...).
            scheduler: a diffusers scheduler after `set_timesteps`.
            timestep: the current entry of `scheduler.timesteps`.
            sample: (B, C, ...) x_t, in the coordinates of `scheduler.step`.
            generator: random generator for the noise of "lgd"; one, or one per image.
            context: arguments listed in the regularizers' `needs`.

        Returns:
            (B, C, ...) or (B, 2C, ...), as the network.

        Raises:
            TermError: a regularizer, view or weighting violates its contract.
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
            at = _Step(scheduler, timestep, leaf.detach(), generator)
            energies = energy(factors, moved, at, context or {})
            (gradient,) = torch.autograd.grad(energies.sum(), leaf if through_network else moved)
        if through_network:
            level = noise_level(scheduler, timestep)
            gradient = gradient * (level.sigma**2 / level.alpha).to(gradient.device)
        finite = gradient.isfinite().flatten(1).all(1).reshape(-1, *(1,) * (gradient.ndim - 1))
        displacement = torch.where(finite, gradient, 0)
        return _with_x0_hat(scheduler, model_output.detach(), x0_hat.detach() - displacement, timestep, leaf.detach())

    def _energy(self, factors: list[float], x0_hat: Tensor, at: _Step, context: dict) -> Tensor:
        """Computes E of each image, (B,)."""
        half = x0_hat[0].numel() / 2
        energies, drawn = 0, []
        sharing: list[tuple] = []  # distinct estimators and views, with x0_hat and original_samples through them
        for factor, term in zip(factors, self.terms, strict=True):
            if not factor:
                continue
            seen_by = (term.estimator, term.view)
            found = next((through for other, through in sharing if other == seen_by), None)
            if found is None:
                if term.view not in drawn:
                    draw(term.view, x0_hat)
                    drawn.append(term.view)
                found = _Through(term, at.estimate(term, x0_hat, context), len(x0_hat), context)
                sharing.append((seen_by, found))
            values = checked_values(term, found.images, found.context_of(term))
            energies = energies + half * factor * mean_of_draws(values, found.draws).to(x0_hat.dtype)
        return energies

    def _smoothed(self, factors: list[float], x0_hat: Tensor, at: _Step, context: dict) -> Tensor:
        """Computes -log mean_j exp(-E(x0_hat + r eps_j)) of each image, (B,), with all noisy images in one batch."""
        level = noise_level(at.scheduler, at.timestep)
        radius = (level.sigma / (level.alpha**2 + level.sigma**2).sqrt()).item()
        noise = [
            randn_tensor(x0_hat.shape, generator=at.generator, device=x0_hat.device, dtype=x0_hat.dtype)
            for _ in range(self.samples)
        ]
        noisy = (x0_hat + radius * torch.stack(noise)).flatten(0, 1)
        repeated = repeat(context, self.samples, len(x0_hat))
        energies = self._energy(factors, noisy, at.repeated(self.samples), repeated)
        return math.log(self.samples) - torch.logsumexp(-energies.reshape(self.samples, -1), dim=0)


@dataclass(frozen=True)
class _Step:
    """One step of a sampler: the scheduler, its timestep, x_t (B, C, ...) and the random generator."""

    scheduler: Any
    timestep: Tensor
    sample: Tensor
    generator: Any

    def repeated(self, times: int) -> _Step:
        return replace(self, sample=repeat(self.sample, times, len(self.sample)))

    def estimate(self, term: Term, x0_hat: Tensor, context: dict) -> Tensor:
        """Returns what a term sees of x0_hat: the result of its estimator."""
        if term.estimator is one_step:
            return x0_hat
        timesteps = torch.as_tensor(self.timestep).reshape(-1).expand(len(x0_hat))
        images = (context.get("noise"), context.get("original_samples"))
        seen = term.estimator(Prediction.of_image(self.scheduler, x0_hat, timesteps, self.sample, *images))
        if x0_hat.requires_grad and not seen.requires_grad:
            raise TermError(f"the estimator of {term.name!r} returns images that do not depend on x0_hat")
        return seen


def _with_x0_hat(scheduler, model_output: Tensor, x0_hat: Tensor, timestep, sample: Tensor) -> Tensor:
    """Replaces the image part of a model output so that it corresponds to `x0_hat`; keeps a learned variance."""
    image_part = without_learned_variance(scheduler, model_output, sample)
    moved = model_output_for(scheduler, x0_hat, timestep, sample).to(model_output.dtype)
    return torch.cat([moved, model_output[:, image_part.shape[1] :]], dim=1)


class _Through:
    """x0_hat and original_samples through the view of a term, computed once for all terms that see the same.

    Args:
        term: one of the terms.
        x0_hat: (draws B, C, ...).
        batch_size: B.
        context: for the batch.
    """

    def __init__(self, term: Term, x0_hat: Tensor, batch_size: int, context: dict):
        self._term = term
        self._context = context
        self._batch_size = batch_size
        self.draws = len(x0_hat) // batch_size
        self.images = viewed(term, x0_hat)

    def context_of(self, term: Term) -> dict:
        """Selects the arguments in the regularizer's `needs`, with `original_samples` through the view."""
        own = term_context(term, self._context)
        if "original_samples" in own:
            own["original_samples"] = self._original_images
        return unwrap(repeat(own, self.draws, self._batch_size) if self.draws > 1 else own)

    @cached_property
    def _original_images(self) -> Tensor:
        with torch.no_grad():
            return viewed(self._term, unwrap(self._context)["original_samples"])
