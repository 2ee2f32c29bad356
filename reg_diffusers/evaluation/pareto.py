"""Which of several weights are worth having: those that no other beats in both L' and distance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from .trade_off import COLORS, MARKERS, Point, draw_point, draw_trade_off

__all__ = ["draw_pareto", "pareto_front"]

# Told apart by shape first, by colour second, filled where on the front.
_PLAIN_MARKER, _DATA_MARKER = "X", "*"


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The numbers of the points that no other beats: at most as large in both values and smaller in one.

    They are in order of the first value; points with a value that is not finite never belong to them.
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
    """One panel per term: each run by its weight, with its weighting as marker, the front as a line.

    Args:
        paths: PNG or SVG files.
        panels: for each term its points, the data first, whose titles are the weights.
        fronts: for each term those of its points that no other beats, in order of x.
        groups: the weighting of each point; "" for the data and for the run without the loss.
        xlabel: of the distance.
        ylabel: of L'.
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
