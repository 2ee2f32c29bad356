"""Weights and targets as the command line writes them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..weight_rules import AutoWeight, Target

__all__ = ["NamedTarget", "parse_target", "parse_weight"]

_LARGEST = 1e30  # float32 ends at 3e38, and a weight is multiplied by others and by L'


@dataclass(frozen=True)
class NamedTarget:
    """A target and the name of its term, such as total_variation=0.9x."""

    name: str
    target: Target

    def __str__(self) -> str:
        return f"{self.name}={self.target}"


def parse_weight(text: str) -> float | AutoWeight:
    """Parses a weight, such as "0.1", or a rule, such as "auto:0.1".

    Raises:
        ValueError: if the text is neither.
    """
    kind, colon, share = text.partition(":")
    if colon or kind == "auto":
        if kind == "auto" and (value := _number(share)) > 0:
            return AutoWeight(value)
        raise ValueError(f"{text!r} is not auto:SHARE with a share above 0, such as auto:0.1")
    if (value := _number(text)) >= 0:
        return value
    raise ValueError(f"{text!r} is neither a number of at least 0 nor auto:SHARE, such as auto:0.1")


def parse_target(text: str) -> NamedTarget:
    """Parses a target, such as "total_variation=0.08", or "total_variation=0.9x" relative to the data.

    Raises:
        ValueError: if the text is neither.
    """
    name, _, bound = text.rpartition("=")
    if name and (value := _number(bound.removesuffix("x"))) > 0:
        return NamedTarget(name, Target(value, relative=bound.endswith("x")))
    raise ValueError(
        f"{text!r} is not NAME=VALUE with a value above 0, such as total_variation=0.08, or total_variation=0.9x of"
        " the data"
    )


def _number(text: str) -> float:
    """Parses a finite number; returns nan for any other text.

    Raises:
        ValueError: if the number is too large for float32, in which the loss is computed.
    """
    try:
        value = float(text)
    except ValueError:
        return math.nan
    if math.isfinite(value) and abs(value) > _LARGEST:
        raise ValueError(f"{text} is above {_LARGEST:g}: products with it would be infinite in float32")
    return value if math.isfinite(value) else math.nan
