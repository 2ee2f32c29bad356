r"""The training objective: a denoising loss with extra losses on x0_hat.

    L = mean ||o - target||^2 + sum_k weight_k mean_i [ lambda_k(t_i) L'_k(x0_hat_i) ]

It uses one timestep per image and one network call (Ho et al. 2020, Algorithm 1). Data flow, with the names used
everywhere:

    original_samples, noise, timesteps -> noisy_samples -> model_output -> x0_hat -> L'_k (B,) -> terms -> loss

`RegularizedLoss` is the whole objective; `X0Regularization` is the extra part alone, for an existing training loop.
Both take the network as an argument and do not store it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .context import unwrap
from .estimators import Prediction
from .inputs import checked_scheduler, one_per_image, refuse_other_images, refuse_unknown
from .loss_output import Denoising, LossOutput, alias
from .precision import full_precision, input_dtype, version_of
from .prediction import (
    NoiseLevel,
    factors_like,
    output_weight,
    prediction_type,
    refuse_own_noise,
    refuse_zero_terminal_snr,
    scale_model_input,
    tensor_of,
    without_learned_variance,
)
from .regularization import X0Regularization
from .schedule import FirstTimesteps, is_edm, unit_of_time
from .term import Term, TermError

__all__ = ["LossOutput", "RegularizedLoss", "Term", "TermError", "X0Regularization", "draw_timesteps"]
__all__ += ["timesteps_of_training"]


class RegularizedLoss(nn.Module):
    """Computes the whole objective for one batch of clean images: the denoising loss plus the `Term`s.

        loss_fn = RegularizedLoss(noise_scheduler, [Term(total_variation, weight=0.1)])
        loss_fn(model, original_samples).loss.backward()

    Without terms and weighting, the loss is `F.mse_loss(model_output, target)`, bit for bit.

    Args:
        scheduler: a diffusers noise scheduler; its prediction_type determines the network's target. An
            `AffineSchedule` also weights the denoising loss, by its denoising_weight.
        terms: the extra losses.
        snr_gamma: weight the denoising loss by min(SNR, gamma) in x_0 units (Hang et al. 2023, arXiv:2303.09556).
        loss_weighting: weight the denoising loss by a factor of each image's ||o - target||^2, `NoiseLevel -> (B,)`,
            see `loss_weighting`. `matched` follows it.
        max_nonfinite_steps: as in `X0Regularization`.
        section: returns a context manager that surrounds the extra losses, such as a profiler's.

    Attributes:
        regularization: the extra part of the loss.
        section: as given.

    Raises:
        TypeError: `terms` is not a sequence of `Term`.
        ValueError: `snr_gamma` is combined with `loss_weighting`, or with noise prediction and zero terminal SNR; the
            scheduler is a class outside diffusers with its own noisy images or targets; or the names of the terms are
            not distinct.
    """

    def __init__(
        self,
        scheduler,
        terms: Iterable[Term] = (),
        *,
        snr_gamma: float | None = None,
        loss_weighting: Callable[[NoiseLevel], Tensor] | None = None,
        max_nonfinite_steps: int | None = 10,
        section: Callable[[], AbstractContextManager] = nullcontext,
    ):
        super().__init__()
        checked_scheduler(scheduler)
        if snr_gamma is not None and prediction_type(scheduler) == "epsilon":
            refuse_zero_terminal_snr(scheduler)
        refuse_own_noise(scheduler)
        if snr_gamma is not None and loss_weighting is not None:
            raise ValueError("snr_gamma and loss_weighting both set the weight of the denoising loss: pass only one")
        self.scheduler = scheduler
        self.loss_weighting = loss_weighting
        self.snr_gamma = snr_gamma
        self.section = section
        self._first_timesteps = FirstTimesteps()
        self.regularization = X0Regularization(
            scheduler, terms, snr_gamma=snr_gamma, max_nonfinite_steps=max_nonfinite_steps
        )

    def forward(
        self,
        model,
        original_samples: Tensor,
        *,
        noise: Tensor | None = None,
        timesteps: Tensor | None = None,
        model_kwargs: dict | None = None,
        image_mask: Tensor | None = None,
        training_step: int | None = None,
        **context,
    ) -> LossOutput:
        """Computes the objective at one random noise level per image, with one network call.

        Args:
            model: `(noisy_samples, timesteps, **model_kwargs)` -> a tensor, a tuple or a diffusers output.
            original_samples: (B, C, H, W) images in [-1, 1]. The network receives x_t in the dtype of its weights.
            noise: (B, C, H, W). Default: standard normal.
            timesteps: (B,). Default: uniform over the training schedule, drawn on the CPU.
            model_kwargs: further arguments of the network, such as `class_labels`.
            image_mask: (B,) bool, images on which the terms act, see `X0Regularization.forward`; the denoising loss
                uses all images.
            training_step: number of optimizer steps so far, for terms with a schedule.
            **context: arguments listed in the regularizers' `needs`; `original_samples`, `noise` and `timesteps` are
                passed on automatically. `original_images` as in `X0Regularization.forward`.

        Returns:
            The loss and its parts, "denoising" first.

        Raises:
            TypeError: a keyword is in the `needs` of no term, or `original_samples` is not a floating-point tensor.
            ValueError: a timestep is out of the scheduler's range, a term has a schedule and `training_step` is
                missing, the batch is empty, or `noise` has another shape.
            TermError: a regularizer, weighting, view or estimator violates its contract.
            FloatingPointError: L' was non-finite for `max_nonfinite_steps` steps in a row.
        """
        regularization, scheduler = self.regularization, self.scheduler
        refuse_unknown(context, regularization.used)
        refuse_other_images(original_samples, noise)
        batch_size = original_samples.shape[0]
        if noise is None:
            noise = torch.randn_like(original_samples)
        if timesteps is None:
            timesteps = draw_timesteps(scheduler, batch_size)
        timesteps = one_per_image(timesteps, batch_size)
        self._first_timesteps.check(scheduler, timesteps)
        level, factor, known, kind = regularization.table.at(timesteps)
        at = factors_like(scheduler, level, original_samples, kind)
        noisy_samples = at.alpha * original_samples + at.sigma * noise
        model_input = scale_model_input(scheduler, noisy_samples, at)
        on_device = timesteps.to(original_samples.device, non_blocking=True)
        model_input = model_input.to(input_dtype(model, original_samples))
        keywords = unwrap(model_kwargs) if model_kwargs else {}
        model_output = alias(tensor_of(model(model_input, on_device, **keywords)))
        target = kind.target(original_samples, noise, at)
        if self.loss_weighting is not None:
            weight = level.denoising_weight * self.loss_weighting(level)
            factor = weight / output_weight(scheduler, level)
            level, known = level.weighted_by(weight), {}
        denoising = self._denoising(model_output, target, factor)
        prediction = Prediction(
            scheduler, model_output, timesteps, noisy_samples, model, model_kwargs, noise, original_samples
        )
        context["original_samples"] = original_samples
        with self.section():
            return regularization.at_level(
                level,
                prediction,
                context,
                known,
                denoising=denoising,
                # Timesteps may be more precise than the float32 of a noise level.
                at=None if noisy_samples.dtype == torch.float64 else at,
                image_mask=image_mask,
                training_step=training_step,
            )

    def _denoising(self, model_output: Tensor, target: Tensor, factor: Tensor | None) -> Denoising:
        """Computes the denoising loss.

        Args:
            model_output, target: (B, C, ...).
            factor: (B,) factor of each image's squared error; None: 1, and not multiplied.
        """
        model_output = without_learned_variance(self.scheduler, model_output, target)
        model_output = model_output.to(full_precision(target.dtype))
        target = target.to(model_output.dtype)
        if factor is None:
            count = target.shape[0]
            return Denoising(F.mse_loss(model_output, target), _errors_later(model_output, target), count)
        squared_error = F.mse_loss(model_output, target, reduction="none").flatten(1).mean(1)
        per_image = factor.to(squared_error, non_blocking=True) * squared_error
        return Denoising(per_image.mean(), per_image.detach, per_image.shape[0])


def _errors_later(model_output: Tensor, target: Tensor) -> Callable[[], Tensor]:
    """Returns a function that computes the mean squared error of each image, (B,), without gradient."""
    versions = [version_of(tensor) for tensor in (model_output, target)]

    @torch.no_grad()
    def errors() -> Tensor:
        if versions != [version_of(tensor) for tensor in (model_output, target)]:
            raise RuntimeError("per_image was read after the images, noise or output of its step were overwritten")
        return F.mse_loss(model_output, target, reduction="none").flatten(1).mean(1)

    return errors


def draw_timesteps(scheduler, batch_size: int, density: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Draws training timesteps over the training schedule, on the CPU; uniformly by default.

    On the CPU, computations on timesteps alone never wait for an accelerator. For flow matching, sigma is drawn from
    {1/T, ..., 1} and shifted as in the scheduler's own training schedule.

    Args:
        scheduler: the noise scheduler used in training.
        batch_size: B, one timestep for each image.
        density: maps uniform quantiles to positions in the schedule, both in [0, 1], see `loss_weighting`.

    Returns:
        (B,) integers, or for flow matching floats in the scheduler's unit.

    Raises:
        ValueError: the scheduler has no training schedule, or `density` leaves [0, 1].
    """
    if unit_of_time(scheduler) in ("angle", "own") or is_edm(scheduler):
        raise ValueError(f"{type(scheduler).__name__} has no training schedule to draw timesteps from: pass timesteps")
    if density is not None:
        return timesteps_of_training(scheduler, torch.rand(batch_size), density)
    return _of_schedule(scheduler, torch.randint(0, scheduler.config.num_train_timesteps, (batch_size,)))


