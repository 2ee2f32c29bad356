"""One extra loss, `Term`: a regularizer with its weight in the objective.

The checks of a regularizer's contract live here too, because training and guidance hold it to the same one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .prediction import NoiseLevel, predict_original_sample
from .regularizers import Regularizer, regularizer_name
from .weighting import matched

__all__ = ["Term", "TermError", "checked_values", "checked_weights", "term_context"]


@dataclass(frozen=True)
class Term:
    """One extra loss: weight * mean_i [ weighting(t_i) * regularizer(x0_hat_i) ].

    Attributes:
        regularizer: (B, C, H, W) in [-1, 1] -> (B,), see `regularizers.Regularizer`.
        weight: factor of the term in the loss, finite and at least 0.
        weighting: `NoiseLevel -> (B,)`, see `weighting`.
        name: key in `LossOutput.terms` and in logs; by default the regularizer's own.
        estimator: `(scheduler, model_output, timesteps, sample) -> x0_hat`.
    """

    regularizer: Regularizer
    weight: float
    weighting: Callable[[NoiseLevel], Tensor] = matched
    name: str = ""
    estimator: Callable[..., Tensor] = predict_original_sample

    def __post_init__(self):
        if not callable(self.regularizer):
            raise TypeError(f"{self.regularizer!r} cannot be called; load_regularizer turns a name into a regularizer")
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"weight must be finite and at least 0, not {self.weight}")
        if not self.name:
            object.__setattr__(self, "name", regularizer_name(self.regularizer))


class TermError(ValueError):
    """A regularizer or weighting that breaks its contract; the message names the term."""


def checked_weights(term: Term, level: NoiseLevel) -> Tensor:
    """The term's weighting of each noise level, (B,).

    Raises:
        TermError: it is anything but a finite (B,).
    """
    weights = term.weighting(level)
    if not isinstance(weights, Tensor) or weights.shape != level.snr.shape:
        got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise TermError(
            f"the weighting of {term.name!r} must return one value per image, ({len(level.snr)},), not {got}"
        )
    if weights.device.type == "cpu" and not weights.isfinite().all():  # elsewhere the look would wait for the device
        at = level.timesteps[~weights.isfinite()]
        raise TermError(f"the weighting of {term.name!r} is not finite at timesteps {at.min():g} to {at.max():g}")
    return weights


def checked_values(term: Term, x0_hat: Tensor, context: dict) -> Tensor:
    """L' of each image in full precision, outside autocast: (B,).

    Args:
        term: whose regularizer is asked.
        x0_hat: (B, C, ...).
        context: exactly what the regularizer lists in `needs`, see `term_context`.

    Raises:
        TermError: the regularizer returns anything but a (B,), or one that is cut off from x0_hat.
    """
    with torch.autocast(x0_hat.device.type, enabled=False):
        # An alias: a regularizer may itself take gradients with respect to its argument.
        values = term.regularizer(x0_hat.view_as(x0_hat), **context)
    if not isinstance(values, Tensor) or values.shape != x0_hat.shape[:1]:
        got = f"a tensor of shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise TermError(
            f"regularizer {term.name!r} must return one value per image, a tensor of shape ({len(x0_hat)},);"
            f" it returned {got}. A mean over all but the first dimension is value.flatten(1).mean(1)"
        )
    if x0_hat.requires_grad and not values.requires_grad:
        raise TermError(
            f"regularizer {term.name!r} returns a tensor that is detached from x0_hat: no gradient can reach the"
            " model. Look for torch.no_grad, .detach(), .item() or numpy in it"
        )
    return values


def term_context(term: Term, context: dict) -> dict:
    """The part of `context` that the regularizer lists in `needs`.

    Raises:
        TermError: something of it is missing.
    """
    needs = getattr(term.regularizer, "needs", ())
    missing = [name for name in needs if name not in context]
    if missing:
        raise TermError(
            f"regularizer {term.name!r} needs {', '.join(missing)}, but the loss was given"
            f" {', '.join(context) or 'nothing'}: pass it as a keyword argument"
        )
    return {name: context[name] for name in needs}
