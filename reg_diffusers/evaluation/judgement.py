"""Models judged by pairs: L' on samples, and the distance of the samples to the data, each with its uncertainty.

The data themselves are a row, too: one half of them against the other half, in the same number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..regularizers import Regularizer, score
from .distances import Estimate, frechet, jackknife, kernel, manifolds, mean_of, nearest, share_of
from .features import Features
from .metrics import sliced_wasserstein

__all__ = [
    "SLICED",
    "Copies",
    "Row",
    "compare_rows",
    "copies_of",
    "describe_rows",
    "find_copies",
    "judge_samples",
    "table_cells",
    "tell_not_finite",
    "write_rows",
]

SLICED = "sliced Wasserstein"
_NEAR = 0.05
_SCORED_AT_A_TIME = 256


@dataclass(frozen=True)
class Copies:
    """How near samples are to single images of the data.

    Attributes:
        distances: (N,) from each sample to its nearest image, in the features' units.
        indices: (N,) the numbers of those images among the searched.
        limit: so near, or nearer, is 1 of 20 images of the data to its nearest other; 0 where many are there twice.
    """

    distances: Tensor
    indices: Tensor
    limit: float

    @property
    def near(self) -> Tensor:
        """Which samples are within the limit, (N,) bool."""
        return self.distances <= self.limit

    @property
    def share(self) -> Estimate:
        """Of samples that are; about 0.05 for the data themselves."""
        return share_of(self.near)


@dataclass(frozen=True)
class Row:
    """One set of images.

    Attributes:
        images: their number.
        terms: L' of each regularizer, mean over the images.
        distances: to the data, by name; the first is the one to look at.
        near_copies: see `Copies.share`; None where it was not asked.
        denoising_loss: on fixed images, noise and timesteps; None where it was not asked.
        not_finite: how many of the images hold a value that is not finite; their L' and distances are no numbers.
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
    samples: Tensor,
    reference: Tensor,
    regularizers: Mapping[str, Regularizer],
    *,
    features: Features | None = None,
    vectors: tuple[Tensor, Tensor] | None = None,
    copies: Copies | None = None,
    denoising_loss: float | None = None,
    **context: Tensor,
) -> Row:
    """Measures samples against reference images of the same number and shape.

    Args:
        samples: (N, C, H, W) in [-1, 1].
        reference: (N, C, H, W).
        regularizers: by name.
        features: that the distances are named after, if there are distances of features.
        vectors: the features of samples and reference, (N, D) each.
        copies: what `find_copies` found.
        denoising_loss: to be kept beside.
        **context: what regularizers may need of each sample, (N, ...).

    Raises:
        ValueError: too few samples, see `jackknife`.
    """
    terms = {name: mean_of(_scores(regularizer, samples, context)) for name, regularizer in regularizers.items()}
    distances = {}
    if features is not None and features.frechet:
        of_samples, of_reference = vectors
        distances[features.frechet] = jackknife(lambda part: frechet(part, of_reference), of_samples)
        distances[features.kernel] = jackknife(lambda part: kernel(part, of_reference), of_samples)
        distances |= jackknife(lambda part: manifolds(part, of_reference), of_samples)
    # Of two sets of one size only: both lose a group.
    distances[SLICED] = jackknife(sliced_wasserstein, samples, reference)
    not_finite = len(samples) - int(samples.flatten(1).isfinite().all(1).sum())
    return Row(len(samples), terms, distances, copies and copies.share, denoising_loss, not_finite)


def _scores(regularizer: Regularizer, samples: Tensor, context: dict[str, Tensor]) -> Tensor:
    needs = {need: context[need] for need in getattr(regularizer, "needs", ())}
    return torch.cat(
        [
            score(
                regularizer, samples[part], **{name: value[part.to(value.device)] for name, value in needs.items()}
            ).cpu()
            for part in torch.arange(len(samples)).split(_SCORED_AT_A_TIME)
        ]
    )


def find_copies(vectors: Tensor, searched: Tensor, own: Tensor) -> Copies:
    """The nearest image of the data to each sample, and how many samples are as near as few data are to each other.

    Args:
        vectors: features of the samples, (N, D).
        searched: features of images of the data, (M, D).
        own: what `nearest(searched, searched, same=True)` found as distances, (M,).
    """
    distances, indices = nearest(vectors, searched)
    return copies_of(distances, indices, own)


def copies_of(distances: Tensor, indices: Tensor, own: Tensor) -> Copies:
    """The same where the nearest images are known."""
    limit = torch.quantile(own.cpu().double(), _NEAR).item()
    return Copies(distances.cpu(), indices.cpu(), limit)