def timesteps_of_training(scheduler, quantiles: Tensor, density: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Returns quantiles of the distribution of `draw_timesteps`, for evenly spread timesteps without randomness.

    Args:
        scheduler: the noise scheduler used in training.
        quantiles: (N,) in [0, 1).
        density: as in `draw_timesteps`.

    Raises:
        ValueError: the scheduler has no training schedule.
    """
    draw_timesteps(scheduler, 0)  # raises without a training schedule
    steps = scheduler.config.num_train_timesteps
    places = quantiles if density is None else density(quantiles)
    if not ((places >= 0) & (places <= 1)).all():  # False for nan
        raise ValueError("density must map quantiles from 0 to 1 to positions in the schedule from 0 to 1")
    return _of_schedule(scheduler, (places * steps).long().clamp(0, steps - 1))


def _of_schedule(scheduler, indices: Tensor) -> Tensor:
    """Returns the timesteps at these positions of the training schedule, (N,)."""
    steps = scheduler.config.num_train_timesteps
    if prediction_type(scheduler) != "flow_prediction":
        return indices
    sigma = (indices + 1) / steps
    if not scheduler.config.get("use_dynamic_shifting"):
        shift = scheduler.config.get("shift", 1.0)
        sigma = shift * sigma / (1 + (shift - 1) * sigma)
    return sigma * steps
