"""Renders two runs as HTML: their images, L' as a number, L' over the steps."""

from __future__ import annotations

import base64
import io
import math
from html import escape

from ..training.preview import grid
from .sampling import Run

__all__ = ["show"]

_STYLE = """<style>
.gradio-container { --block-info-text-color: color-mix(in srgb, currentColor 75%, transparent); }
.runs { display: flex; flex-wrap: wrap; gap: 1rem; }
.runs figure { flex: 1 1 9rem; margin: 0; }
.runs figcaption { font-weight: 600; }
.runs img { width: 100%; aspect-ratio: 1; object-fit: contain; image-rendering: pixelated; }
.runs img, .runs .empty { margin: .3rem 0; background: #8883; border-radius: 4px; }
.runs .empty { aspect-ratio: 1; }
.runs output { font-size: 1.6rem; font-variant-numeric: tabular-nums; }
.curve + p { margin-top: .5rem; }
.curve { width: 100%; height: auto; margin-top: 1rem; }
.curve text { fill: currentColor; font-size: 13px; }
@media (max-width: 45rem) {
  #controls { order: 1; }
  .runs { gap: .6rem; }
  .runs figure { flex-basis: 0; }
  .runs figcaption { min-height: 2.8em; }
  .curve text { font-size: 20px; }
}
.curve path { fill: none; stroke: currentColor; stroke-width: 2.5; }
.curve .plain { stroke-dasharray: 7 5; opacity: .65; }
.curve .data { stroke-dasharray: 2 4; opacity: .8; }
.curve .axis { stroke-width: 1; opacity: .4; }
</style>"""
_WIDTH, _HEIGHT = 640, 232  # size of the curve, in SVG units
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 40, 42  # its margins


def show(name: str, description: str, plain: Run, guided: Run, mean_on_data: float | None = None) -> str:
    """Renders the current state of both runs.

    Args:
        name: the name of the regularizer.
        description: its description, one line.
        plain: the run without guidance.
        guided: the run with guidance.
        mean_on_data: the mean of L' over images of the data, if it is known.
    """
    titles = "Without guidance", f"With guidance, scale {guided.regularizer_scale:g}"
    figures = "".join(
        _figure(key, title, run) for key, title, run in zip(("plain", "guided"), titles, (plain, guided), strict=True)
    )
    about = f"<p>L' is <code>{escape(name)}</code>. {escape(description)}</p>"
    status = _status(plain, guided)
    if mean_on_data is not None:
        status += f" Images of the data have {mean_on_data:.4g}; going below that is no improvement."
    return (
        f"{_STYLE}<div class='runs'>{figures}</div><p id='status'>{status}</p>"
        f"{_curve(plain, guided, mean_on_data)}{about}"
    )


def _figure(key: str, title: str, run: Run) -> str:
    values = [run.score] if run.score is not None else run.values[-1:]
    number = f"{values[0]:.4g}" if values else "…"
    picture = "<div class='empty'></div>"
    if run.images is not None:
        picture = f"<img id='{key}-picture' alt='{title}' decoding='sync' src='{_data_url(run)}'/>"
    label = f"<label for='{key}-score'>L' = </label><output id='{key}-score'>{number}</output>"
    return f"<figure><figcaption>{title}</figcaption>{picture}{label}</figure>"


def _data_url(run: Run) -> str:
    """Embeds the image in the page: it arrives together with its number, and leaves no file behind."""
    file = io.BytesIO()
    grid(run.images).save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _status(plain: Run, guided: Run) -> str:
    if plain.score is None or guided.score is None:
        step = min(len(plain.values), len(guided.values))
        return f"Step {step} of {guided.settings.steps}: x̂₀, the current estimate of the finished images."
    before, after = plain.score, guided.score
    if guided.regularizer_scale == 0:
        return "Done. The scale is 0: no guidance, so both runs are equal."
    if not before > 0:  # also if it is nan
        return f"Done. Guidance changed L' from {before:.4g} to {after:.4g}."
    change = f"by {abs(after / before - 1):.1%}"
    return (
        f"Done. Guidance lowered L' {change}."
        if after < before
        else f"Done. L' rose {change}: a guidance step was too long. Try a smaller scale."
    )


def _curve(plain: Run, guided: Run, mean_on_data: float | None) -> str:
    """Draws L' of x0_hat over the steps as SVG: dashed without guidance, solid with it, dotted for the data."""
    steps = max(guided.settings.steps, len(plain.values), len(guided.values))
    known = [] if mean_on_data is None or not math.isfinite(mean_on_data) else [mean_on_data]
    top = _round_up(max(filter(math.isfinite, [*plain.values, *guided.values, *known]), default=0))

    def x(step: float) -> float:
        return _LEFT + (step - 1) / max(steps - 1, 1) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - value / top * (_HEIGHT - _TOP - _BOTTOM)

    def line(values: list[float]) -> str:
        places = [f"{x(step):.1f} {y(v):.1f}" for step, v in enumerate(values, start=1) if math.isfinite(v)]
        return "M" + "L".join([*places, places[-1]]) if places else ""

    grid_lines = "".join(f"M{_LEFT} {y(value):.1f}H{_WIDTH - _RIGHT}" for value in (0, top / 2, top))
    marks = "".join(
        f"<text x='{_LEFT - 6}' y='{y(value) + 4:.1f}' text-anchor='end'>{value:g}</text>"
        for value in (0, top / 2, top)
    )
    marks += "".join(
        f"<text x='{x(step):.1f}' y='{_HEIGHT - 22}' text-anchor='middle'>{step}</text>" for step in {1, steps}
    )
    of_data = "".join(f"<path class='data' d='M{_LEFT} {y(value):.1f}H{_WIDTH - _RIGHT}'/>" for value in known)
    kinds = f"dashed: without guidance{'; dotted: data' if known else ''}"
    return (
        f"<svg class='curve' viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img'"
        ' aria-label="L\' of x̂₀ at each step">'
        f"<text x='0' y='16'>L'(x̂₀), mean of the images</text>"
        f"<path class='axis' d='{grid_lines}'/>{marks}"
        f"<text x='{_WIDTH / 2}' y='{_HEIGHT - 6}' text-anchor='middle'>step ({kinds})</text>"
        f"{of_data}<path class='plain' d='{line(plain.values)}'/><path d='{line(guided.values)}'/></svg>"
    )


def _round_up(value: float) -> float:
    """Rounds up to 1, 2, 4, 6, 8 or 10 times a power of ten."""
    if not value > 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(round(factor * power, 12) for factor in (1, 2, 4, 6, 8, 10, 20) if factor * power >= value)
