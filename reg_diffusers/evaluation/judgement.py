"""Judges models by two numbers together: L' on their samples and the distance of the samples to the data.

Each number has its uncertainty. The data have a row of their own: one half against the other, equally large half.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..regularizers import Regularizer
from ..term import Term
from .distances import Estimate, frechet, jackknife, kernel, manifolds, paired, share_of
from .features import Features
from .images import Images, blocks
from .measuring import SLICED, distance_to_data, mean_loss

__all__ = [
    "SLICED",
    "Copies",
    "Row",
    "change",
    "compare_rows",
    "copies_of",
    "describe_nonfinite",
    "describe_rows",
    "judge_samples",
    "table_cells",
    "write_rows",
]

_NEAR = 0.05


@dataclass(frozen=True)
class Copies:
    """How close samples are to individual images of the data.

    Attributes:
        distances: (n,) the distance of each of the first samples to its nearest image, in units of the features.
        indices: (n,) the indices of those images among the images searched.
        limit: the 5 % quantile of the data's own nearest-neighbour distances; 0 if many images are duplicates.
    """

    distances: Tensor
    indices: Tensor
    limit: float

    @property
    def near(self) -> Tensor:
        """Whether each sample is within the limit, (n,) bool."""
        return self.distances <= self.limit

    @property
    def share(self) -> Estimate:
        """The share of samples within the limit; about 0.05 for the data."""
        return share_of(self.near)


@dataclass(frozen=True)
class Row:
    """The measurements of one set of images.

    Attributes:
        images: the number of images.
        terms: the mean of L' over the images, for each regularizer.
        distances: the distances to the data by name; the first is the main one.
        near_copies: see `Copies.share`; None if not measured.
        denoising_loss: the loss on fixed images, noise and timesteps; None if not measured.
        not_finite: the number of images with a non-finite value. Any of them makes L' and the distances nan.
    """

    images: int
    terms: dict[str, Estimate]
    distances: dict[str, Estimate] = field(default_factory=dict)
    near_copies: Estimate | None = None
    denoising_loss: float | None = None
    not_finite: int = 0

    @property
    def distance(self) -> tuple[str, Estimate]:
        """The first of the distances, with its name."""
        return next(iter(self.distances.items()))


def judge_samples(
    samples: Tensor | Images,
    reference: Tensor | Images,
    regularizers: Mapping[str, Regularizer | Term],
    *,
    features: Features | None = None,
    vectors: tuple[Tensor, Tensor] | None = None,
    copies: Copies | None = None,
    denoising_loss: float | None = None,
    **context: Tensor,
) -> Row:
    """Measures samples against reference images of the same number and shape.

    The distances that compare pairs (kernel distance, precision, recall, density, coverage) use the first PAIRED of
    both sets, and their intervals are for that number. Where images are left out, the jackknife drops a group of
    both sets, so that the interval also covers the choice of the reference images.

    Args:
        samples: (N, C, H, W) in [-1, 1].
        reference: (N, C, H, W).
        regularizers: the regularizers by name; a `Term` sees the samples through its view.
        features: the features that name the distances; None for the sliced Wasserstein distance only.
        vectors: the features of samples and reference, (N, D) each.
        copies: the result of `copies_of`.
        denoising_loss: a value to store in the row.
        **context: what the regularizers may need for each sample, (N, ...).

    Raises:
        ValueError: if there are too few samples, see `jackknife`.
    """
    terms = {
        name: mean_loss(regularizer if isinstance(regularizer, Term) else Term(regularizer, 1.0), samples, context)
        for name, regularizer in regularizers.items()
    }
    distances = {}
    if features is not None and features.frechet:
        of_samples, of_reference = vectors
        distances[features.frechet] = jackknife(lambda part: frechet(part, of_reference), of_samples)
        distances[features.kernel] = _of_pairs(kernel, of_samples, of_reference)
        distances |= _of_pairs(manifolds, of_samples, of_reference)
    # It needs two sets of the same size, so both lose a group.
    distances[SLICED] = distance_to_data(samples, reference)
    not_finite = len(samples) - sum(int(part.flatten(1).isfinite().all(1).sum()) for part in blocks(samples))
    return Row(len(samples), terms, distances, copies and copies.share, denoising_loss, not_finite)


def _of_pairs(statistic: Callable[..., float | dict], samples: Tensor, reference: Tensor):
    """Estimates a statistic that compares all pairs, on as many points of both sets as `paired` says."""
    number = paired(*samples.shape)
    if number == len(samples):
        return jackknife(lambda part: statistic(part, reference), samples)
    return jackknife(statistic, samples[:number], reference[:number])


def copies_of(distances: Tensor, indices: Tensor, own: Tensor) -> Copies:
    """Returns the near copies among samples, and the limit below which a sample is one.

    Args:
        distances: the distance of each sample to the nearest image of the data, (n,); see `nearest`.
        indices: the indices of those images, (n,).
        own: the same distances of images of the data to other images of the data, (m,).
    """
    limit = torch.quantile(own.cpu().double(), _NEAR).item()
    return Copies(distances.cpu(), indices.cpu(), limit)


def compare_rows(rows: Mapping[str, Row]) -> list[str]:
    """Compares each model to the data and to the first model, in sentences that claim only what the numbers show."""
    (_, of_data), *models = rows.items()
    first, of_first = models[0]
    sentences = [*describe_nonfinite(rows), *_describe_missing_recall(rows)]
    for title, row in models:
        for name in row.terms:
            sentences.append(_against_data(title, name, row, of_data))
    for title, row in models[1:]:
        parts = [change(name, row.terms[name], of_first.terms[name]) for name in row.terms]
        name, distance = row.distance
        parts.append(change(name, distance, of_first.distances[name]))
        sentences.append(f"{title} against {first}: {'; '.join(parts)}.")
    return sentences


def describe_nonfinite(rows: Mapping[str, Row]) -> list[str]:
    """Returns one sentence for each set with non-finite images."""
    return [
        f"{title}: {row.not_finite:,} of {row.images:,} images are non-finite, so mean L' and distances are nan."
        for title, row in rows.items()
        if row.not_finite
    ]


def _describe_missing_recall(rows: Mapping[str, Row]) -> list[str]:
    """Returns one sentence for each model with a meaningless precision: hardly any data lie among its samples."""
    return [
        f"{title}: precision {row.distances['precision'].value:.2g} means nothing at recall"
        f" {row.distances['recall'].value:.2g}: pure noise, or a single repeated image, can reach it."
        for title, row in rows.items()
        if _is_without_recall(row)
    ]


def _is_without_recall(row: Row) -> bool:
    """Whether samples lie among the data, but almost no data among the samples."""
    precision, recall = (row.distances.get(name) for name in ("precision", "recall"))
    return precision is not None and precision.value > _NEAR >= recall.value


def _differ(one: Estimate, other: Estimate) -> bool:
    return abs(one.value - other.value) > math.hypot(one.half_width, other.half_width)


def change(name: str, now: Estimate, before: Estimate, difference: Estimate | None = None) -> str:
    """Describes the difference of two measurements: lower or higher, by how much, or that no difference is shown.

    Args:
        name: the name of the number.
        now: the measurement that is described.
        before: the measurement that it is compared to.
        difference: the paired difference; None if the two measurements are independent.
    """
    by = math.hypot(now.half_width, before.half_width) if difference is None else difference.half_width
    moved = now.value - before.value
    if not math.isfinite(moved):
        return f"{name} cannot be compared ({now.value:.3g} and {before.value:.3g})"
    if not math.isfinite(by):
        return f"{name} {moved:+.3g}, too few images for a confidence interval"
    if not abs(moved) > by:
        return f"{name} shows no difference ({moved:+.3g} ± {by:.2g})"
    word = "lower" if moved < 0 else "higher"
    relative = f", {moved / before.value:+.1%}" if before.value > 0 else ""  # a share of a signed value is meaningless
    return f"{name} {word} by {abs(moved):.3g} ± {by:.2g}{relative}"


def _against_data(title: str, name: str, row: Row, of_data: Row) -> str:
    """Compares L' to that of the data; always adds the distance to the data and that between their halves."""
    model, data = row.terms[name], of_data.terms[name]
    what, distance = row.distance
    own = of_data.distances[what]
    pair = f"({model.value:.3g}, data {data.value:.3g}), at {what} {distance.value:.3g} (data {own.value:.3g})."
    if not math.isfinite(model.value - data.value):
        return f"{title}: {name} cannot be compared with the data's {pair}"
    if not _differ(model, data):
        return f"{title}: {name} is like the data's {pair}"
    if model.value > data.value:
        return f"{title}: {name} is above the data's {pair}"
    return (
        f"{title}: {name} is below the data's {pair} Lower than the data is not better: real images are not like that."
    )


