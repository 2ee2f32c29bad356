"""The tables and the pictures of the benchmark, from its results alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

LOWER, SAME = 1 / 3, 0.02  # goals of case B: share of the plain model's residual, change of the small mode's mass
DISTANCES = ("distance", "distance p", "distance K")  # of cases C and D
# The colours of Okabe & Ito (2008), each with a marker of its own for print in grey.
STYLES = {
    "plain": ("o", "#000000"),
    "PIDM mean estimation": ("s", "#E69F00"),
    "PIDM sample estimation": ("D", "#CC79A7"),
    "PBFM": ("X", "#56B4E9"),
    "matched": ("^", "#0072B2"),
    "matched to SNR": ("<", "#004C80"),
    "gated(3)": ("v", "#009E73"),
    "gated(0.184)": ("v", "#009E73"),
    "constant": ("P", "#D55E00"),
    "snr": ("s", "#E69F00"),
    "low_noise": ("D", "#CC79A7"),
    "Target": ("X", "#56B4E9"),
    "data": ("*", "#777777"),
    "exact denoiser": ("*", "#777777"),
    "fresh data": ("*", "#777777"),
}


def goals(row: dict, plain: dict) -> str:
    """Whether the residual is a third of the plain model's, and the mass within .02 of its mass, on every seed."""
    if row is plain or row["method"] == "exact denoiser":
        return ""
    lower = all(one <= LOWER * other for one, other in zip(row["residual"], plain["residual"], strict=True))
    same = all(abs(one - other) <= SAME for one, other in zip(row["mass"], plain["mass"], strict=True))
    return f"a third: {'yes' if lower else 'NO'}, mass: {'yes' if same else 'NO'}"


def factors(row: dict, plain: dict) -> str:
    """The means of the residual and of the largest distance, as multiples of the plain model's."""
    if row is plain or row["method"] == "fresh data":
        return ""
    ratios = {name: statistics.mean(row[name]) / statistics.mean(plain[name]) for name in DISTANCES if name in row}
    residual = statistics.mean(row["residual"]) / statistics.mean(plain["residual"])
    return f"residual x {residual:.2f}, distance x {max(ratios.values()):.2f}"


@dataclass(frozen=True)
class Table:
    """How a case is shown.

    Attributes:
        title: of the case.
        columns: the numbers of a row, in this order: heading and digits after the point, by name in the results.
        axes: the names of the constraint and of the distribution, for the picture, each with its label.
        notes: the last column, from (row, plain row).
        log: whether the axis of the constraint is logarithmic.
        log_distribution: whether that of the distribution is, too.
        band: half the width of the band around the plain model's distribution, and the share of its constraint at
            which a line is drawn; None: neither.
    """

    title: str
    columns: dict[str, tuple[str, int]]
    axes: dict[str, str]
    notes: Callable[[dict, dict], str] = lambda row, plain: ""
    log: bool = False
    log_distribution: bool = False
    band: tuple[float, float] | None = None


POINTS = {
    "columns": {
        "residual": ("residual", 4),
        "mass": ("small mode", 3),
        "denoiser error": ("denoiser error", 3),
        "distance": ("distance", 3),
    },
    "axes": {"residual": "residual, mean of | |x|² - 1 | (less is better)", "mass": "mass of the small mode"},
    "notes": goals,
    "log": True,
    "band": (SAME, LOWER),
}
TABLES = {
    "circle": Table("A. Unit circle, uniform", **POINTS),
    "weighted_circle": Table("B. Circle with two modes: .7 von Mises(0, 4) + .3 von Mises(2.5, 8)", **POINTS),
    "heat": Table(
        "C. Heat equation with an unknown diffusivity",
        columns={
            "residual": ("residual", 3),
            "sum": ("sum over x", 4),
            "distance": ("distance", 3),
            "std ratio": ("std ratio", 3),
            "steps": ("steps", 0),
        },
        axes={
            "residual": "residual, mean of |u_t - nu u_xx| (less is better)",
            "distance": "Wasserstein distance of (nu, phi)",
        },
        notes=factors,
        log=True,
        log_distribution=True,
    ),
    "darcy": Table(
        "D. Darcy flow, pressure and permeability",
        columns={
            "residual": ("residual R", 3),
            "relative residual": ("R / std(p)", 1),
            "distance p": ("distance p", 3),
            "distance K": ("distance K", 3),
            "std p": ("std ratio p", 3),
            "std K": ("std ratio K", 3),
            "solved again": ("solved again", 3),
            "steps": ("steps", 0),
        },
        axes={
            "residual": "mean of |div(K grad p) + f|",
            "distance p": "Wasserstein distance of p",
        },
        notes=factors,
        log=True,
        log_distribution=True,
    ),
}
JUDGED = {
    "FD": ("FD", 2),
    "precision": ("precision", 3),
    "recall": ("recall", 3),
    "coverage": ("coverage", 3),
    "denoising": ("denoising loss", 4),
}
SMOOTH = {
    "columns": {"loss": ("total variation", 4)} | JUDGED,
    "axes": {"loss": "total variation of samples", "FD": "classifier FD"},
}
TABLES |= {
    "letters": Table(
        "E. Letters, perceptual loss",
        {"loss": ("L' of x0_hat", 4)} | JUDGED,
        {"loss": "L' of x0_hat, held-out letters (less is better)", "FD": "FD, MobileNetV2"},
    ),
    "clothes": Table("F. Fashion-MNIST, total variation, velocity prediction", **SMOOTH),
    "clothes_noise": Table("F. Fashion-MNIST, total variation, noise prediction", **SMOOTH),
}
PICTURES = {  # the cases of each picture in docs/images
    "rivals": ("circle", "weighted_circle"),
    "rivals_fields": ("heat", "darcy"),
    "rivals_pictures": ("letters", "clothes", "clothes_noise"),
}


