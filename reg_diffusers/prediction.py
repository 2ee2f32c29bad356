r"""Conversions between a network's output and the clean image, for every diffusers scheduler.

Every diffusers scheduler corrupts an image by

    x_t = alpha_t x_0 + sigma_t eps,        eps ~ N(0, I),        SNR(t) = alpha_t^2 / sigma_t^2,

and every network output o is an affine function of (x_0, x_t). The estimate of the clean image is therefore

    x0_hat = skip_t x_t + out_t o.

| prediction_type | o predicts                | x0_hat                  | weight w_d in x_0 units |
|-----------------|---------------------------|-------------------------|-------------------------|
| epsilon         | eps                       | (x_t - sigma o) / alpha | SNR                     |
| sample          | x_0                       | o                       | 1                       |
| v_prediction    | alpha eps - sigma x_0     | alpha x_t - sigma o     | SNR + 1                 |
| flow_prediction | eps - x_0                 | x_t - sigma o           | 1 / sigma^2             |

The loss |o - target|^2 has weight w_d = 1 / out_t^2 in x_0 units, because o - target = (x0_hat - x_0) / out_t. An
extra loss on x0_hat competes with this weight, so the weightings in `weighting` are built on it.

Samples are in the coordinates of the scheduler's own `step`: (alpha, sigma) = (sqrt(abar_t), sqrt(1 - abar_t)) for
DDPM, DDIM, DPM-Solver++, UniPC and similar schedulers; (1, sigma) for Euler, Heun, LMS and the K-diffusion schedulers;
(1 - sigma, sigma) for flow matching. Schedulers with a sigma table look a timestep up in the schedule made by
`set_timesteps`, so Karras and other respaced schedules are exact. A timestep outside that schedule uses the training
schedule.

Sources: Ho et al. 2020 (arXiv:2006.11239) eq. 4 and 15; Salimans & Ho 2022 (arXiv:2202.00512) sec. 4 and app. D for v
and the weights; Karras et al. 2022 (arXiv:2206.00364) eq. 7 for the EDM preconditioning; Lipman et al. 2023
(arXiv:2210.02747) for flow matching.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .learned_variance import image_channels, learns_variance, output_for_step, without_learned_variance
from .level_table import levels_at, looked_up
from .parameterization import Factors, Parameterization, parameterization
from .precision import full_precision
from .schedule import alpha_sigma, checked_timesteps, is_affine, is_edm, is_variance_exploding, prediction_type

__all__ = [
    "NoiseLevel",
    "add_noise",
    "image_channels",
    "learns_variance",
    "model_output_for",
    "noise_level",
    "output_for_step",
    "output_weight",
    "predict_original_sample",
    "prediction_target",
    "prediction_type",
    "refuse_zero_terminal_snr",
    "scale_model_input",
    "step_to",
    "tensor_of",
    "without_learned_variance",
]


@dataclass(frozen=True)
class NoiseLevel:
    """The noise level of each image of a batch: five float32 tensors of shape (B,) on the device of the timesteps.

    Attributes:
        timesteps: timestep t, as a number.
        alpha: factor of the image in x_t = alpha x_0 + sigma eps.
        sigma: factor of the noise.
        snr: signal-to-noise ratio alpha^2 / sigma^2; infinite where sigma is 0.
        denoising_weight: w_d, the weight of the denoising loss ||o - target||^2 in units of ||x_0 - x0_hat||^2.
    """

    timesteps: Tensor
    alpha: Tensor
    sigma: Tensor
    snr: Tensor
    denoising_weight: Tensor

    def weighted_by(self, denoising_weight: Tensor) -> NoiseLevel:
        """Returns the same noise levels with another weight of the denoising loss, (B,)."""
        return NoiseLevel(self.timesteps, self.alpha, self.sigma, self.snr, denoising_weight)


def noise_level(scheduler, timesteps) -> NoiseLevel:
    """Computes the noise level of each timestep.

    The result can be passed to the other functions of this module in place of the timesteps.

    Args:
        scheduler: a diffusers scheduler of one of the families in the module docstring.
        timesteps: (B,) integers or floats in the scheduler's unit; a scalar is treated as (1,).

    Raises:
        ValueError: the scheduler is not supported, or a timestep is out of its range (checked on the CPU only).
    """
    parts = looked_up(scheduler, timesteps)
    if parts is None:
        timesteps = checked_timesteps(scheduler, timesteps)
        parts = _from_table(scheduler, timesteps) or _level_parts(scheduler, timesteps)
    return NoiseLevel(*parts)


def _from_table(scheduler, timesteps: Tensor) -> tuple[Tensor, ...] | None:
    """Looks up the parts of a noise level, (B,) float32 each; None for a schedule without a table."""
    return levels_at(scheduler, timesteps, lambda every: torch.stack(_level_parts(scheduler, every)))


def _level_parts(scheduler, timesteps: Tensor) -> list[Tensor]:
    """Computes the parts of a noise level, (B,) float32 each."""
    alpha, sigma = alpha_sigma(scheduler, timesteps)
    at = Factors(timesteps.to(alpha), alpha, sigma)
    parts = (timesteps, alpha, sigma, (alpha / sigma) ** 2, parameterization(scheduler).denoising_weight(at))
    return [part.float() for part in parts]


def output_weight(scheduler, timesteps) -> Tensor:
    """Computes 1 / out_t^2, the weight of the unweighted ||o - target||^2 in units of ||x_0 - x0_hat||^2.

    It differs from `NoiseLevel.denoising_weight` only for an `AffineSchedule` with a denoising_weight of its own.

    Args:
        scheduler: a diffusers scheduler, or an `AffineSchedule`.
        timesteps: (B,), or the `NoiseLevel` that `noise_level` returned for them.

    Returns:
        (B,) float32.
    """
    if not is_affine(scheduler):
        return (timesteps if isinstance(timesteps, NoiseLevel) else noise_level(scheduler, timesteps)).denoising_weight
    timesteps = timesteps.timesteps if isinstance(timesteps, NoiseLevel) else checked_timesteps(scheduler, timesteps)
    alpha, sigma = alpha_sigma(scheduler, timesteps)
    return parameterization(scheduler).output_weight(Factors(timesteps.to(alpha), alpha, sigma)).float()


def predict_original_sample(scheduler, model_output, timesteps, sample: Tensor) -> Tensor:
    """Converts a batch of model outputs to images x0_hat, like `scheduler.step(...).pred_original_sample`.

    Unlike `step`, it takes one timestep per image, draws no noise, never clips, changes no state, and is
    differentiable in `model_output` and `sample`. The module docstring lists the formula of each prediction type.

    Args:
        scheduler: a diffusers scheduler.
        model_output: (B, C, ...) output of the network: a tensor, a tuple that starts with it, or a diffusers output;
            (B, 2C, ...) with a learned variance, which is ignored.
        timesteps: (B,), or a scalar for the whole batch.
        sample: (B, C, ...) the noisy images x_t, in the coordinates of `scheduler.step` (before `scale_model_input`).

    Returns:
        (B, C, ...) in float32, or float64 if an input is float64.

    Raises:
        ValueError: the network predicts noise and the schedule has zero terminal SNR (for an `AffineSchedule`: alpha
            is 0 at one of the timesteps), a timestep is out of the scheduler's range, or the shapes do not match.
            Timesteps are checked on the CPU only.
        TypeError: `model_output` contains no tensor.
    """
    at = timesteps if isinstance(timesteps, Factors) else None
    kind = parameterization(scheduler) if at is None or at.kind is None else at.kind
    if kind.divides_by_alpha:
        refuse_zero_terminal_snr(scheduler)
    model_output = without_learned_variance(scheduler, tensor_of(model_output), sample)
    dtype = full_precision(model_output.dtype, sample.dtype)
    model_output, sample = model_output.to(dtype), sample.to(dtype)
    return kind.x0_hat(model_output, sample, factors_like(scheduler, timesteps, sample) if at is None else at)


def model_output_for(scheduler, x0_hat: Tensor, timesteps, sample: Tensor) -> Tensor:
    """Computes the model output that corresponds to an image: the inverse of `predict_original_sample`.

    This is the output of a network that predicts x0_hat, and therefore the noise eps = (x_t - alpha x0_hat) / sigma.

    Args:
        scheduler: a diffusers scheduler.
        x0_hat: (B, C, ...) the images.
        timesteps: (B,), or a scalar for the whole batch. Where sigma is 0, the result is arbitrary.
        sample: (B, C, ...) the noisy images x_t.

    Returns:
        (B, C, ...).
    """
    at = factors_like(scheduler, timesteps, sample)
    return parameterization(scheduler).target(x0_hat, _noise_of(sample, x0_hat, at), at)


def step_to(scheduler, x0_hat: Tensor, timesteps, sample: Tensor, end) -> Tensor:
    """Takes a deterministic step to another noise level: x_end = alpha_end x0_hat + sigma_end eps_hat.

    This is DDIM (Song et al. 2021, arXiv:2010.02502, eq. 12 without noise); on a flow schedule it is an Euler step.

    Args:
        scheduler: a diffusers scheduler, or an `AffineSchedule`.
        x0_hat: (B, C, ...) the images.
        timesteps: (B,), or a scalar for the whole batch.
        sample: (B, C, ...) the noisy images x_t.
        end: (B,) timesteps to go to, or a scalar.

    Returns:
        (B, C, ...) x_end.
    """
    at, to = (factors_like(scheduler, time, x0_hat) for time in (timesteps, end))
    return to.alpha * x0_hat + to.sigma * _noise_of(sample, x0_hat, at)


def _noise_of(sample: Tensor, x0_hat: Tensor, at: Factors) -> Tensor:
    """Computes eps = (x_t - alpha x0_hat) / sigma, finite where sigma is 0: x_t is the image there."""
    return (sample - at.alpha * x0_hat) / torch.where(at.sigma == 0, 1, at.sigma)


def prediction_target(scheduler, original_samples: Tensor, noise: Tensor, timesteps) -> Tensor:
    """Computes the training target of the network: the output for which x0_hat = x_0.

    Args:
        scheduler: a diffusers scheduler.
        original_samples: (B, C, ...) the images x_0.
        noise: (B, C, ...) eps.
        timesteps: (B,), or a scalar for the whole batch; or their `NoiseLevel`.

    Returns:
        (B, C, ...): eps, x_0, alpha eps - sigma x_0 or eps - x_0, depending on `prediction_type`.
    """
    kind = parameterization(scheduler)
    if kind.target_uses_level:
        return kind.target(original_samples, noise, factors_like(scheduler, timesteps, original_samples))
    if not isinstance(timesteps, Factors):
        _level_of(scheduler, timesteps, original_samples)  # raises for timesteps that are out of range
    return kind.target(original_samples, noise, None)


def add_noise(scheduler, original_samples: Tensor, noise: Tensor, timesteps) -> Tensor:
    """Computes the noisy images x_t = alpha x_0 + sigma eps.

    Works for every supported scheduler, including those for flow matching, which lack `add_noise`.

    Args:
        scheduler: a diffusers scheduler.
        original_samples: (B, C, ...) the images x_0.
        noise: (B, C, ...) eps.
        timesteps: (B,), or a scalar for the whole batch; or their `NoiseLevel`.

    Returns:
        (B, C, ...) x_t, in the coordinates of `scheduler.step`.
    """
    at = factors_like(scheduler, timesteps, original_samples)
    return at.alpha * original_samples + at.sigma * noise


def scale_model_input(scheduler, sample: Tensor, timesteps) -> Tensor:
    """Scales x_t to the network's input: `scheduler.scale_model_input` with one timestep per image and without state.

    Returns x_t unchanged except for Euler-type schedulers, whose networks are trained on x_t / sqrt(1 + sigma^2), and
    EDM, whose networks are trained on x_t / sqrt(sigma_data^2 + sigma^2).

    Args:
        scheduler: a diffusers scheduler.
        sample: (B, C, ...) the noisy images x_t.
        timesteps: (B,), or a scalar for the whole batch; or their `NoiseLevel`.
    """
    if is_edm(scheduler):
        sigma = factors_like(scheduler, timesteps, sample).sigma
        return sample / (sigma**2 + scheduler.config.sigma_data**2).sqrt()
    if not is_variance_exploding(scheduler):
        if not isinstance(timesteps, NoiseLevel | Factors):
            checked_timesteps(scheduler, timesteps)
        return sample
    return sample / (1 + factors_like(scheduler, timesteps, sample).sigma ** 2).sqrt()


def factors_like(scheduler, timesteps, sample: Tensor, kind: Parameterization | None = None) -> Factors:
    """Returns the factors of shape (B, 1, ...), on the device and in the precision of `sample`, at least float32.

    The result can be passed to the functions of this module in place of the timesteps, for images of that shape. A
    scalar timestep gives (1, 1, ...). `kind` is part of the result, for callers that know it.
    """
    if isinstance(timesteps, Factors):
        return timesteps
    level = _level_of(scheduler, timesteps, sample)
    device, dtype, shape = sample.device, full_precision(sample.dtype), (-1,) + (1,) * (sample.ndim - 1)
    alpha = level.alpha.to(device, dtype, non_blocking=True).reshape(shape)
    sigma = level.sigma.to(device, dtype, non_blocking=True).reshape(shape)
    time = level.timesteps.to(device, dtype, non_blocking=True).reshape(shape) if is_affine(scheduler) else None
    return Factors(time, alpha, sigma, kind)


def _level_of(scheduler, timesteps, sample: Tensor) -> Factors | NoiseLevel:
    """Returns the factors of each image, (B,) or (1,)."""
    if isinstance(timesteps, NoiseLevel):
        level = timesteps
    elif (parts := looked_up(scheduler, timesteps)) is not None:
        level = Factors(*parts[:3])
    else:
        timesteps = checked_timesteps(scheduler, timesteps)
        parts = _from_table(scheduler, timesteps)
        found = (timesteps, *alpha_sigma(scheduler, timesteps)) if parts is None else parts[:3]
        level = Factors(*found)
    if (count := level.timesteps.shape[0]) not in (1, sample.shape[0]):
        raise ValueError(f"{count} timesteps for a batch of {len(sample)}: pass one per image, or a scalar")
    return level


def tensor_of(model_result, name: str = "model_output") -> Tensor:
    """Returns the tensor in a network's result, which may be a tensor, a tuple, a list or a diffusers output.

    Raises:
        TypeError: there is no tensor, or the result is a list with one tensor per image.
    """
    if isinstance(model_result, Tensor):
        return model_result
    if isinstance(model_result, list) and len(model_result) > 1 and isinstance(model_result[1], Tensor):
        raise TypeError(f"{name} is a list of {len(model_result)} tensors: pass torch.stack({name})")
    try:
        first = model_result[0]
    except (TypeError, KeyError, IndexError):
        first = None
    if not isinstance(first, Tensor):
        kind = type(model_result).__name__
        raise TypeError(f"{name} must be a tensor, a tuple with one first, or a diffusers output, not {kind}")
    return first


def refuse_zero_terminal_snr(scheduler) -> None:
    """Raises ValueError if the schedule ends in pure noise, where predicted noise does not determine x0_hat."""
    # Only these two options can make alpha 0. Reading the table makes a GPU wait, so other schedules skip it.
    asked_for = scheduler.config.get("rescale_betas_zero_snr") or scheduler.config.get("trained_betas") is not None
    if asked_for and scheduler.alphas_cumprod[-1] == 0:
        raise ValueError(
            "prediction_type='epsilon' cannot give x0_hat with zero terminal SNR, because alpha is 0 at the last step:"
            " use prediction_type='v_prediction', or rescale_betas_zero_snr=False"
        )


def refuse_own_noise(scheduler) -> None:
    """Raises ValueError for a scheduler class outside diffusers that defines its own noisy images or targets."""
    for name in ("add_noise", "scale_noise", "get_velocity", "scale_model_input"):
        method = getattr(type(scheduler), name, None)
        if method is not None and not method.__module__.startswith("diffusers."):
            raise ValueError(
                f"{type(scheduler).__name__} has its own {name}, which RegularizedLoss does not call: it computes"
                " x_t = alpha x_0 + sigma eps from the scheduler's tables. Use X0Regularization in your own loop"
            )