def compare_rows(rows: Mapping[str, Row]) -> list[str]:
    """Sentences: each model against the data, and against the first model, with what the numbers can tell."""
    (_, of_data), *models = rows.items()
    first, of_first = models[0]
    said = tell_not_finite(rows)
    for title, row in models:
        for name in row.terms:
            said.append(_against_data(title, name, row, of_data))
    for title, row in models[1:]:
        parts = [_change(name, row.terms[name], of_first.terms[name]) for name in row.terms]
        name, distance = row.distance
        parts.append(_change(name, distance, of_first.distances[name]))
        said.append(f"{title} against {first}: {'; '.join(parts)}.")
    return said


def tell_not_finite(rows: Mapping[str, Row]) -> list[str]:
    """A sentence for each set of images that are not all finite."""
    return [
        f"{title}: {row.not_finite:,} of {row.images:,} images are not finite, so their mean L' and distances are"
        " no numbers."
        for title, row in rows.items()
        if row.not_finite
    ]


def _differ(one: Estimate, other: Estimate) -> bool:
    return abs(one.value - other.value) > math.hypot(one.half_width, other.half_width)


def _change(name: str, now: Estimate, before: Estimate) -> str:
    by = math.hypot(now.half_width, before.half_width)
    if not math.isfinite(now.value - before.value):
        return f"{name} cannot be compared ({now.value:.3g} and {before.value:.3g})"
    if not _differ(now, before):
        return f"{name} no difference shown ({now.value - before.value:+.3g} ± {by:.2g})"
    word = "lower" if now.value < before.value else "higher"
    relative = f", {now.value / before.value - 1:+.0%}" if before.value > 0 else ""
    return f"{name} {word} by {abs(now.value - before.value):.3g} ± {by:.2g}{relative}"


def _against_data(title: str, name: str, row: Row, of_data: Row) -> str:
    """L' against that of the data, never without the distance, beside the distance of the data to themselves."""
    model, data = row.terms[name], of_data.terms[name]
    what, distance = row.distance
    own = of_data.distances[what]
    pair = f"({model.value:.3g}, data {data.value:.3g}), at {what} {distance.value:.3g} (data {own.value:.3g})."
    if not math.isfinite(model.value - data.value):
        return f"{title}: {name} cannot be compared with the data's {pair}"
    if not _differ(model, data):
        return f"{title}: {name} like the data's {pair}"
    if model.value > data.value:
        return f"{title}: {name} above the data's {pair}"
    return f"{title}: {name} below the data's {pair} Below is no merit by itself: real images are not so."


def describe_rows(rows: Mapping[str, Row]) -> str:
    """The table as text: a line for each number, a column for each set of images, ± half of a 95 % interval."""
    cells = table_cells(rows)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in cells
    )


def table_cells(rows: Mapping[str, Row]) -> list[list[str]]:
    """The cells of the table, line by line; the first line holds the titles."""
    some = next(iter(rows.values()))
    lines = [["", *rows]]
    for name in some.terms:
        lines.append([name, *(_cell(row.terms[name]) for row in rows.values())])
    for name in some.distances:
        lines.append([name, *(_cell(row.distances[name]) for row in rows.values())])
    if any(row.near_copies for row in rows.values()):
        shares = [row.near_copies for row in rows.values()]
        lines.append(["near copies", *("" if share is None else _percent(share) for share in shares)])
    if any(row.denoising_loss is not None for row in rows.values()):
        losses = [row.denoising_loss for row in rows.values()]
        lines.append(["denoising loss", *("" if loss is None else f"{loss:.5g}" for loss in losses)])
    return lines


def _cell(estimate: Estimate) -> str:
    """Rounded where the uncertainty says so: two digits of it."""
    if not (math.isfinite(estimate.value) and estimate.half_width > 0):
        return f"{estimate.value:.4g}"
    places = max(1 - math.floor(math.log10(estimate.half_width)), 0)
    if places > 6:
        return f"{estimate.value:.3g} ± {estimate.half_width:.1e}"
    return f"{estimate.value:.{places}f} ± {estimate.half_width:.{places}f}"


def _percent(share: Estimate) -> str:
    return f"{100 * share.value:.1f} ± {100 * share.half_width:.1f} %"


def write_rows(path: Path, rows: Mapping[str, Row], **settings) -> None:
    """Writes the rows, and the settings under which they were measured, as JSON.

    A confidence interval is [low, high]; what is not a finite number is null.
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
