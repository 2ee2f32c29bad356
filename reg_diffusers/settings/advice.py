"""Warns of settings with an unexpected effect on the training, one line on stderr each."""

from __future__ import annotations

import torch

from ..prediction import learns_variance, noise_level, prediction_type
from ..runtime.errors import warn
from .optimization import OptimizationSettings

__all__ = ["advise", "advise_on_warmup"]


def advise(snr_gamma: float | None, noise_scheduler) -> None:
    """Warns of loss settings with an effect that is easily overlooked."""
    if prediction_type(noise_scheduler) == "sample" and snr_gamma is None:
        warn(
            "--prediction_type sample: the denoising loss is ||x0 - x0_hat||^2; train_unconditional.py of diffusers"
            " weights it by the signal-to-noise ratio: pass --snr_gamma 1e9 for that"
        )
    if snr_gamma is not None and _last_snr(noise_scheduler) == 0:
        warn(
            "--snr_gamma: this schedule ends in pure noise (SNR 0), where the loss has weight 0, so the first step of"
            " sampling is not trained: drop --snr_gamma, or use a schedule without zero terminal SNR"
        )

    if learns_variance(noise_scheduler.config):
        warn(
            "--pretrained_model_name_or_path: the learned variance of this network is not trained, only the image half"
            " of its output: sample with a scheduler that ignores the variance, such as DDIM"
        )


def advise_on_warmup(settings: OptimizationSettings, max_train_steps: int) -> None:
    """Warns if the training ends before --learning_rate is reached."""
    if settings.lr_scheduler != "constant" and settings.lr_warmup_steps >= max_train_steps:
        reached = settings.learning_rate * max_train_steps / settings.lr_warmup_steps
        steps = f"{max_train_steps:,} step{'s' * (max_train_steps != 1)}"
        warn(
            f"--lr_warmup_steps {settings.lr_warmup_steps}: the training has {steps}, so the learning rate only rises"
            f" to {reached:.2g} of {settings.learning_rate:g}: pass --lr_warmup_steps {max_train_steps // 10}, or"
            " train longer"
        )


def _last_snr(noise_scheduler) -> float:
    """The signal-to-noise ratio at the noisiest timestep."""
    steps = noise_scheduler.config.num_train_timesteps
    last = steps if prediction_type(noise_scheduler) == "flow_prediction" else steps - 1
    return noise_level(noise_scheduler, torch.tensor([last])).snr.item()
