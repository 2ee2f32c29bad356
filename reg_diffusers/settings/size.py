"""The size of images in a setting: 64, or WIDTHxHEIGHT such as 256x192; everywhere else, (height, width)."""

from __future__ import annotations

import argparse
import re

__all__ = ["as_setting", "resolution", "shown", "sides"]


def resolution(text: str) -> int | str:
    """Parses the side of a square, or WIDTHxHEIGHT; a square given by both sides becomes its side.

    Raises:
        argparse.ArgumentTypeError: the text is neither.
    """
    found = re.fullmatch(r"(\d+)(?:[xX](\d+))?", text.strip())
    width, height = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not (width and height):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a side such as 64 nor WIDTHxHEIGHT such as 256x192")
    return as_setting((height, width))


def sides(setting: int | str) -> tuple[int, int]:
    """Returns the (height, width) of a setting."""
    width, _, height = str(setting).partition("x")
    return int(height or width), int(width)


def as_setting(size: tuple[int, int]) -> int | str:
    """Returns the setting of a (height, width)."""
    height, width = size
    return height if height == width else f"{width}x{height}"


def shown(size: tuple[int, int]) -> str:
    """Names a (height, width) in a message."""
    height, width = size
    return f"{width} wide and {height} high"
