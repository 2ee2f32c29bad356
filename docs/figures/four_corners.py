"""The figure of docs/guidance.md, from what docs/benchmarks/four_corners.py has measured.

    python docs/figures/four_corners.py

Left the plain model without and with guidance, right the trained one, in the plane (distance to the data, L'): means
over the pairs of models.
"""

import json
import statistics
from pathlib import Path

from matplotlib import pyplot as plt
from shared import LINES, save

RESULT = Path(__file__).parents[1] / "benchmarks" / "four_corners.json"
METHODS = {
    "mpgd": {**LINES[1], "marker": "o"},
    "dps": {**LINES[2], "marker": "s"},
    "lgd": {**LINES[3], "marker": "^"},
}
# Scales that are written beside their marks, with the side; the others would lie on each other.
WRITTEN = {"mpgd": {0.5: -1, 2: 1}, "dps": {20: -1, 40: -1, 80: -1, 160: 1}, "lgd": {80: 1, 160: 1}}


def point(rows: list[dict]) -> tuple[float, float]:
    """(distance, L'), the means over the pairs."""
    return tuple(statistics.mean(row[key] for row in rows) for key in ("distance", "loss"))


def main() -> None:
    runs = json.loads(RESULT.read_text())["runs"]
    corners = {name: point([run[name] for run in runs]) for name in ("data", "plain", "trained")}
    figure, axes = plt.subplots(1, 2, figsize=(7.4, 4.4), sharex=True, sharey=True)
    for axis, name in zip(axes, ("plain", "trained"), strict=True):
        for method, style in METHODS.items():
            scales = [row["scale"] for row in runs[0][f"{name}, guided"][method]]
            swept = [point([run[f"{name}, guided"][method][place] for run in runs]) for place in range(len(scales))]
            axis.plot(*zip(corners[name], *swept, strict=True), markersize=5, **style)
            for scale, place in zip(scales, swept, strict=True):
                if side := WRITTEN[method].get(scale):
                    text = f"{method} {scale}" if scale == scales[-1] else f"{scale}"
                    write(axis, text, place, side, color=style["color"], fontsize=8)
        for corner, marker in (("data", "*"), ("plain", "D"), ("trained", "X")):
            axis.plot(*corners[corner], marker, color="black", markersize=9, zorder=3)
            write(axis, corner, corners[corner], 1, fontweight="bold")
        axis.axhline(corners["data"][1], color="0.6", linewidth=1, zorder=0)
        axis.set(title=f"{name} model, guided", xlabel="distance to the data", xlim=(0.03, 0.27))
    axes[0].set_ylabel("L' of the samples (total variation)")
    save(figure, "four_corners")


def write(axis, text: str, place: tuple[float, float], side: int, **style) -> None:
    """A label on the right (1) or left (-1) of a mark."""
    align = "left" if side > 0 else "right"
    white = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5}
    axis.annotate(text, place, (8 * side, 0), textcoords="offset points", ha=align, va="center", bbox=white, **style)


if __name__ == "__main__":
    main()
