r"""Schedules of the weight of a term over a training: step -> factor.

    L = ||o - target||^2 + sum_k factor_k(step) weight_k mean_i [ lambda_k(t_i) L'_k(x0_hat_i) ]

A schedule is any callable that returns a factor, finite and at least 0, for the number of optimizer steps done so far,
so the first step is 0. It has no state. Where the factor is exactly 0, the term's estimator, view and L' do not run.
Schedules are multiplied by `*`:

    Term(total_variation, 0.1, schedule=warmup(500) * every(4))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Integral, Real

from .term import Term, TermError

__all__ = ["Product", "every", "factors_of", "linear_decay", "warmup"]


class _Schedule:
    def __mul__(self, other: Callable[[int], float]) -> Product:
        return Product(self, other)


@dataclass(frozen=True)
class warmup(_Schedule):
    """Raises the factor linearly from 0 in the first step to 1: min(step / steps, 1).

    Args:
        steps: the first step with factor 1, at least 1.

    Raises:
        ValueError: steps is not an integer of at least 1.
    """

    steps: int

    def __post_init__(self):
        _check_at_least("steps", self.steps, 1)

    def __call__(self, step: int) -> float:
        return min(step / self.steps, 1.0)


@dataclass(frozen=True)
class linear_decay(_Schedule):
    """Lowers the factor linearly from 1 to 0: 1 until step `start`, 0 from step `end` on.

    Args:
        start: the last step with factor 1, at least 0.
        end: the first step with factor 0, above `start`.

    Raises:
        ValueError: start and end are not integers with 0 <= start < end.
    """

    start: int
    end: int

    def __post_init__(self):
        _check_at_least("start", self.start, 0)
        _check_at_least("end", self.end, self.start + 1)

    def __call__(self, step: int) -> float:
        return min(max((self.end - step) / (self.end - self.start), 0.0), 1.0)


@dataclass(frozen=True)
class every(_Schedule):
    """Runs a term in every N-th step only: 1 in steps 0, N, 2 N, ..., 0 in all others.

    The mean factor is 1 / N. Multiply the weight by N to keep the mean strength.

    Args:
        steps: N, at least 1.

    Raises:
        ValueError: steps is not an integer of at least 1.
    """

    steps: int

    def __post_init__(self):
        _check_at_least("steps", self.steps, 1)

    def __call__(self, step: int) -> float:
        return 1.0 if step % self.steps == 0 else 0.0


@dataclass(frozen=True)
class Product(_Schedule):
    """The product of two schedules; the second is not called where the first is 0."""

    first: Callable[[int], float]
    second: Callable[[int], float]

    def __call__(self, step: int) -> float:
        factor = self.first(step)
        return factor * self.second(step) if factor else factor


def factors_of(terms: Iterable[Term], training_step: int | None) -> dict[str, float]:
    """Computes the factor of the weight of each term that has a schedule, by name.

    Args:
        terms: terms of a loss.
        training_step: number of optimizer steps done so far; may be None if no term has a schedule.

    Raises:
        ValueError: a term has a schedule, and `training_step` is None.
        TermError: a schedule does not return a finite number of at least 0.
    """
    factors = {}
    for term in terms:
        if term.schedule is None:
            continue
        if training_step is None:
            raise ValueError(
                f"the weight of {term.name!r} has a schedule: pass training_step=, the number of optimizer steps done"
            )
        factor = term.schedule(int(training_step))
        if not (isinstance(factor, Real) and math.isfinite(factor) and factor >= 0):
            raise TermError(
                f"the schedule of {term.name!r} must return a finite number of at least 0, not {factor!r} in step"
                f" {training_step}"
            )
        factors[term.name] = float(factor)
    return factors


def _check_at_least(name: str, value: int, least: int) -> None:
    if not (isinstance(value, Integral) and value >= least):
        raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")
