r"""The parameterization of a noise scheduler, seen as one affine map from model output to image.

Every diffusers scheduler corrupts an image by

    x_t = alpha_t x_0 + sigma_t eps,        eps ~ N(0, I),        SNR(t) = alpha_t^2 / sigma_t^2,

every network output o is an affine image of (x_0, x_t), and the estimate of the clean image is therefore

    x0_hat = skip_t x_t + out_t o.

| prediction_type | o predicts                | x0_hat                  | weight w_d in x_0 units |
|-----------------|---------------------------|-------------------------|-------------------------|
| epsilon         | eps                       | (x_t - sigma o) / alpha | SNR                     |
| sample          | x_0                       | o                       | 1                       |
| v_prediction    | alpha eps - sigma x_0     | alpha x_t - sigma o     | SNR + 1                 |
| flow_prediction | eps - x_0                 | x_t - sigma o           | 1 / sigma^2             |

The weight of the loss |o - target|^2 is w_d = 1 / out_t^2 because o - target = (x0_hat - x_0) / out_t. It is what an
extra loss on x0_hat competes with, so weightings (see `weighting`) are built on it.

Coordinates are those of the scheduler's own `step`: (alpha, sigma) = (sqrt(abar_t), sqrt(1 - abar_t)) for DDPM, DDIM,
DPM-Solver++, UniPC and their kind, (1, sigma) for the Euler, Heun, LMS and K-diffusion family, (1 - sigma, sigma) for
flow matching. The last three families look a timestep up in the schedule made by `set_timesteps`, so that Karras and
other respaced schedules are exact; a timestep that is not in it falls back on the training schedule.

Sources: Ho et al. 2020 (arXiv:2006.11239) eq. 4 and 15; Salimans & Ho 2022 (arXiv:2202.00512) sec. 4 and app. D for v
and the weights; Karras et al. 2022 (arXiv:2206.00364) eq. 7 for the EDM preconditioning; Lipman et al. 2023
(arXiv:2210.02747) for flow matching.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "NoiseLevel",
    "add_noise",
    "model_output_for",
    "noise_level",
    "predict_original_sample",
    "prediction_target",
    "prediction_type",
    "refuse_zero_terminal_snr",
    "scale_model_input",
    "without_learned_variance",
]

_PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction", "trigflow")


@dataclass(frozen=True)
class NoiseLevel:
    """How noisy each image of a batch is: five float32 tensors of shape (B,) on the device of the timesteps.

    Attributes:
        timesteps: the timesteps t, as numbers.
        alpha: factor of the image in x_t = alpha x_0 + sigma eps.
        sigma: factor of the noise.
        snr: alpha^2 / sigma^2; infinite where sigma is 0.
        denoising_weight: w_d, the weight that the denoising loss ||o - target||^2 has in units of ||x_0 - x0_hat||^2.
    """

    timesteps: Tensor
    alpha: Tensor
    sigma: Tensor
    snr: Tensor
    denoising_weight: Tensor


def prediction_type(scheduler) -> str:
    """What the network predicts, in diffusers' words: epsilon, sample, v_prediction, flow_prediction (or trigflow).

    Raises:
        ValueError: the scheduler's `prediction_type` is none of these, or it has no schedule for it.
    """
    declared = scheduler.config.get("prediction_type")
    if declared is None and hasattr(scheduler, "alphas_cumprod"):  # RePaint, for one, predicts nothing but noise
        return "epsilon"
    if declared is None and "shift" in scheduler.config:  # flow-matching schedulers have no such entry
        return "flow_prediction"
    declared = {"original_sample": "sample"}.get(declared, declared)
    name = type(scheduler).__name__
    if declared not in _PREDICTION_TYPES:
        known = ", ".join(_PREDICTION_TYPES)
        raise ValueError(f"prediction_type={declared!r} of {name} is not supported; known: {known}")
    if declared == "flow_prediction" and not ("shift" in scheduler.config or scheduler.config.get("use_flow_sigmas")):
        raise ValueError(
            f"{name} has no flow-matching schedule: use FlowMatchEulerDiscreteScheduler, or use_flow_sigmas=True"
        )
    has_schedule = hasattr(scheduler, "alphas_cumprod") or _is_edm(scheduler)
    if declared not in ("flow_prediction", "trigflow") and not has_schedule:
        raise ValueError(f"{name} is not supported: it has no alphas_cumprod")
    return declared


def noise_level(scheduler, timesteps) -> NoiseLevel:
    """The noise level of each timestep. `add_noise` and its kind take it in place of the timesteps.

    Args:
        scheduler: any diffusers scheduler of the families named in the module's docstring.
        timesteps: (B,) integers or floats as the scheduler counts them; a scalar counts as (1,).

    Raises:
        ValueError: the scheduler belongs to none of these families.
    """
    timesteps = torch.as_tensor(timesteps).reshape(-1)
    alpha, sigma = _alpha_sigma(scheduler, timesteps)
    snr = (alpha / sigma) ** 2
    kind = prediction_type(scheduler)
    if _is_edm(scheduler):
        denoising_weight = 1 / _edm_preconditioning(scheduler, sigma)[1] ** 2
    elif kind == "epsilon":
        denoising_weight = snr
    elif kind == "sample":
        denoising_weight = torch.ones_like(snr)
    elif kind == "v_prediction":
        denoising_weight = snr + 1
    else:
        denoising_weight = 1 / sigma**2
    return NoiseLevel(*(part.float() for part in (timesteps, alpha, sigma, snr, denoising_weight)))


def predict_original_sample(scheduler, model_output: Tensor, timesteps, sample: Tensor) -> Tensor:
    """The image x0_hat that a model output stands for: `scheduler.step(...).pred_original_sample`, for a whole batch.

    Unlike `step` it takes one timestep per image, draws no noise, never clips, changes no state and is differentiable
    in `model_output` and `sample`. Its formula is in the table of the module's docstring.

    Args:
        scheduler: a diffusers scheduler.
        model_output: (B, C, ...) what the network returned; (B, 2C, ...) with a learned variance, which is left out.
        timesteps: (B,), or a scalar for the whole batch.
        sample: (B, C, ...) the noisy x_t, in the coordinates of `scheduler.step` (before `scale_model_input`).

    Returns:
        (B, C, ...) in float32, or float64 if an input is float64.

    Raises:
        ValueError: noise prediction with zero terminal SNR, or shapes that do not fit.
    """
    kind = prediction_type(scheduler)
    if kind == "epsilon":
        refuse_zero_terminal_snr(scheduler)
    model_output = without_learned_variance(scheduler, model_output, sample)
    dtype = torch.promote_types(torch.promote_types(model_output.dtype, sample.dtype), torch.float32)
    model_output, sample = model_output.to(dtype), sample.to(dtype)
    alpha, sigma = _alpha_sigma_like(scheduler, timesteps, sample)
    if _is_edm(scheduler):
        skip, out = _edm_preconditioning(scheduler, sigma)
        return skip * sample + out * model_output
    if kind == "epsilon":
        return (sample - sigma * model_output) / alpha
    if kind == "sample":
        return model_output
    if kind == "flow_prediction":
        return sample - sigma * model_output
    if not _is_variance_exploding(scheduler):
        return alpha * sample - sigma * model_output
    # v is defined on the circle alpha^2 + sigma^2 = 1, to which (1, sigma) is scaled first.
    variance = 1 + sigma**2
    return sample / variance - sigma / variance.sqrt() * model_output


def model_output_for(scheduler, x0_hat: Tensor, timesteps, sample: Tensor) -> Tensor:
    """The model output that stands for an image: the inverse of `predict_original_sample` in its model_output.

    It is what the network should have said for x0_hat and the noise that x0_hat leaves of x_t, eps = (x_t - alpha
    x0_hat) / sigma.

    Args:
        scheduler: a diffusers scheduler.
        x0_hat: (B, C, ...).
        timesteps: (B,), or a scalar for the whole batch; noise levels above 0.
        sample: (B, C, ...) the noisy x_t.
    """
    alpha, sigma = _alpha_sigma_like(scheduler, timesteps, sample)
    return prediction_target(scheduler, x0_hat, (sample - alpha * x0_hat) / sigma, timesteps)


def prediction_target(scheduler, original_samples: Tensor, noise: Tensor, timesteps) -> Tensor:
    """What the network should output for x_t = alpha x_0 + sigma eps, so that x0_hat = x_0.

    Args:
        scheduler: a diffusers scheduler.
        original_samples: (B, C, ...) the images x_0.
        noise: (B, C, ...) eps.
        timesteps: (B,), or a scalar for the whole batch; or their `NoiseLevel`.

    Returns:
        (B, C, ...): eps, x_0, alpha eps - sigma x_0 or eps - x_0 by `prediction_type`.
    """
    kind = prediction_type(scheduler)
    if _is_edm(scheduler):
        _, sigma = _alpha_sigma_like(scheduler, timesteps, original_samples)
        skip, out = _edm_preconditioning(scheduler, sigma)
        return (original_samples - skip * (original_samples + sigma * noise)) / out
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return original_samples
    if kind == "flow_prediction":
        return noise - original_samples
    alpha, sigma = _alpha_sigma_like(scheduler, timesteps, original_samples)
    target = alpha * noise - sigma * original_samples
    return target / (1 + sigma**2).sqrt() if _is_variance_exploding(scheduler) else target


def add_noise(scheduler, original_samples: Tensor, noise: Tensor, timesteps) -> Tensor:
    """The noisy image x_t = alpha x_0 + sigma eps, for every family (flow-matching schedulers lack `add_noise`).

    Args:
        scheduler: a diffusers scheduler.
        original_samples: (B, C, ...) the images x_0.
        noise: (B, C, ...) eps.
        timesteps: (B,), or a scalar for the whole batch; or their `NoiseLevel`.
    """
    alpha, sigma = _alpha_sigma_like(scheduler, timesteps, original_samples)
    return alpha * original_samples + sigma * noise


def scale_model_input(scheduler, sample: Tensor, timesteps) -> Tensor:
    """What the network is shown of x_t: `scheduler.scale_model_input` with one timestep per image and no state.

    The identity except in Euler's coordinates, where x_t / sqrt(1 + sigma^2) has the scale that networks are trained
    on (EDM: x_t / sqrt(sigma_data^2 + sigma^2)).

    Args:
        scheduler: a diffusers scheduler.
        sample: (B, C, ...) the noisy x_t.
        timesteps: (B,), or a scalar for the whole batch; or their `NoiseLevel`.
    """
    if _is_edm(scheduler):
        _, sigma = _alpha_sigma_like(scheduler, timesteps, sample)
        return sample / (sigma**2 + scheduler.config.sigma_data**2).sqrt()
    if not _is_variance_exploding(scheduler):
        return sample
    _, sigma = _alpha_sigma_like(scheduler, timesteps, sample)
    return sample / (1 + sigma**2).sqrt()


def _alpha_sigma_like(scheduler, timesteps, sample: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) shaped (B, 1, ...) with device and precision of `sample`; a scalar timestep gives (1, 1, ...)."""
    if isinstance(timesteps, NoiseLevel):
        factors = timesteps.alpha, timesteps.sigma
    else:
        factors = _alpha_sigma(scheduler, torch.as_tensor(timesteps).reshape(-1))
    if len(factors[0]) not in (1, len(sample)):
        raise ValueError(f"{len(factors[0])} timesteps for a batch of {len(sample)}: one per image, or a scalar")
    shape = (-1,) + (1,) * (sample.ndim - 1)
    dtype = torch.promote_types(sample.dtype, torch.float32)
    return tuple(factor.to(sample.device, dtype, non_blocking=True).reshape(shape) for factor in factors)


