"""Draws a diagnosis as one figure, readable in grayscale and by colour-blind readers."""

from __future__ import annotations

import textwrap
from pathlib import Path

from .result import Diagnosis, Guesses
from .verdict import Verdict

__all__ = ["draw_diagnosis"]

# Okabe & Ito's colours: they differ in grayscale, too. Line styles and markers repeat the distinction.
_BEST = {"color": "#0072B2", "marker": "o", "linestyle": "-"}
_MODEL = {"color": "#D55E00", "marker": "s", "linestyle": "--"}
_CONSTANT = {"color": "#E69F00", "marker": "^", "linestyle": ":"}
_GREY = "0.85"


def draw_diagnosis(path: Path, diagnosis: Diagnosis, verdict: Verdict) -> None:
    """Draws six panels over the noise level, below the verdict.

    Args:
        path: the PNG or SVG file to write.
        diagnosis: the measurements.
        verdict: the verdict on them.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 3)
    for axes, draw in zip(panels.flat, (_wish, _pull, _shift, _agreement, _decided, _price), strict=True):
        draw(axes, diagnosis)
        axes.spines[["top", "right"]].set_visible(False)
        if draw is not _price:
            _noise_axis(axes, diagnosis, verdict)
    figure.suptitle(f"{diagnosis.name}: {verdict.answer}", fontsize=16, fontweight="bold")
    if verdict.reasons:
        reasons = textwrap.fill(" ".join(verdict.reasons), 190)
        figure.supxlabel(reasons, fontsize=10, x=0.01, ha="left")
    figure.savefig(path, dpi=110)


def _noise_axis(axes, diagnosis: Diagnosis, verdict: Verdict) -> None:
    levels = diagnosis.levels
    axes.set_xscale("log")
    axes.set_xlim(1.6 * levels[0].snr, levels[-1].snr / 1.6)
    axes.set_xlabel("SNR, with t above (noise rises to the right)")
    shown = levels[:: max(len(levels) // 6, 1)]
    top = axes.secondary_xaxis("top")
    top.set_xticks([level.snr for level in shown], [f"{level.timestep:g}" for level in shown], fontsize=8)
    top.minorticks_off()
    if verdict.max_timestep is not None:
        beyond = [level.snr for level in levels if level.timestep > verdict.max_timestep]
        axes.axvspan(beyond[0], beyond[-1] / 1.6, color=_GREY, zorder=0)
        place = axes.get_xaxis_transform()
        axes.text(
            beyond[0],
            0.5,
            " x0_hat is a blur",
            transform=place,
            rotation=90,
            ha="right",
            va="center",
            fontsize=8,
            color="0.3",
        )


def _wish(axes, diagnosis: Diagnosis) -> None:
    data = diagnosis.data
    for low, high, shade in ((5, 95, "0.9"), (25, 75, "0.75")):
        axes.axhspan(data.percentiles[low], data.percentiles[high], color=shade, zorder=0.5, alpha=0.6)
    axes.axhline(data.mean, color="black", linewidth=1, label="real images (bands: 50 and 90 % of them)")
    _draw_guesses(axes, diagnosis, "value")
    axes.set_title("1  What is L' of the best guess?")
    axes.set_ylabel("L' (bars: 2 standard errors)")
    axes.legend(fontsize=8, frameon=False)


def _pull(axes, diagnosis: Diagnosis) -> None:
    snr = [level.snr for level in diagnosis.levels]
    asked = f"{diagnosis.asked.weighting}, weight {diagnosis.asked.weight:.3g}"
    axes.plot(snr, _positive([level.ratio for level in diagnosis.levels]), label=asked, markersize=4, **_BEST)
    constant = _positive([level.ratio_constant for level in diagnosis.levels])
    axes.plot(snr, constant, label=f"constant, weight {diagnosis.asked.weight:.3g}", markersize=4, **_CONSTANT)
    axes.set_yscale("log")
    axes.set_title("2a  Which weight acts there?")
    axes.set_ylabel("weight lambda / w_d (missing: 0)")
    axes.legend(fontsize=8, frameon=False)


def _shift(axes, diagnosis: Diagnosis) -> None:
    snr = [level.snr for level in diagnosis.levels]
    error = [level.best.error**0.5 / diagnosis.spread for level in diagnosis.levels]
    axes.plot(snr, error, color="black", linewidth=1, label="error of the best guess")
    shifts = _positive([level.displacement for level in diagnosis.levels])
    axes.plot(snr, shifts, label=diagnosis.asked.weighting, markersize=4, **_BEST)
    shifts = _positive([level.displacement_constant for level in diagnosis.levels])
    axes.plot(snr, shifts, label="constant", markersize=4, **_CONSTANT)
    axes.set_yscale("log")
    axes.set_title("2b  How far does it move the best guess?")
    axes.set_ylabel("shift, in standard deviations of the data")
    axes.legend(fontsize=8, frameon=False)


def _agreement(axes, diagnosis: Diagnosis) -> None:
    axes.axhline(0, color="black", linewidth=1)
    _draw_guesses(axes, diagnosis, "cosine")
    axes.set_title("3  Do the two losses agree (above 0) or fight?")
    axes.set_ylabel("cosine of their gradients")
    axes.legend(fontsize=8, frameon=False)


def _decided(axes, diagnosis: Diagnosis) -> None:
    snr = [level.snr for level in diagnosis.levels]
    for shares, label, style in (
        ([level.decided_share for level in diagnosis.levels], "of a sample", _BEST),
        ([level.training_share for level in diagnosis.levels], "of the training", _CONSTANT),
    ):
        total = [100 * sum(shares[index:]) for index in range(len(shares))]
        axes.plot(snr, total, label=label, markersize=4, **style)
    axes.set_title("4  How much is decided at this noise or above?")
    axes.set_ylabel("percent")
    axes.legend(fontsize=8, frameon=False)


def _price(axes, diagnosis: Diagnosis) -> None:
    dearest = max(diagnosis.affordable)
    costs = sorted(diagnosis.affordable[dearest], key=lambda cost: cost.fall)
    bars = axes.barh(
        [f"{cost.weighting}\n{cost.weight:.2g}" for cost in costs],
        [100 * cost.fall for cost in costs],
        color=["0.7" if cost.largest_rise > 1 else "#0072B2" for cost in costs],
        edgecolor="black",
    )
    for bar, cost in zip(bars, costs, strict=True):
        bar.set_hatch("//" if cost.largest_rise > 1 else "")
    axes.set_title(f"5  What buys a rise of the denoising loss by {dearest:.0%}?")
    axes.set_xlabel("fall of L' in percent, with the weight\n(hatched: pulls harder than the data at some t)")
    if not costs:
        axes.text(0.5, 0.5, "no weight costs that much", transform=axes.transAxes, ha="center")


def _draw_guesses(axes, diagnosis: Diagnosis, what: str) -> None:
    """Draws a field of `Guesses` with 2 standard errors, for the best guess and for the model."""
    for title, style, guesses in _sources(diagnosis):
        axes.errorbar(
            [level.snr for level in diagnosis.levels],
            [getattr(guess, what) for guess in guesses],
            [2 * getattr(guess, f"{what}_error") for guess in guesses],
            label=title,
            capsize=2,
            markersize=4,
            **style,
        )


def _sources(diagnosis: Diagnosis) -> list[tuple[str, dict, list[Guesses]]]:
    sources = [("best guess without training", _BEST, [level.best for level in diagnosis.levels])]
    if all(level.model for level in diagnosis.levels):
        sources.append(("the model", _MODEL, [level.model for level in diagnosis.levels]))
    return sources


def _positive(values: list[float]) -> list[float]:
    """Replaces zeros by nan, because a logarithmic axis has no 0."""
    return [value if value > 0 else float("nan") for value in values]
