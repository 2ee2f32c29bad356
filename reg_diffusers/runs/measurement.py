"""The measurements of a comparison: L' on a set of images with their distance to the data, as rows of one table.

The two always appear together, because L' alone means nothing: a model that only draws grey has no variation.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = [
    "COMPARISON_FILE",
    "Measurement",
    "as_code",
    "as_text",
    "markdown_table",
    "read_comparison",
    "table",
    "write_comparison",
]

COMPARISON_FILE = "comparison.json"


@dataclass(frozen=True)
class Measurement:
    """The measurements of one set of images: one row of the table.

    Attributes:
        images: number of images.
        terms: mean of L' over the images, for each regularizer.
        standard_errors: the standard errors of these means.
        distance: sliced Wasserstein distance to the data, in pixel values; for the data: between its two halves.
        denoising_loss: mean over fixed images, noise and timesteps; None for the data.
        distance_half_width: half-width of the 95 % confidence interval of the distance; nan for too few images.
        held_out_loss: denoising loss on held-out images at the end of the training; None without them.
    """

    images: int
    terms: dict[str, float]
    standard_errors: dict[str, float]
    distance: float
    denoising_loss: float | None = None
    distance_half_width: float = math.nan
    held_out_loss: float | None = None


def table(rows: dict[str, Measurement]) -> str:
    """Formats the rows as text: L' with its standard error, distance to the data, denoising loss."""
    lines = _cells(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def markdown_table(rows: dict[str, Measurement]) -> str:
    """Formats the rows as in `table`, in Markdown."""
    lines = _cells(rows)
    head, *body = (f"| {' | '.join(map(as_text, line))} |" for line in lines)
    return "\n".join([head, "|---" * len(lines[0]) + "|", *body])


def as_text(text: str) -> str:
    """Escapes a name for Markdown text and tables, so it cannot add HTML, code or columns."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([|`*_\[\]\\])", r"\\\1", text) if re.search(r"[|`*\[\]\\]", text) else text


def as_code(text: str) -> str:
    """Formats a name as code for Markdown text and tables."""
    text = " ".join(text.split()).replace("|", r"\|")
    if "`" not in text:
        return f"`{text}`"
    fence = "`" * (1 + max(map(len, re.findall("`+", text))))
    return f"{fence} {text} {fence}"


def _cells(rows: dict[str, Measurement]) -> list[list[str]]:
    names = list(next(iter(rows.values())).terms)
    is_held_out = any(row.held_out_loss is not None for row in rows.values())
    head = ["", *names, "distance to data", "denoising loss", *(["on held-out images"] if is_held_out else [])]
    body = [
        [
            title,
            *(_with_error(row.terms[name], row.standard_errors[name]) for name in names),
            f"{row.distance:.4f}",
            _loss(row.denoising_loss),
            *([_loss(row.held_out_loss)] if is_held_out else []),
        ]
        for title, row in rows.items()
    ]
    return [head, *body]


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.5f}"


def _with_error(mean: float, error: float) -> str:
    return f"{mean:.4f}" if math.isnan(error) else f"{mean:.4f} ± {error:.4f}"  # nan for a single image


def write_comparison(path: Path, rows: dict[str, Measurement], **settings) -> None:
    """Writes the rows and the settings of the measurement as JSON; a non-finite number becomes null."""
    found = {"rows": {title: _finite(asdict(row)) for title, row in rows.items()}, **settings}
    path.write_text(json.dumps(found, indent=2, allow_nan=False))


def read_comparison(path: Path) -> dict[str, Measurement]:
    """Reads the rows that `write_comparison` wrote; a non-finite number becomes nan."""
    rows = json.loads(path.read_text())["rows"]
    losses = ("denoising_loss", "held_out_loss")  # None where there is none
    return {
        title: Measurement(**{**_parsed(row), **{name: row.get(name) for name in losses}})
        for title, row in rows.items()
    }


def _finite(value):
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parsed(value):
    if isinstance(value, dict):
        return {name: _parsed(entry) for name, entry in value.items()}
    return math.nan if value is None else value
