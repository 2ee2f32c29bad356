"""The tables and the picture of the benchmark, from its results alone."""

from __future__ import annotations

import statistics
from pathlib import Path

TITLES = {
    "circle": "A. Unit circle, uniform",
    "weighted_circle": "B. Circle with two modes: .7 von Mises(0, 4) + .3 von Mises(2.5, 8)",
}
LOWER, SAME = 1 / 3, 0.02  # goals of case B: share of the plain model's residual, change of the small mode's mass
# The colours of Okabe & Ito (2008), each with a marker of its own for print in grey.
STYLES = {
    "plain": ("o", "#000000"),
    "PIDM mean estimation": ("s", "#E69F00"),
    "PIDM sample estimation": ("D", "#CC79A7"),
    "matched": ("^", "#0072B2"),
    "gated(3)": ("v", "#009E73"),
    "constant": ("P", "#D55E00"),
    "exact denoiser": ("*", "#777777"),
}


def table(name: str, found: dict) -> str:
    """One case as text: mean ± standard deviation over the seeds, and whether the goals hold on every seed."""
    lines = [
        TITLES[name],
        f"{found['epochs']} epochs, seeds {', '.join(map(str, found['seeds']))}, {found['seconds']} s",
        "",
        f"{'':24}{'weight':>7}{'residual':>19}{'small mode':>16}{'denoiser error':>17}{'distance':>16}  goals",
    ]
    plain = found["rows"][0]
    for row in found["rows"]:
        cells = (
            spread(row["residual"], 4),
            spread(row["mass"]),
            spread(row["denoiser error"]),
            spread(row["distance"]),
        )
        widths = (19, 16, 17, 16)
        numbers = "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        lines.append(f"{row['method']:24}{row['weight']:>7g}{numbers}  {goals(row, plain)}".rstrip())
    return "\n".join(lines)


def goals(row: dict, plain: dict) -> str:
    """Whether the residual is a third of the plain model's, and the mass within .02 of its mass, on every seed."""
    if row is plain or row["method"] == "exact denoiser":
        return ""
    lower = all(one <= LOWER * other for one, other in zip(row["residual"], plain["residual"], strict=True))
    same = all(abs(one - other) <= SAME for one, other in zip(row["mass"], plain["mass"], strict=True))
    return f"a third: {'yes' if lower else 'NO'}, mass: {'yes' if same else 'NO'}"


def spread(values: list[float], digits: int = 3) -> str:
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def write(found: dict[str, dict], text: Path, picture: Path) -> None:
    """Writes the tables of all cases, and one panel for each: the mass of the small mode over the residual."""
    text.write_text("\n\n".join(table(name, case) for name, case in found.items()) + "\n")
    print(text.read_text())
    draw(found, picture)


def draw(found: dict[str, dict], picture: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(found), figsize=(6.4 * len(found), 4), squeeze=False, layout="constrained")
    for axes, (name, case) in zip(panels[0], found.items(), strict=True):
        for row in case["rows"]:
            marker, colour = STYLES[row["method"]]
            label = row["method"] + (f", {row['weight']:g}" if row["weight"] else "")
            middle = statistics.mean(row["residual"]), statistics.mean(row["mass"])
            axes.plot(row["residual"], row["mass"], marker, color=colour, alpha=0.35, markersize=4)
            axes.plot(*middle, marker, color=colour, markersize=10, label=label)
            if row["weight"]:
                axes.annotate(f"{row['weight']:g}", middle, (7, 5), textcoords="offset points", fontsize=8)
        plain = case["rows"][0]
        axes.axhspan(*(statistics.mean(plain["mass"]) + side * SAME for side in (-1, 1)), color="0.92", zorder=0)
        axes.axvline(LOWER * statistics.mean(plain["residual"]), color="0.5", linestyle="--", linewidth=1)
        axes.set_xscale("log")
        axes.set_xlabel("residual, mean of | |x|² - 1 | (less is better)")
        axes.set_ylabel("mass of the small mode")
        axes.set_title(TITLES[name].split(":")[0], fontsize=10)
        axes.legend(fontsize=7)
    figure.savefig(picture, dpi=130, metadata={"Software": None})
    plt.close(figure)
