"""The curves of a training: each loss on the training images and on the held-out images."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["draw_validation"]

_BLUE, _ORANGE = "#0072B2", "#D55E00"  # of Okabe & Ito (2008)
_PREFIX = "validation/"


def draw_validation(path: Path, log: Path, weights: str) -> None:
    """Draws each loss that was measured on held-out images over the steps, beside its mean on the training images.

    The numbers of the training are means over the steps since the measurement before, so both curves have one point
    per measurement.

    Args:
        path: the PNG file to write.
        log: metrics.jsonl of the training.
        weights: kind of the weights that are measured, "averaged" or "trained".
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in log.read_text().splitlines()]
    measured = [line for line in lines if f"{_PREFIX}denoising" in line]
    trained = [line for line in lines if "loss" in line]
    names = [name.removeprefix(_PREFIX) for name in measured[-1] if name.startswith(_PREFIX)]
    figure = Figure(figsize=(4.6 * len(names), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        steps, values = _points(measured, f"{_PREFIX}{name}")
        means = _means_between(steps, *_points(trained, name))
        axes.plot(*means, color=_BLUE, linestyle="--", marker="o", markersize=4, label="training images")
        axes.plot(steps, values, color=_ORANGE, marker="s", markersize=4, label=f"held-out images, {weights} weights")
        if name == "denoising":
            best = min(range(len(values)), key=values.__getitem__)
            axes.plot(steps[best], values[best], "o", markersize=11, markerfacecolor="none", color="black")
            axes.annotate("best", (steps[best], values[best]), (0, 9), textcoords="offset points", ha="center")
        axes.set_title("denoising loss" if name == "denoising" else f"L' of {name.removeprefix('raw/')}", fontsize=11)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.15)
    figure.axes[0].legend(fontsize=9, frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _points(lines: list[dict], name: str) -> tuple[list[int], list[float]]:
    """Returns the steps and values of the lines that have a finite value of this name."""
    found = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _means_between(ends: list[int], steps: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    """Returns the mean of the values after each end and up to the next, without those that have no value."""
    means, before = {}, 0
    for end in ends:
        inside = [value for step, value in zip(steps, values, strict=True) if before < step <= end]
        if inside:
            means[end] = sum(inside) / len(inside)
        before = end
    return list(means), list(means.values())
