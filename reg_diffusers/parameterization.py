"""Interprets a network's output: x0_hat, training target and weight for each prediction type.

The formulas and their sources are in the table of `prediction`. The objects here compute them for factors in a shape
that broadcasts against the images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .schedule import is_affine, is_edm, is_variance_exploding, prediction_type

__all__ = ["Factors", "Parameterization", "edm_preconditioning", "parameterization"]


class Factors(NamedTuple):
    """The noise level of each image, in a shape that broadcasts against the images.

    Attributes:
        timesteps: timesteps t; may be None, except for an `AffineSchedule`.
        alpha: factor of the image in x_t = alpha x_0 + sigma eps.
        sigma: factor of the noise.
        kind: the meaning of the network's output, if it is known already.
    """

    timesteps: Tensor | None
    alpha: Tensor
    sigma: Tensor
    kind: Parameterization | None = None


class Parameterization:
    """The meaning of a network's output o.

    Attributes:
        target_uses_level: whether the target depends on the noise level; else `target` also takes None in its place.
        divides_by_alpha: whether x0_hat is undefined where alpha is 0.
    """

    target_uses_level = True
    divides_by_alpha = False

    def x0_hat(self, output: Tensor, sample: Tensor, at: Factors) -> Tensor:
        """Converts an output to the image that it implies."""
        raise NotImplementedError

    def target(self, original_samples: Tensor, noise: Tensor, at: Factors | None) -> Tensor:
        """Computes the output for which x0_hat = x_0."""
        raise NotImplementedError

    def denoising_weight(self, at: Factors) -> Tensor:
        """Computes w_d, the weight of the denoising loss in units of ||x_0 - x0_hat||^2; 1 / out_t^2 by default."""
        raise NotImplementedError

    def output_weight(self, at: Factors) -> Tensor:
        """Computes 1 / out_t^2, the weight of ||o - target||^2 in units of ||x_0 - x0_hat||^2."""
        return self.denoising_weight(at)


class _Epsilon(Parameterization):
    target_uses_level = False
    divides_by_alpha = True

    def x0_hat(self, output, sample, at):
        return (sample - at.sigma * output) / at.alpha

    def target(self, original_samples, noise, at):
        return noise

    def denoising_weight(self, at):
        return (at.alpha / at.sigma) ** 2


class _Sample(Parameterization):
    target_uses_level = False

    def x0_hat(self, output, sample, at):
        return output

    def target(self, original_samples, noise, at):
        return original_samples

    def denoising_weight(self, at):
        return torch.ones_like(at.sigma)


class _V(Parameterization):
    def x0_hat(self, output, sample, at):
        return at.alpha * sample - at.sigma * output

    def target(self, original_samples, noise, at):
        return at.alpha * noise - at.sigma * original_samples

    def denoising_weight(self, at):
        return (at.alpha / at.sigma) ** 2 + 1


class _ExplodingV(_V):
    """v is defined for alpha^2 + sigma^2 = 1, so (1, sigma) is normalized first."""

    def x0_hat(self, output, sample, at):
        variance = 1 + at.sigma**2
        return sample / variance - at.sigma / variance.sqrt() * output

    def target(self, original_samples, noise, at):
        return super().target(original_samples, noise, at) / (1 + at.sigma**2).sqrt()


class _Flow(Parameterization):
    target_uses_level = False

    def x0_hat(self, output, sample, at):
        return sample - at.sigma * output

    def target(self, original_samples, noise, at):
        return noise - original_samples

    def denoising_weight(self, at):
        return 1 / at.sigma**2


@dataclass(frozen=True)
class _Edm(Parameterization):
    """x0_hat = c_skip x_t + c_out o.

    Attributes:
        sigma_data: standard deviation of the data.
        sign: -1 for a network that returns v.
    """

    sigma_data: float
    sign: int

    def x0_hat(self, output, sample, at):
        skip, out = self._skip_out(at)
        return skip * sample + out * output

    def target(self, original_samples, noise, at):
        skip, out = self._skip_out(at)
        return (original_samples - skip * (original_samples + at.sigma * noise)) / out

    def denoising_weight(self, at):
        return 1 / self._skip_out(at)[1] ** 2

    def _skip_out(self, at: Factors) -> tuple[Tensor, Tensor]:
        skip, out = edm_preconditioning(self.sigma_data, at.sigma)
        return skip, self.sign * out


_KINDS = {
    "epsilon": _Epsilon(),
    "sample": _Sample(),
    "v_prediction": _V(),
    "trigflow": _V(),  # of SCM, where the time is the angle
    "flow_prediction": _Flow(),
}


def parameterization(scheduler) -> Parameterization:
    """Returns the meaning of the output of a network trained with this scheduler.

    Raises:
        ValueError: the scheduler is not supported.
    """
    kind = prediction_type(scheduler)
    if is_affine(scheduler):
        return scheduler.parameterization(_KINDS.get(kind))
    if is_edm(scheduler):
        return _Edm(scheduler.config.sigma_data, -1 if kind == "v_prediction" else 1)
    if kind == "v_prediction" and is_variance_exploding(scheduler):
        return _ExplodingV()
    return _KINDS[kind]


def edm_preconditioning(sigma_data: float, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (c_skip, c_out) of Karras et al. 2022, table 1."""
    variance = sigma**2 + sigma_data**2
    return sigma_data**2 / variance, sigma * sigma_data / variance**0.5
