"""Compares a model trained with the auxiliary losses to one trained without them: effect and cost.

Both models are trained on the same batches and noise, and both draw samples from the same initial noise in the same
number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ..runs.measurement import Measurement
from ..term import Term
from .distances import NORMAL, Estimate, mean_of
from .judgement import change
from .measuring import distance_to_data, mean_loss

__all__ = ["describe_change", "difference", "draw_comparison", "measure"]


def measure(
    samples: Tensor,
    reference: Tensor,
    terms: Sequence[Term],
    denoising_loss: float | None = None,
    **conditions: Tensor,
) -> Measurement:
    """Measures samples (N, C, H, W) in [-1, 1] against reference images of the same number and shape.

    Skips the terms that need more than the image and its `conditions`.
    """
    known = [term for term in terms if all(need in conditions for need in term.needs)]
    losses = {term.name: mean_loss(term, samples, conditions) for term in known}
    means = {name: loss.value for name, loss in losses.items()}
    errors = {name: loss.standard_error for name, loss in losses.items()}
    distance = distance_to_data(samples, reference)
    return Measurement(len(samples), means, errors, distance.value, denoising_loss, distance.half_width)


def describe_change(titles: tuple[str, str], plain: Measurement, regularized: Measurement, cost: Estimate) -> str:
    """Describes effect and cost in one sentence, in the words that `compare_rows` uses for `reg-diffusers evaluate`.

    Args:
        titles: the names of the two models, without and with the loss.
        plain: the measurement of the model without the loss.
        regularized: the measurement of the model with it.
        cost: the mean paired difference of their denoising losses.
    """
    parts = [change(name, _estimate(regularized, name), _estimate(plain, name)) for name in plain.terms]
    distances = (Estimate(row.distance, math.nan, row.distance_half_width) for row in (regularized, plain))
    parts.append(change("sliced Wasserstein", *distances))
    losses = (Estimate(row.denoising_loss, math.nan, math.nan) for row in (regularized, plain))
    parts.append(change("denoising loss", *losses, cost))
    return f"{titles[1]} against {titles[0]}: {'; '.join(parts)}."


def difference(one: Tensor, other: Tensor) -> Estimate:
    """Returns the mean paired difference of two models' values on the same images, (N,) each.

    The uncertainty is nan for a single image.
    """
    return mean_of(one - other) if len(one) > 1 else Estimate(float(one - other), math.nan, math.nan)


def _estimate(row: Measurement, name: str) -> Estimate:
    error = row.standard_errors[name]
    return Estimate(row.terms[name], error, NORMAL * error)


def draw_comparison(path: Path, pictures: dict[str, object], rows: dict[str, Measurement]) -> None:
    """Draws the image grids of all rows side by side, each with its measurements below.

    Args:
        path: the PNG file to write.
        pictures: one PIL image per row.
        rows: one measurement per row, with the keys of `pictures`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(pictures), 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, picture) in zip(
        figure.subplots(1, len(pictures), squeeze=False)[0], pictures.items(), strict=True
    ):
        row = rows[title]
        numbers = [f"{name} {value:.3f}" for name, value in row.terms.items()]
        numbers.append(f"distance to data {row.distance:.3f}")
        if row.denoising_loss is not None:
            numbers.append(f"denoising loss {row.denoising_loss:.4f}")
        axes.imshow(picture, interpolation="nearest")
        axes.set_title(title, fontsize=13)
        axes.set_xlabel("\n".join(numbers), fontsize=11)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.savefig(path, dpi=110, bbox_inches="tight")
