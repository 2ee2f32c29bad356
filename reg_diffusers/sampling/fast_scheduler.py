"""The sampler of previews and measurements: deterministic, in tens of steps."""

from __future__ import annotations

from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from ..prediction import prediction_type

__all__ = ["fast_scheduler"]


def fast_scheduler(scheduler) -> DDIMScheduler | FlowMatchEulerDiscreteScheduler:
    """Creates a deterministic sampler for tens of steps, with the noise schedule and prediction type of `scheduler`.

    DDIM (Song et al. 2021, arXiv:2010.02502) with trailing timesteps, or Euler's method for flow matching.
    """
    if prediction_type(scheduler) == "flow_prediction":
        return FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    return DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing")
