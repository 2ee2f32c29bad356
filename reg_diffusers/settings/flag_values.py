"""Parses the values of flags: bounded numbers, durations, weights."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import PurePath

from ..weight_rules import AutoWeight
from .weights import NamedTarget, parse_target, parse_weight

__all__ = ["auto", "duration", "fraction", "inner_folder", "natural", "noise_levels", "nonnegative", "positive"]
__all__ += ["port", "positive_int", "prediction_type", "renaming", "seed", "share", "target", "weight"]

_LARGEST_SEED = 2**32 - 2**16  # numpy seeds have 32 bits, and each process of a launch adds its index


def positive(text: str) -> float:
    """Parses a number above 0."""
    return _number(text, float, lambda value: value > 0, "a number above 0")


def nonnegative(text: str) -> float:
    """Parses a number of at least 0."""
    return _number(text, float, lambda value: value >= 0, "a number of at least 0")


def fraction(text: str) -> float:
    """Parses a number from 0 to below 1."""
    return _number(text, float, lambda value: 0 <= value < 1, "a number from 0 to below 1")


def port(text: str) -> int:
    """Parses the number of a port."""
    return _number(text, int, lambda value: 0 <= value <= 65535, "a port from 0 to 65535")


def share(text: str) -> float:
    """Parses a number above 0 and below 1."""
    return _number(text, float, lambda value: 0 < value < 1, "a number above 0 and below 1")


def positive_int(text: str) -> int:
    """Parses an integer above 0."""
    return _number(text, int, lambda value: value > 0, "a whole number above 0")


def natural(text: str) -> int:
    """Parses an integer of at least 0."""
    return _number(text, int, lambda value: value >= 0, "a whole number of at least 0")


def seed(text: str) -> int:
    """Parses an integer that every random generator accepts as its seed."""
    return _number(text, int, lambda value: 0 <= value <= _LARGEST_SEED, f"a whole number from 0 to {_LARGEST_SEED}")


def noise_levels(text: str) -> int:
    """Parses an integer of at least 2, because sampling needs two noise levels."""
    return _number(text, int, lambda value: value >= 2, "a whole number of at least 2")


def prediction_type(text: str) -> str:
    """Parses a prediction type, named as in diffusers; "flow" is short for flow_prediction."""
    return {"flow": "flow_prediction"}.get(text, text)


def weight(text: str) -> float | AutoWeight:
    """Parses a weight, or a rule that finds it, such as auto:0.1."""
    return _parsed(parse_weight, text)


def target(text: str) -> NamedTarget:
    """Parses a bound on L', such as total_variation=0.9x."""
    return _parsed(parse_target, text)


def renaming(text: str) -> str:
    """Parses a name and the column that it stands for, such as mask=segmentation."""
    name, equals, column = text.partition("=")
    if not (name.isidentifier() and equals and column):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=COLUMN, such as mask=segmentation")
    return text


def auto(text: str) -> str:
    """Parses "auto", which stands for the latest checkpoint."""
    if text != "auto":
        raise argparse.ArgumentTypeError(f"{text!r} is not 'auto'; name a folder by --resume_from_checkpoint")
    return text


def inner_folder(text: str) -> str:
    """Parses a relative path of a folder inside the output folder."""
    path = PurePath(text)
    if path.is_absolute() or ".." in path.parts:
        raise argparse.ArgumentTypeError(f"{text!r} leaves --output_dir: name a folder in it, such as 'logs'")
    return text


def duration(text: str) -> int:
    """Parses a duration to seconds: "90m", "3h30m", "45" (seconds), "03:30:00", "1-12:00:00" (SLURM, days first)."""
    units = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text)
    clock = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text)
    parts = (units or clock).groups() if units or clock else ()
    days, hours, minutes, seconds = (int(part or 0) for part in parts) if parts else (0, 0, 0, 0)
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if total == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration such as 90m, 3h30m or 03:30:00")
    return total


def _number(text: str, kind: type, accepts, expected: str):
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not ((isinstance(value, int) or math.isfinite(value)) and accepts(value)):
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
    return value


def _parsed(parse, text: str):
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