def table(name: str, found: dict) -> str:
    """One case as text: mean ± standard deviation over the seeds."""
    shown = TABLES[name]
    headings = "".join(f"{heading:>19}" for heading, _ in shown.columns.values())
    lines = [
        shown.title,
        f"{found['length']}, seeds {', '.join(map(str, found['seeds']))}, {found['seconds']} s",
        "",
        f"{'':24}{'weight':>7}{headings}",
    ]
    plain = found["rows"][0]
    for row in found["rows"]:
        cells = (spread(row[name], digits) if name in row else "" for name, (_, digits) in shown.columns.items())
        numbers = "".join(f"{cell:>19}" for cell in cells)
        lines.append(f"{row['method']:24}{row['weight']:>7g}{numbers}  {shown.notes(row, plain)}".rstrip())
    return "\n".join(lines)


def spread(values: list[float], digits: int = 3) -> str:
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def write(found: dict[str, dict], text: Path, images: Path) -> None:
    """Writes the tables of all cases, and the pictures: distribution over constraint, one panel for each case."""
    text.write_text("\n\n".join(table(name, case) for name, case in found.items()) + "\n")
    print(text.read_text())
    for picture, cases in PICTURES.items():
        if known := {name: found[name] for name in cases if name in found}:
            draw(known, images / f"{picture}.png")


def draw(found: dict[str, dict], picture: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    columns, lines = min(len(found), 2), -(-len(found) // 2)
    size = (6.4 * columns, 4 * lines)
    figure, panels = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axes in panels.flat[len(found) :]:
        axes.remove()
    for axes, (name, case) in zip(panels.flat, found.items(), strict=False):
        panel(axes, TABLES[name], case["rows"])
    figure.savefig(picture, dpi=130, metadata={"Software": None})
    plt.close(figure)


def panel(axes, shown: Table, rows: list[dict]) -> None:
    (x, y), named = shown.axes, set()
    for row in rows:
        if x not in row:  # a paired loss of the data themselves
            continue
        marker, colour = STYLES[row["method"]]
        label = "" if row["method"] in named else row["method"]
        named.add(row["method"])
        middle = statistics.mean(row[x]), statistics.mean(row[y])
        axes.plot(row[x], row[y], marker, color=colour, alpha=0.35, markersize=4)
        axes.plot(*middle, marker, color=colour, markersize=10, label=label)
        if row["weight"]:
            axes.annotate(f"{row['weight']:g}", middle, (7, 5), textcoords="offset points", fontsize=8)
    if shown.band:
        half, share = shown.band
        axes.axhspan(*(statistics.mean(rows[0][y]) + side * half for side in (-1, 1)), color="0.92", zorder=0)
        axes.axvline(share * statistics.mean(rows[0][x]), color="0.5", linestyle="--", linewidth=1)
    if shown.log:
        axes.set_xscale("log")
    if shown.log_distribution:
        axes.set_yscale("log")
    axes.set_xlabel(shown.axes[x])
    axes.set_ylabel(shown.axes[y])
    axes.set_title(shown.title.split(":")[0], fontsize=10)
    axes.legend(fontsize=7)
