"""Draws what an extra loss gained against what it cost, from the rows of the table."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path

from ..measurement import Measurement

__all__ = ["draw_evaluation"]

_COLUMNS = 3
_MARKERS = "osD^vP"
# Okabe & Ito's colours, whose greys differ too.
_COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
_LABEL_WIDTH = 24
# Where a label may be: offset from its point in typographic points, horizontal and vertical alignment.
_PLACES = [
    *((9, 0, "left", "center"), (-9, 0, "right", "center"), (0, 10, "center", "bottom"), (0, -10, "center", "top")),
    *((8, 8, "left", "bottom"), (-8, 8, "right", "bottom"), (8, -8, "left", "top"), (-8, -8, "right", "top")),
    *((24, 24, "left", "bottom"), (-24, 24, "right", "bottom"), (24, -24, "left", "top"), (-24, -24, "right", "top")),
    *((24, 60, "left", "bottom"), (-24, 60, "right", "bottom"), (24, -60, "left", "top"), (-24, -60, "right", "top")),
]


def draw_evaluation(path: Path, rows: dict[str, Measurement]) -> None:
    """One panel per term: L' of each row, with its standard error, over the row's distance to the data.

    Args:
        path: a PNG file.
        rows: what was measured, the data first, with at least one term.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(next(iter(rows.values())).terms)
    columns = min(len(names), _COLUMNS)
    lines = math.ceil(len(names) / columns)
    figure = Figure(figsize=(5.4 * columns, 4.4 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    drawn = [(axes, _draw_panel(axes, name, rows)) for axes, name in zip(panels, names, strict=False)]
    figure.draw_without_rendering()  # only now are the places on the canvas known
    for axes, points in drawn:
        _label(axes, points)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def _draw_panel(axes, name: str, rows: dict[str, Measurement]) -> list[tuple[str, float, float, float, str]]:
    """Draws the points of one term; returns them with what they are to be called."""
    points, missing = [], []
    for index, (title, row) in enumerate(rows.items()):
        color, marker = _COLORS[index % len(_COLORS)], _MARKERS[index % len(_MARKERS)]
        mean, error = row.terms[name], row.standard_errors[name]
        if not (math.isfinite(mean) and math.isfinite(row.distance)):
            missing.append(title)
            continue
        error = error if math.isfinite(error) else 0.0
        axes.errorbar(row.distance, mean, error or None, fmt=marker, color=color, markersize=8, capsize=4, zorder=3)
        points.append((title, row.distance, mean, error, color))
    reference = next(iter(rows.values()))
    if math.isfinite(reference.terms[name]):
        axes.axhline(reference.terms[name], color="0.75", linewidth=1, linestyle="--", zorder=1)
    ends = [mean + sign * error for *_, mean, error, _ in points for sign in (-1, 1)] or [0.0]
    space = 0.3 * (max(ends) - min(ends)) or 0.5 * abs(max(ends)) or 1.0
    axes.set_ylim(min(ends) - space, max(ends) + space)
    axes.set_xlim(0, 1.4 * max((distance for _, distance, *_ in points), default=0) or 1.0)
    axes.set_title("\n".join([name, *(f"{title}: not finite" for title in missing)]))
    axes.set_xlabel("sliced Wasserstein distance to the data,\nin values from -1 to 1 (left is closer)")
    axes.set_ylabel(f"loss: mean over {reference.images} samples, ± standard error")
    axes.spines[["top", "right"]].set_visible(False)
    return points


def _label(axes, points: list[tuple[str, float, float, float, str]]) -> None:
    """Writes each point's name beside it, where it hides no other point, error bar or name and stays in the panel."""
    from matplotlib.text import Text

    renderer = axes.figure.canvas.get_renderer()
    frame, taken = axes.get_window_extent(renderer), [_extent(axes, *point[1:4]) for point in points]
    for (title, x, y, _, color), own in zip(points, list(taken), strict=True):
        tried = []
        for right, up, horizontal, vertical in _PLACES:
            text = axes.annotate(
                textwrap.fill(title, _LABEL_WIDTH),
                (x, y),
                (right, up),
                textcoords="offset points",
                ha=horizontal,
                va=vertical,
                color=color,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
                arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6} if abs(right) > 20 else None,
                zorder=4,
            )
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer).padded(2)  # without its line
            hidden = sum(_overlap(box, other) for other in taken if other is not own)
            outside = box.width * box.height - _overlap(box, frame)
            tried.append((round(hidden + outside), len(tried), text, box))
        *_, best, box = min(tried, key=lambda entry: entry[:2])
        for *_, text, _ in tried:
            if text is not best:
                text.remove()
        taken.append(box)


def _extent(axes, x: float, y: float, error: float):
    """The rectangle of a point with its error bar, in pixels."""
    from matplotlib.transforms import Bbox

    (left, low), (right, high) = axes.transData.transform([(x, y - error), (x, y + error)])
    return Bbox.from_extents(left, low, right, high).padded(8)


def _overlap(one, other) -> float:
    """The area that two rectangles share."""
    from matplotlib.transforms import Bbox

    shared = Bbox.intersection(one, other)
    return 0.0 if shared is None else shared.width * shared.height
