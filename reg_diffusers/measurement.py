"""Evidence on a model: L' on a set of images together with their distance to the data, as rows of one table.

Always in pairs: L' alone says nothing, a model that draws only grey has no variation.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["COMPARISON_FILE", "Measurement", "markdown_table", "read_comparison", "table", "write_comparison"]

COMPARISON_FILE = "comparison.json"


@dataclass(frozen=True)
class Measurement:
    """One set of images, as a row of the table.

    Attributes:
        images: number of images.
        terms: L' of each regularizer: mean over the images.
        standard_errors: of these means.
        distance: sliced Wasserstein distance to the data, in pixel values; for the data, between two halves of them.
        denoising_loss: mean over fixed images, noise and timesteps; None for the data.
    """

    images: int
    terms: dict[str, float]
    standard_errors: dict[str, float]
    distance: float
    denoising_loss: float | None = None


def table(rows: dict[str, Measurement]) -> str:
    """The rows as text: L' with its standard error, distance to the data, denoising loss."""
    lines = _cells(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def markdown_table(rows: dict[str, Measurement]) -> str:
    """What `table` shows, in Markdown."""
    lines = _cells(rows)
    head, *body = (f"| {' | '.join(line)} |".replace("<", "&lt;") for line in lines)
    return "\n".join([head, "|---" * len(lines[0]) + "|", *body])


def _cells(rows: dict[str, Measurement]) -> list[list[str]]:
    names = list(next(iter(rows.values())).terms)
    head = ["", *names, "distance to data", "denoising loss"]
    body = [
        [
            title,
            *(_with_error(row.terms[name], row.standard_errors[name]) for name in names),
            f"{row.distance:.4f}",
            "" if row.denoising_loss is None else f"{row.denoising_loss:.5f}",
        ]
        for title, row in rows.items()
    ]
    return [head, *body]


def _with_error(mean: float, error: float) -> str:
    return f"{mean:.4f}" if math.isnan(error) else f"{mean:.4f} ± {error:.4f}"  # of a single image there is none


def write_comparison(path: Path, rows: dict[str, Measurement], **settings) -> None:
    """Writes the rows and the settings under which they were measured as JSON."""
    path.write_text(json.dumps({"rows": {title: asdict(row) for title, row in rows.items()}, **settings}, indent=2))


def read_comparison(path: Path) -> dict[str, Measurement]:
    """The rows that `write_comparison` wrote."""
    return {title: Measurement(**row) for title, row in json.loads(path.read_text())["rows"].items()}
