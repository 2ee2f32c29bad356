"""What a flag's text stands for: numbers within bounds, spans of time."""

from __future__ import annotations

import argparse
import math
import re

__all__ = ["auto", "duration", "fraction", "natural", "nonnegative", "positive", "positive_int"]


def positive(text: str) -> float:
    """A number above 0."""
    return _number(text, float, lambda value: value > 0, "a number above 0")


def nonnegative(text: str) -> float:
    """A number of at least 0."""
    return _number(text, float, lambda value: value >= 0, "a number of at least 0")


def fraction(text: str) -> float:
    """A number from 0 to below 1."""
    return _number(text, float, lambda value: 0 <= value < 1, "a number from 0 to below 1")


def positive_int(text: str) -> int:
    """A whole number above 0."""
    return _number(text, int, lambda value: value > 0, "a whole number above 0")


def natural(text: str) -> int:
    """A whole number of at least 0."""
    return _number(text, int, lambda value: value >= 0, "a whole number of at least 0")


def auto(text: str) -> str:
    """ "auto", which stands for the latest checkpoint."""
    if text != "auto":
        raise argparse.ArgumentTypeError(f"{text!r} is not 'auto'; a folder is named by --resume_from_checkpoint")
    return "latest"


def duration(text: str) -> int:
    """Seconds, from "90m", "3h30m", "45" (seconds), "03:30:00" or "1-12:00:00" (days first, as SLURM writes it)."""
    units = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text)
    clock = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text)
    parts = (units or clock).groups() if units or clock else ()
    days, hours, minutes, seconds = (int(part or 0) for part in parts) if parts else (0, 0, 0, 0)
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if total == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 90m, 3h30m or 03:30:00")
    return total


def _number(text: str, kind: type, accepts, expected: str):
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not ((isinstance(value, int) or math.isfinite(value)) and accepts(value)):
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
    return value