def describe_rows(rows: Mapping[str, Row]) -> str:
    """Formats the table as text: one line per number, one column per set of images, ± half of a 95 % interval."""
    cells = table_cells(rows)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in cells
    )


def table_cells(rows: Mapping[str, Row]) -> list[list[str]]:
    """Returns the cells of the table, line by line; the first line holds the titles."""
    some = next(iter(rows.values()))
    lines = [["", *rows]]
    for name in some.terms:
        lines.append([name, *(_cell(row.terms[name]) for row in rows.values())])
    for name in some.distances:
        marks = ["!" if name == "precision" and _is_without_recall(row) else "" for row in rows.values()]
        cells = [_cell(row.distances[name]) for row in rows.values()]
        lines.append([name, *(f"{cell}{mark}" for cell, mark in zip(cells, marks, strict=True))])
    if any(row.near_copies for row in rows.values()):
        shares = [row.near_copies for row in rows.values()]
        lines.append(["near copies", *("" if share is None else _percent(share) for share in shares)])
    if any(row.denoising_loss is not None for row in rows.values()):
        losses = [row.denoising_loss for row in rows.values()]
        lines.append(["denoising loss", *("" if loss is None else f"{loss:.5g}" for loss in losses)])
    return lines


def _cell(estimate: Estimate) -> str:
    """Rounds a value to two digits of its uncertainty."""
    if not (math.isfinite(estimate.value) and estimate.half_width > 0):
        return f"{estimate.value:.4g}"
    places = max(1 - math.floor(math.log10(estimate.half_width)), 0)
    if places > 6:
        return f"{estimate.value:.3g} ± {estimate.half_width:.1e}"
    return f"{estimate.value:.{places}f} ± {estimate.half_width:.{places}f}"


def _percent(share: Estimate) -> str:
    return f"{100 * share.value:.1f} ± {100 * share.half_width:.1f} %"


def write_rows(path: Path, rows: Mapping[str, Row], **settings) -> None:
    """Writes the rows and the settings of the measurement as JSON.

    A confidence interval is [low, high]; a non-finite number is null.
    """
    stored = {"rows": {title: _plain(asdict(row)) for title, row in rows.items()}, **settings}
    path.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")


def _plain(value):
    if isinstance(value, dict) and "half_width" in value:
        low, high = value["value"] - value["half_width"], value["value"] + value["half_width"]
        shown = {"value": value["value"], "standard_error": value["standard_error"], "interval": [low, high]}
        return {name: _plain(entry) for name, entry in shown.items()}
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
