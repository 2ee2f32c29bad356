"""Durations and sizes as people say them."""

from __future__ import annotations

__all__ = ["duration_text", "size_text"]


def duration_text(seconds: float) -> str:
    """Returns "40 s", "12 min", "9 h 10 min" or "3.1 days"."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else "1 s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{seconds / 86400:.1f} days"


def size_text(number: float) -> str:
    """Returns a number of bytes as "12 MB", "1.7 GB" or "2.3 TB", in powers of ten."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.2g} {unit}" if number < 10 * size else f"{number / size:,.0f} {unit}"
    return f"{number / 1e3:.0f} kB"
