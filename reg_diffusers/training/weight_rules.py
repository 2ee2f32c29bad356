"""What --reg_weight and --reg_target say beside plain numbers, as values."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["AutoWeight", "Target", "parse_target", "parse_weight"]


@dataclass(frozen=True)
class AutoWeight:
    """The weight at which a term's gradient at the network's output is a share of the denoising loss's, in norm.

    Attributes:
        share: above 0; 0.1 is a tenth.
    """

    share: float

    def __str__(self) -> str:
        return f"auto:{self.share:g}"


@dataclass(frozen=True)
class Target:
    """The value that L' of x0_hat may have at most, in the mean.

    Attributes:
        name: of the term.
        value: above 0, in the units of L', or as a factor.
        is_relative: whether `value` is a factor of the mean of L' on the data.
    """

    name: str
    value: float
    is_relative: bool = False

    def __str__(self) -> str:
        return f"{self.name}={self.value:g}{'x' if self.is_relative else ''}"

    def bound(self, mean_on_data: float) -> float:
        """The target in the units of L'; at most 0 where the data have no scale for a relative one."""
        return self.value * mean_on_data if self.is_relative else self.value


def parse_weight(text: str) -> float | AutoWeight:
    """A weight from "0.1", or a rule for it from "auto:0.1".

    Raises:
        ValueError: it is neither.
    """
    kind, colon, share = text.partition(":")
    if colon or kind == "auto":
        if kind == "auto" and (value := _number(share)) > 0:
            return AutoWeight(value)
        raise ValueError(f"{text!r} is not auto:SHARE with a share above 0, such as auto:0.1")
    if (value := _number(text)) >= 0:
        return value
    raise ValueError(f"{text!r} is not a number of at least 0, nor auto:SHARE such as auto:0.1")


def parse_target(text: str) -> Target:
    """A target from "total_variation=0.08", or from "total_variation=0.9x", relative to the data.

    Raises:
        ValueError: it is neither.
    """
    name, _, said = text.rpartition("=")
    if name and (value := _number(said.removesuffix("x"))) > 0:
        return Target(name, value, said.endswith("x"))
    raise ValueError(
        f"{text!r} is not NAME=VALUE with a value above 0, such as total_variation=0.08, or total_variation=0.9x of"
        " the data"
    )


def _number(text: str) -> float:
    """The number, or nan where there is none that is finite."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan
