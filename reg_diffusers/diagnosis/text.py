"""Formats a diagnosis as text for the terminal and as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

from .result import Diagnosis, Guesses, LevelDiagnosis
from .verdict import CONTRADICTS, SMALLEST_EFFECT, Verdict

__all__ = ["describe", "describe_verdict", "write_json"]

_LEGEND = """\
  D         the best guess of the image without training; gap: L'(D) - L'(image), ± standard error
  lambda/w  weight of the loss on the image over that of the denoising loss; in brackets: for weighting `constant`
  shift     how far the loss moves D, in standard deviations of the data; in brackets: for `constant`
  |g'|/|g|  ratio of the two losses' gradient norms, by model output; cos: do they agree (> 0) or conflict (< 0)?
  decided   share of a sample that is decided at that t"""


def describe(diagnosis: Diagnosis, verdict: Verdict, *, verbose: bool = True) -> str:
    """Formats the verdict with its reasons and the recommended weights.

    Args:
        diagnosis: the diagnosis.
        verdict: its verdict.
        verbose: whether the table by timestep and the effect of each weighting follow.
    """
    answer = [
        describe_verdict(diagnosis.name, verdict),
        *_recommended(diagnosis, verdict),
        *_trade(diagnosis, verdict),
    ]
    if not verbose:
        return "\n".join([*answer, "--verbose prints the table by noise level; the figure shows it."])
    channels, height, width = diagnosis.shape
    data = diagnosis.data
    percentiles = ", ".join(f"{percent} %: {value:.3g}" for percent, value in data.percentiles.items())
    lines = [
        *answer,
        "",
        f"{diagnosis.name} on {diagnosis.images:,} images of {channels} x {height} x {width}, measured on"
        f" {diagnosis.held_out} others",
        f"L' of real images: {data.mean:.4g}, percentiles {percentiles}",
        "",
        *_aligned([_HEAD, *map(_cells, diagnosis.levels)]),
        _LEGEND,
        "",
    ]
    if any(level.model for level in diagnosis.levels):
        lines += ["The same for the model:", *_aligned([_MODEL_HEAD, *map(_model_cells, diagnosis.levels)]), ""]
    return "\n".join([*lines, *_price_list(diagnosis)]).rstrip()


def _recommended(diagnosis: Diagnosis, verdict: Verdict) -> list[str]:
    if verdict.recommended is None:
        return []
    weighting = verdict.recommended.weighting
    same = [cost for costs in diagnosis.affordable.values() for cost in costs if cost.weighting == weighting]
    return [
        f"Recommended: --reg_weighting {weighting} --reg_weight {cost.weight:.2g} (denoising loss"
        f" {cost.rise:+.1%}, L' {-cost.fall:+.1%}, both predicted; acts up to t={cost.last_timestep:g})"
        for cost in same
    ]


def _trade(diagnosis: Diagnosis, verdict: Verdict) -> list[str]:
    """Returns what a rise of the denoising loss buys where the data contradict the loss, for those who want that."""
    if verdict.answer != CONTRADICTS:
        return []
    lines = []
    for rise, costs in diagnosis.affordable.items():
        bought = [cost for cost in costs if cost.largest_rise <= 1 and cost.fall > 0]
        own = [cost for cost in bought if cost.weighting == diagnosis.asked.weighting]
        for cost in (own or bought)[:1]:
            lines.append(
                f"Not recommended: {rise:.0%} of the denoising loss buys a fall of L' by {cost.fall:.1%}"
                f" (--reg_weighting {cost.weighting} --reg_weight {cost.weight:.2g})"
            )
        if not bought:
            lines.append(f"Not recommended: no weight buys a fall of L' for {rise:.0%} of the denoising loss")
    return lines


def describe_verdict(name: str, verdict: Verdict) -> str:
    """Formats the verdict with its reasons."""
    return "\n".join([f"Verdict: {name} {verdict.answer}.", *(f"  - {reason}" for reason in verdict.reasons)])


def write_json(path: Path, diagnosis: Diagnosis | None, verdict: Verdict, **settings) -> None:
    """Writes diagnosis, verdict and its threshold as JSON; non-finite numbers become null.

    Without a diagnosis, for a loss that cannot work, the file holds the verdict only.
    """
    decided = {**asdict(verdict), "smallest_effect": SMALLEST_EFFECT}
    found = {"settings": settings, "verdict": decided, **(asdict(diagnosis) if diagnosis else {})}
    path.write_text(json.dumps(_finite(found), indent=1) + "\n")


_HEAD = ("t", "SNR", "D by", "L'(D)", "gap", "lambda/w", "shift", "|g'|/|g|", "cos", "decided")
_MODEL_HEAD = ("t", "error", "error of D", "L'", "gap", "|g'|/|g|", "cos")


def _cells(level: LevelDiagnosis) -> tuple[str, ...]:
    best = level.best
    return (
        f"{level.timestep:g}",
        f"{level.snr:.3g}",
        best.source,
        f"{best.value:.4g}",
        f"{best.gap:+.3g} ± {best.gap_error:.1g}",
        f"{level.ratio:.2g} ({level.ratio_constant:.2g})",
        f"{level.displacement:.2g} ({level.displacement_constant:.2g})",
        _ratio(best),
        f"{best.cosine:+.3f} ± {best.cosine_error:.3f}",
        f"{level.decided_share:.1%}",
    )


def _model_cells(level: LevelDiagnosis) -> tuple[str, ...]:
    model = level.model
    return (
        f"{level.timestep:g}",
        f"{model.error:.3g}",
        f"{level.best.error:.3g}",
        f"{model.value:.4g}",
        f"{model.gap:+.3g} ± {model.gap_error:.1g}",
        _ratio(model),
        f"{model.cosine:+.3f} ± {model.cosine_error:.3f}",
    )


def _ratio(guesses: Guesses) -> str:
    if guesses.denoising_gradient == 0:
        return "-"
    return f"{guesses.auxiliary_gradient / guesses.denoising_gradient:.2g}"


def _price_list(diagnosis: Diagnosis) -> list[str]:
    """Lists for each rise of the denoising loss the weight of each weighting that causes it, and the fall of L'."""
    lines = []
    for rise, costs in diagnosis.affordable.items():
        rows = [("weighting", "weight", "L' falls by", "largest rise at one t")]
        rows += [
            (cost.weighting, f"{cost.weight:.3g}", f"{cost.fall:.1%}", f"{cost.largest_rise:.0%}") for cost in costs
        ]
        none = [] if costs else ["  no weighting makes it rise that much, at any weight"]
        lines += [f"For a rise of the denoising loss by {rise:.0%}:", *(_aligned(rows) if costs else none), ""]
    return lines


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(map(str.rjust, row, widths)) for row in rows]


def _finite(value):
    if isinstance(value, dict):
        return {str(name): _finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
