"""The schedulers that can sample from a model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from ..pipeline import RegDDPMPipeline
from ..prediction import output_for_step, prediction_type
from ..runtime.messages import detail

__all__ = ["fitting_samplers"]

_SAMPLERS = {
    "DDIM": DDIMScheduler,
    "DDPM": DDPMScheduler,
    "Euler": EulerDiscreteScheduler,
    "DPM-Solver++": DPMSolverMultistepScheduler,
    "UniPC": UniPCMultistepScheduler,
}
_FLOW_SAMPLERS = {
    "Euler": FlowMatchEulerDiscreteScheduler,
    "DPM-Solver++": DPMSolverMultistepScheduler,
    "UniPC": UniPCMultistepScheduler,
}


def fitting_samplers(pipeline: RegDDPMPipeline) -> dict[str, Callable]:
    """Returns functions that create compatible schedulers for a pipeline, by name.

    Each new scheduler has the noise schedule and prediction type of the pipeline's. The first is that of
    `pipeline.fast_scheduler`. All use trailing timesteps, so every sampler starts at the last noise level. A scheduler
    of another family can only be used as it is.

    Raises:
        ValueError: the pipeline's scheduler is not supported.
    """
    scheduler, config = pipeline.scheduler, pipeline.scheduler.config
    if prediction_type(scheduler) == "flow_prediction":
        makers = {name: partial(_flow_sampler, kind, scheduler) for name, kind in _FLOW_SAMPLERS.items()}
    elif "beta_schedule" in config:
        makers = {
            name: partial(kind.from_config, config, timestep_spacing="trailing") for name, kind in _SAMPLERS.items()
        }
    else:
        makers = {}
    fitting = {name: make for name, make in makers.items() if _takes_output_of(pipeline, make())}
    own_name = type(scheduler).__name__.removesuffix("Scheduler")
    return fitting or {own_name: partial(type(scheduler).from_config, config)}


def _flow_sampler(kind: type, scheduler):
    config = scheduler.config
    if kind is type(scheduler):
        return kind.from_config(config)
    steps, shift = config.num_train_timesteps, config.get("shift", config.get("flow_shift", 1.0))
    if kind is FlowMatchEulerDiscreteScheduler:
        return kind(steps, shift=shift)
    return kind(steps, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def _takes_output_of(pipeline: RegDDPMPipeline, sampler) -> bool:
    """Whether a sampler accepts the network's output. A trial step is needed, as some fail only during sampling."""
    outputs = pipeline._channels * (2 if pipeline.learns_variance else 1)
    output, sample = torch.zeros(1, outputs, 2, 2), torch.zeros(1, pipeline._channels, 2, 2)
    pipeline.with_parts(scheduler=sampler).set_timesteps(2)
    t = sampler.timesteps[0]
    if hasattr(sampler, "scale_model_input"):  # Euler warns without it
        sampler.scale_model_input(sample, t)
    try:
        output = output_for_step(sampler, output, sample)
        return sampler.step(output, t, sample).prev_sample.shape == sample.shape
    except (NotImplementedError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        detail(f"samplers    {type(sampler).__name__} cannot draw from this model: {reason}")
        return False
