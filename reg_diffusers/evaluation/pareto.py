"""The Pareto front of several weights: the ones that no other weight beats in both L' and distance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from .trade_off import COLORS, MARKERS, Point, draw_point, draw_trade_off

__all__ = ["draw_pareto", "pareto_front"]

# The shape tells the weightings apart first, the colour second; points on the front are filled.
_PLAIN_MARKER, _DATA_MARKER = "X", "*"


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Returns the indices of the points that no other point beats, in order of the first value.

    One point beats another if it is at most as large in both values and smaller in one. Non-finite points are never
    part of the front.
    """
    found, best = [], float("inf")
    for x, y, index in sorted((x, y, index) for index, (x, y) in enumerate(points) if x - x == 0 and y - y == 0):
        if y < best or (found and (x, y) == points[found[-1]]):
            found.append(index)
            best = y
    return found


def draw_pareto(
    paths: Sequence[Path],
    panels: Mapping[str, Sequence[Point]],
    fronts: Mapping[str, Sequence[Point]],
    groups: Sequence[str],
    xlabel: str,
    ylabel: str,
) -> None:
    """Draws one panel per term: a point per run with its weight, a marker per weighting, the front as a line.

    Args:
        paths: the PNG or SVG files to write.
        panels: the points of each term, the data first; the titles of the others are their weights.
        fronts: the points of each term that are on the front, in order of x.
        groups: the weighting of each point; "" for the data and for the run without the loss.
        xlabel: the label of the distance.
        ylabel: the label of L'.
    """
    names = [name for name in dict.fromkeys(groups) if name]

    def draw_panel(axes, name: str, points: Sequence[Point], finite: Sequence[Point]) -> list[tuple[Point, str]]:
        on_front = fronts[name]
        axes.plot(
            *zip(*[(point.x, point.y) for point in on_front], strict=True) if on_front else ([], []),
            color="0.55",
            linewidth=1.2,
            zorder=2,
            label="Pareto front",
        )
        labelled = []
        for index, (point, group) in enumerate(zip(points, groups, strict=True)):
            if point not in finite:
                continue
            marker = MARKERS[names.index(group) % len(MARKERS)] if group else _PLAIN_MARKER
            color = COLORS[(names.index(group) + 1) % len(COLORS)] if group else COLORS[0]
            if index == 0:
                marker = _DATA_MARKER
            filled = index == 0 or point in on_front
            style = {"markersize": 13 if index == 0 else 8, "elinewidth": 1, "capsize": 2}
            draw_point(axes, point, color, marker, markerfacecolor=color if filled else "white", **style)
            labelled.append((point, color))
        for place, group in enumerate(names):
            style = {"marker": MARKERS[place % len(MARKERS)], "color": COLORS[(place + 1) % len(COLORS)]}
            axes.plot([], [], linestyle="none", label=group, **style)
        axes.legend(frameon=False, fontsize=9, loc="upper right")
        return labelled

    draw_trade_off(paths, panels, xlabel, ylabel, draw_panel)
