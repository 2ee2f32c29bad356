"""Limits the number of sampling steps to the number of noise levels of a schedule."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["available_steps"]


def available_steps(scheduler, steps: int, tell: Callable[[str], object], name: str = "num_inference_steps") -> int:
    """Returns `steps`, but at most the number of noise levels of the schedule.

    Args:
        scheduler: a diffusers scheduler, with `num_train_timesteps` in its config.
        steps: requested number of network calls.
        tell: called with one line if the result is smaller than `steps`.
        name: name of the argument or flag in that line.
    """
    levels = scheduler.config.get("num_train_timesteps")
    if levels is None or steps <= levels:
        return steps
    tell(f"{name} {steps}: the schedule has only {levels} noise levels; using {levels} steps")
    return levels
