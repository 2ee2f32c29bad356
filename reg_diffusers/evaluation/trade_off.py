"""Draws the effect of an auxiliary loss against its cost: L' over the distance to the data, one point per model."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..runs.measurement import Measurement

__all__ = ["COLORS", "MARKERS", "Point", "draw_evaluation", "draw_point", "draw_trade_off"]

_COLUMNS = 3
MARKERS = "osD^vP"
# Okabe & Ito's colours: they differ in grayscale, too.
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
_LABEL_WIDTH = 24
# Possible places of a label: offset from its point in typographic points, horizontal and vertical alignment.
_PLACES = [
    *((9, 0, "left", "center"), (-9, 0, "right", "center"), (0, 10, "center", "bottom"), (0, -10, "center", "top")),
    *((8, 8, "left", "bottom"), (-8, 8, "right", "bottom"), (8, -8, "left", "top"), (-8, -8, "right", "top")),
    *((24, 24, "left", "bottom"), (-24, 24, "right", "bottom"), (24, -24, "left", "top"), (-24, -24, "right", "top")),
    *((24, 60, "left", "bottom"), (-24, 60, "right", "bottom"), (24, -60, "left", "top"), (-24, -60, "right", "top")),
]


@dataclass(frozen=True)
class Point:
    """The point of one set of images; errors of 0 or nan are not drawn.

    Attributes:
        title: its label.
        x: the distance to the data.
        y: L'.
        x_error: half the length of the horizontal error bar.
        y_error: half the length of the vertical error bar.
    """

    title: str
    x: float
    y: float
    x_error: float = 0.0
    y_error: float = 0.0


def draw_evaluation(path: Path, rows: Mapping[str, Measurement]) -> None:
    """Draws one panel per term: L' of each row with its standard error, over its distance to the data.

    Args:
        path: the PNG file to write.
        rows: the measurements, the data first, with at least one term.
    """
    first = next(iter(rows.values()))
    panels = {
        name: [
            Point(title, row.distance, row.terms[name], 0, row.standard_errors[name]) for title, row in rows.items()
        ]
        for name in first.terms
    }
    draw_trade_off(
        [path],
        panels,
        "sliced Wasserstein distance to the data,\nin values from -1 to 1 (left is closer)",
        f"loss: mean over {first.images} samples, ± standard error",
    )


def draw_trade_off(
    paths: Sequence[Path],
    panels: Mapping[str, Sequence[Point]],
    xlabel: str,
    ylabel: str,
    draw_panel: Callable | None = None,
) -> None:
    """Draws one panel per term, with one point per set of images.

    Args:
        paths: the PNG or SVG files to write.
        panels: the points of each term, the data first.
        xlabel: the label of the distance.
        ylabel: the label of L'.
        draw_panel: draws the points of one panel, given its name; returns the points to label with their colours.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(len(panels), _COLUMNS)
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5.4 * columns, 4.4 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    frames = figure.subplots(lines, columns, squeeze=False).flat
    for axes in frames[len(panels) :]:
        axes.set_axis_off()
    drawn = []
    for axes, (name, points) in zip(frames, panels.items(), strict=False):
        finite = [point for point in points if math.isfinite(point.x) and math.isfinite(point.y)]
        missing = [f"{point.title}: not finite" for point in points if point not in finite]
        drawn.append((axes, (draw_panel or _draw_points)(axes, name, points, finite)))
        _frame(axes, points[0], finite)
        axes.set_title("\n".join([name, *missing]))
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
    figure.draw_without_rendering()  # fixes the positions on the canvas
    for axes, labelled in drawn:
        _label(axes, labelled)
    for path in paths:
        figure.savefig(path, dpi=110, bbox_inches="tight")


def _draw_points(axes, name: str, points: Sequence[Point], finite: Sequence[Point]) -> list[tuple[Point, str]]:
    """Draws each point in its own colour and with its own marker."""
    labelled = []
    for index, point in enumerate(points):
        color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
        if point in finite:
            draw_point(axes, point, color, marker)
            labelled.append((point, color))
    return labelled


def draw_point(axes, point: Point, color: str, marker: str, **style) -> None:
    """Draws one point with its error bars."""
    x_error, y_error = ((error if math.isfinite(error) else 0.0) or None for error in (point.x_error, point.y_error))
    style = {"color": color, "markersize": 8, "capsize": 4, "zorder": 3, **style}
    axes.errorbar(point.x, point.y, y_error, x_error, fmt=marker, **style)


def _frame(axes, reference: Point, points: Sequence[Point]) -> None:
    """Sets limits that leave room for labels, and draws a line at the L' of the data."""
    if math.isfinite(reference.y):
        axes.axhline(reference.y, color="0.75", linewidth=1, linestyle="--", zorder=1)
    ends = [point.y + sign * error for point in points for error in [_finite(point.y_error)] for sign in (-1, 1)]
    low, high = min(ends, default=0.0), max(ends, default=0.0)
    space = 0.3 * (high - low) or 0.5 * abs(high) or 1.0
    axes.set_ylim(low - space, high + space)
    left = min((point.x - _finite(point.x_error) for point in points), default=0)
    right = max((point.x + _finite(point.x_error) for point in points), default=0)
    axes.set_xlim(min(1.1 * left, 0), 1.4 * right or 1.0)
    axes.spines[["top", "right"]].set_visible(False)


def _finite(error: float) -> float:
    return error if math.isfinite(error) else 0.0


def _label(axes, points: Sequence[tuple[Point, str]]) -> None:
    """Labels each point where the label stays in the panel and hides no other point, error bar or label."""
    from matplotlib.text import Text

    renderer = axes.figure.canvas.get_renderer()
    frame, taken = axes.get_window_extent(renderer), [_extent(axes, point) for point, _ in points]
    for (point, color), own in zip(points, list(taken), strict=True):
        tried = []
        for right, up, horizontal, vertical in _PLACES:
            text = axes.annotate(
                textwrap.fill(point.title, _LABEL_WIDTH),
                (point.x, point.y),
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
            hidden += sum(_overlap(box, bar) for bar in _bars(axes, point))
            outside = box.width * box.height - _overlap(box, frame)
            tried.append((round(hidden + outside), len(tried), text, box))
        *_, best, box = min(tried, key=lambda entry: entry[:2])
        for *_, text, _ in tried:
            if text is not best:
                text.remove()
        taken.append(box)


def _extent(axes, point: Point, space: float = 8):
    """Returns the rectangle of a point with its error bars, in pixels."""
    from matplotlib.transforms import Bbox

    x_error, y_error = _finite(point.x_error), _finite(point.y_error)
    ends = [(point.x - x_error, point.y - y_error), (point.x + x_error, point.y + y_error)]
    (left, low), (right, high) = axes.transData.transform(ends)
    return Bbox.from_extents(left, low, right, high).padded(space)


def _bars(axes, point: Point) -> list:
    """Returns the rectangles of a point's error bars, which its own label must not hide either."""
    x_error, y_error = _finite(point.x_error), _finite(point.y_error)
    across, along = replace(point, y_error=0.0), replace(point, x_error=0.0)
    return [_extent(axes, bar, 3) for bar, error in ((across, x_error), (along, y_error)) if error]


def _overlap(one, other) -> float:
    """Returns the area that two rectangles share."""
    from matplotlib.transforms import Bbox

    shared = Bbox.intersection(one, other)
    return 0.0 if shared is None else shared.width * shared.height
