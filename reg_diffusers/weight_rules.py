"""Rules for the weight of a term during training: fixed, from a share of the gradient, or from a bound on L'."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

__all__ = ["AutoWeight", "Fixed", "Target", "WeightRule", "rule_of"]

_RHO = 0.5  # proportional gain of the controller of a target: the weight in units at a relative excess of 1
_ETA = 1e-2  # its integral gain, per step
_LARGEST_EXCESS = 1.0  # limit of c: at the start x0_hat is noise, and L' can be any multiple of the target


@dataclass(frozen=True)
class Fixed:
    """A constant weight.

    Attributes:
        value: at least 0.
    """

    value: float

    is_measured = False

    @property
    def start(self) -> float:
        return self.value

    @property
    def formula(self) -> str:
        return f"{self.value:g}"

    def bound(self, mean_on_data: float) -> None:
        """No bound on L'."""


@dataclass(frozen=True)
class AutoWeight:
    """A weight that makes the gradient norm of a term a given share of that of the denoising loss.

    Both gradients are taken at the output of the network.

    Attributes:
        share: the share, above 0; 0.1 is a tenth.
    """

    share: float

    is_measured = True
    start = 0.0

    def __post_init__(self):
        _check_positive("share", self.share)

    def __str__(self) -> str:
        return f"auto:{self.share:g}"

    follows_value = False  # whether the weight depends on L' itself
    needs_data = False  # whether it refers to L' of the data

    def spec(self, name: str) -> str:
        """Returns the rule as the command line writes it."""
        return str(self)

    @property
    def formula(self) -> str:
        return str(self)

    def bound(self, mean_on_data: float) -> None:
        """No bound on L'."""

    def weight_at(self, unit):
        """Returns the weight, given the weight `unit` that makes both gradient norms equal."""
        return self.share * unit

    def controlled(self, unit, excess, multiplier, steps: int = 1):
        """Returns weight and multiplier of the next step; neither depends on the excess."""
        return self.weight_at(unit), multiplier

    def too_short(self, name: str, measured: str, max_train_steps: int) -> str:
        return f"--reg_weight {self}: the weight of {name} is not frozen {measured} {max_train_steps} steps only"

    def frozen(self, name: str, unit: float, steps: int, bound: float | None) -> str:
        return f"weight of {name}: frozen at {self.weight_at(unit):.4g} ({self}) after {steps} steps"


@dataclass(frozen=True)
class Target:
    """An upper bound on the mean of L' of x0_hat.

    Dual ascent on the augmented Lagrangian finds the weight that meets it; see `training.term_weights`.

    Attributes:
        value: the bound, above 0, in the units of L' or as a factor.
        relative: whether `value` is a factor of the mean of L' on the data.

    Raises:
        ValueError: the value is not a finite number above 0.
    """

    value: float
    relative: bool = False

    is_measured = True
    start = 0.0
    formula = "multiplier"

    def __post_init__(self):
        _check_positive("value", self.value)

    def __str__(self) -> str:
        return f"{self.value:g}{'x' if self.relative else ''}"

    follows_value = True

    @property
    def needs_data(self) -> bool:
        return self.relative

    def spec(self, name: str) -> str:
        """Returns the rule of a term as the command line writes it."""
        return f"{name}={self}"

    def bound(self, mean_on_data: float) -> float:
        """Returns the bound in the units of L'; at most 0 if the mean on the data gives a relative bound no scale."""
        return self.value * mean_on_data if self.relative else self.value

    def weight_at(self, unit) -> None:
        """Returns None: the unit alone does not determine the weight."""

    def controlled(self, unit, excess, multiplier, steps: int = 1):
        """Returns weight and multiplier of the next step, from c = E[L'] / bound - 1 (`excess`, a tensor).

        Args:
            unit: weight at which both gradients have equal norms.
            excess: c.
            multiplier: its integral part so far.
            steps: training steps since the last call.
        """
        excess = excess.clamp(max=_LARGEST_EXCESS)
        multiplier = (multiplier + steps * _ETA * excess).clamp(min=0)
        return (multiplier + _RHO * excess).clamp(min=0) * unit, multiplier

    def too_short(self, name: str, measured: str, max_train_steps: int) -> str:
        return (
            f"--reg_target {self.spec(name)}: gradients are measured {measured} {max_train_steps} steps only:"
            f" {name} has weight 0"
        )

    def frozen(self, name: str, unit: float, steps: int, bound: float | None) -> str:
        return (
            f"weight of {name}: controlled from now on to meet E[L'] <= {bound:.4g}, in units of {unit:.4g}, where"
            " both gradients have equal norms"
        )


WeightRule = Fixed | AutoWeight | Target


def rule_of(weight: float | WeightRule) -> WeightRule:
    """Returns a rule unchanged, and a number as a constant rule."""
    return weight if isinstance(weight, WeightRule) else Fixed(weight)


def _check_positive(name: str, value: float) -> None:
    if not (isinstance(value, Real) and math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a finite number above 0, not {value!r}")