def _alpha_sigma(scheduler, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma), each (B,) on the device of `timesteps`, in the precision of the scheduler's tables."""
    kind = prediction_type(scheduler)
    if kind == "trigflow":  # SCM counts time as the angle: x_t = cos(t) x_0 + sin(t) eps
        angle = timesteps.float()
        return angle.cos(), angle.sin()
    if _is_edm(scheduler):  # timesteps are c_noise = log(sigma) / 4
        sigma = _scheduled_sigma(scheduler, timesteps, otherwise=(4 * timesteps.float()).exp())
        return torch.ones_like(sigma), sigma
    if kind == "flow_prediction":
        sigma = timesteps.float() / scheduler.config.num_train_timesteps
        if hasattr(scheduler, "alphas_cumprod"):  # DPM-Solver++, UniPC: their flow timesteps are rounded to integers
            sigma = _scheduled_sigma(scheduler, timesteps, otherwise=sigma)
        return 1 - sigma, sigma
    if hasattr(scheduler, "sigmas"):
        ratio = _scheduled_sigma(scheduler, timesteps, otherwise=_trained_sigma(scheduler, timesteps))
        if _is_variance_exploding(scheduler):
            return torch.ones_like(ratio), ratio
        if getattr(scheduler, "num_inference_steps", None) is not None:
            alpha = 1 / (ratio**2 + 1) ** 0.5
            return alpha, ratio * alpha
    alpha_bar = _alpha_bar(scheduler, timesteps)
    return alpha_bar**0.5, (1 - alpha_bar) ** 0.5


