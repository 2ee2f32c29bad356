"""Describes the effect of the terms of a loss at the noise levels of a loop, one line per term."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .prediction import NoiseLevel
from .term import Term, checked_weights
from .weight_rules import rule_of

__all__ = ["describe"]


def describe(
    terms: Sequence[Term],
    level_of: Callable[[Tensor, Tensor | None], NoiseLevel],
    timesteps,
    loss_weight: Tensor | float | None,
) -> str:
    """Describes the terms of a loss, see `X0Regularization.describe`.

    Args:
        terms: terms of the loss.
        level_of: function that returns the noise level for timesteps (N,) and loss weights, (N,) or None.
        timesteps: timesteps that the loop draws, (N,), or (S, B) for S steps.
        loss_weight: weight of the loop's own loss, of the same shape, a number, or None.
    """
    timesteps = torch.as_tensor(timesteps)
    steps = timesteps.reshape(-1, 1) if timesteps.ndim < 2 else timesteps.flatten(1)
    if loss_weight is not None:
        loss_weight = torch.as_tensor(loss_weight, dtype=torch.float32).expand(timesteps.shape).reshape(-1)
    level = level_of(steps.reshape(-1), loss_weight)
    return "\n".join(_line(term, level, steps.shape[1]) for term in terms)


def _line(term: Term, level: NoiseLevel, batch_size: int) -> str:
    weights = checked_weights(term, level)
    active = weights != 0
    if not active.any():
        return f"{term.name}: no image takes part at these timesteps"
    without = 1 - active.reshape(-1, batch_size).any(1).float().mean().item()
    is_ruled = rule_of(term.weight).is_measured
    factor = "" if is_ruled else "weight * "
    ratio = (1.0 if is_ruled else term.weight) * weights[active] / level.denoising_weight[active]
    over_training = "" if term.schedule is None else ", times the factor of its schedule"
    images = "1 image" if batch_size == 1 else f"{batch_size} images"
    return (
        f"{term.name}: {active.float().mean().item():.1%} of the images take part, none in {without:.1%} of the steps"
        f" of {images}; {factor}lambda / w_d from {ratio.min().item():.3g} to {ratio.max().item():.3g}{over_training}"
    )
