"""Numbers on the command line."""

from __future__ import annotations

import argparse

__all__ = ["natural", "positive"]


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _whole_number(text, 1)


def natural(text: str) -> int:
    """A whole number of at least 0."""
    return _whole_number(text, 0)


def _whole_number(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return value