def _alpha_bar(scheduler, timesteps: Tensor) -> Tensor:
    table = scheduler.alphas_cumprod.to(timesteps.device)
    index = timesteps.long()
    steps = getattr(scheduler, "num_inference_steps", None)
    if type(scheduler).__name__ == "DDIMInverseScheduler" and steps is not None:
        # `step` moves from the level before t to t, so that the sample given to it is one step less noisy than t.
        index = (index - scheduler.config.num_train_timesteps // steps).clamp(max=len(table) - 1)
        return torch.where(index < 0, scheduler.initial_alpha_cumprod.to(table), table[index.clamp(min=0)])
    return table[index]


def _trained_sigma(scheduler, timesteps: Tensor) -> Tensor:
    """sigma / alpha of the training schedule, log-linear between its integer timesteps."""
    if scheduler.config.get("timestep_type") == "continuous" and prediction_type(scheduler) == "v_prediction":
        return (4 * timesteps.float()).exp()  # Euler then counts as EDM does
    alpha_bar = scheduler.alphas_cumprod.to(timesteps.device, torch.float32)
    sigma = ((1 - alpha_bar) / alpha_bar) ** 0.5
    low = timesteps.float().floor().clamp(0, len(sigma) - 1)
    fraction = timesteps.float() - low
    low = low.long()
    high = (low + 1).clamp(max=len(sigma) - 1)
    return torch.where(fraction == 0, sigma[low], sigma[low] ** (1 - fraction) * sigma[high] ** fraction)


def _scheduled_sigma(scheduler, timesteps: Tensor, otherwise: Tensor) -> Tensor:
    """`scheduler.sigmas` at the place that each timestep has in `scheduler.timesteps`; elsewhere `otherwise`."""
    if getattr(scheduler, "num_inference_steps", None) is None:
        return otherwise
    # Second-order solvers interleave inner evaluations at odd places, whose sigma is not the one listed there.
    places = slice(None, None, getattr(scheduler, "order", 1))
    schedule = scheduler.timesteps[places].to(timesteps.device)
    sigmas = scheduler.sigmas[: len(scheduler.timesteps)][places].to(timesteps.device, torch.float32)
    same = timesteps[:, None] == schedule
    return torch.where(same.any(1), sigmas[same.int().argmax(1)], otherwise)


def _is_variance_exploding(scheduler) -> bool:
    """Whether `step` works on x_0 + sigma eps (Euler, Heun, LMS, K-diffusion) rather than on alpha x_0 + sigma eps."""
    has_own_scale = hasattr(scheduler, "alphas_cumprod") and hasattr(scheduler, "sigmas")
    return has_own_scale and float(scheduler.init_noise_sigma) != 1.0


def _is_edm(scheduler) -> bool:
    return hasattr(scheduler, "precondition_outputs")


def _edm_preconditioning(scheduler, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out) of Karras et al. 2022, table 1."""
    sigma_data = scheduler.config.sigma_data
    variance = sigma**2 + sigma_data**2
    out = sigma * sigma_data / variance**0.5
    return sigma_data**2 / variance, -out if prediction_type(scheduler) == "v_prediction" else out


def without_learned_variance(scheduler, model_output: Tensor, sample: Tensor) -> Tensor:
    """The part of a model output that stands for the image, in the shape of `sample`.

    Raises:
        ValueError: the shapes do not fit.
    """
    learned = str(scheduler.config.get("variance_type")).startswith("learned")
    if learned and model_output.ndim > 1 and model_output.shape[1] == 2 * sample.shape[1]:
        model_output = model_output[:, : sample.shape[1]]
    if model_output.shape != sample.shape:
        raise ValueError(f"model_output has shape {tuple(model_output.shape)}, sample {tuple(sample.shape)}")
    return model_output


def refuse_zero_terminal_snr(scheduler) -> None:
    """Raises ValueError where the schedule ends in pure noise, of which predicted noise says nothing."""
    # Only a schedule that was asked for can reach zero; the others are spared the look, for which a GPU would wait.
    asked_for = scheduler.config.get("rescale_betas_zero_snr") or scheduler.config.get("trained_betas") is not None
    if asked_for and scheduler.alphas_cumprod[-1] == 0:
        raise ValueError(
            "prediction_type='epsilon' cannot give x0_hat with zero terminal SNR, where alpha is 0 at the last step:"
            " use prediction_type='v_prediction', or rescale_betas_zero_snr=False"
        )
