"""Builds or loads the noise scheduler of a training run."""

from __future__ import annotations

from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from ..hub.model_index import MOST_TIMESTEPS, check_schedule
from ..prediction import prediction_type, refuse_zero_terminal_snr
from ..runtime.errors import UsageError
from ..settings.model import ModelSettings

__all__ = ["build_noise_scheduler", "given_scheduler"]


def build_noise_scheduler(settings: ModelSettings, given=None):
    """Returns the scheduler of the training: that of the given pipeline, or a new one from the flags.

    Args:
        settings: settings of the model.
        given: scheduler of the given pipeline, see `given_scheduler`; None for a new model.

    Raises:
        UsageError: if a flag contradicts the given pipeline, or if its schedule is invalid.
    """
    if given is not None:
        kind = prediction_type(given)
        if settings.prediction_type not in (None, kind):
            raise UsageError(
                f"--prediction_type {settings.prediction_type}: the given pipeline was trained with {kind};"
                " drop the flag"
            )
        for flag in ("ddpm_num_steps", "ddpm_beta_schedule", "rescale_betas_zero_snr"):
            if getattr(settings, flag):
                raise UsageError(f"--{flag}: the given pipeline keeps its own noise schedule; drop the flag")
        if problem := _problem_of_schedule(given):
            raise UsageError(f"--pretrained_model_name_or_path: its scheduler_config.json {problem}")
        if kind == "epsilon":
            try:
                refuse_zero_terminal_snr(given)
            except ValueError as error:
                raise UsageError(f"--pretrained_model_name_or_path: {error}") from None
        return given
    steps = settings.ddpm_num_steps or 1000
    if steps > MOST_TIMESTEPS:
        raise UsageError(f"--ddpm_num_steps {steps}: at most {MOST_TIMESTEPS:,}; 1000 is usual")
    if settings.prediction_type == "flow_prediction":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=steps)
    return DDPMScheduler(
        num_train_timesteps=steps,
        beta_schedule=settings.ddpm_beta_schedule or "linear",
        prediction_type=settings.prediction_type or "epsilon",
        rescale_betas_zero_snr=settings.rescale_betas_zero_snr,
        timestep_spacing="trailing" if settings.rescale_betas_zero_snr else "leading",
        clip_sample=settings.vae is None,  # latents are not limited to [-1, 1]
    )


def given_scheduler(path: str, cache_dir: str | None):
    """Loads the saved schedule as a training scheduler, because a pipeline may be saved with any sampler."""
    try:
        config = DDPMScheduler.load_config(path, subfolder="scheduler", cache_dir=cache_dir)
    except OSError:  # beside the index, in pipelines of the first versions of diffusers
        config = DDPMScheduler.load_config(path, cache_dir=cache_dir)
    check_schedule(config)
    if "prediction_type" not in config and "shift" in config:
        return FlowMatchEulerDiscreteScheduler.from_config(config)
    return DDPMScheduler.from_config(config)


def _problem_of_schedule(scheduler) -> str | None:
    """Describes a problem of the noise levels of a given scheduler; None if there is none."""
    levels = scheduler.config.num_train_timesteps
    if levels < 2:
        return "has a single noise level, but sampling needs at least 2"
    betas = getattr(scheduler, "betas", None)
    if betas is None:
        return None
    if len(betas) != levels:
        return f"has {len(betas)} trained_betas for {levels} num_train_timesteps: they must agree"
    if not (betas.isfinite().all() and betas.min() >= 0 and betas.max() <= 1):
        return f"has betas from {betas.min():.3g} to {betas.max():.3g}: they must be from 0 to 1"
    return None
