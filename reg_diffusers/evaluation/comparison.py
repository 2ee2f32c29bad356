"""What the extra losses did to a model, and what they cost.

Two models, trained on the same batches and noise with and without the extra losses, are asked for samples from the
same noise in the same steps. Always in pairs: L' alone says nothing, a model that draws only grey has no variation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..objective import RegularizedLoss, Term
from ..regularizers import score
from .metrics import sliced_wasserstein

__all__ = [
    "Measurement",
    "denoising_loss",
    "draw_comparison",
    "markdown_table",
    "measure",
    "read_comparison",
    "table",
    "verdict",
    "write_comparison",
]

_NOISE_LEVELS_PER_IMAGE = 4


@dataclass(frozen=True)
class Measurement:
    """One set of images, as a row of the table.

    Attributes:
        images: number of images.
        terms: L' of each regularizer: mean over the images.
        standard_errors: of these means.
        distance: sliced Wasserstein distance to the data, in pixel values; for the data, between two halves of them.
        denoising_loss: mean over fixed images, noise and timesteps; None for the data.
    """

    images: int
    terms: dict[str, float]
    standard_errors: dict[str, float]
    distance: float
    denoising_loss: float | None = None


def measure(
    samples: Tensor, reference: Tensor, terms: Sequence[Term], denoising_loss: float | None = None
) -> Measurement:
    """Measures samples (N, C, H, W) in [-1, 1] against reference images of the same number and shape.

    Terms whose regularizer needs more than the image are left out.
    """
    means, errors = {}, {}
    for term in terms:
        if getattr(term.regularizer, "needs", ()):
            continue
        values = score(term.regularizer, samples)
        means[term.name] = values.mean().item()
        errors[term.name] = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Measurement(len(samples), means, errors, sliced_wasserstein(samples, reference), denoising_loss)


@torch.no_grad()
def denoising_loss(unet, noise_scheduler, original_samples: Tensor, class_labels: Tensor | None, seed: int) -> float:
    """The plain denoising loss of a model on fixed images, noise and timesteps, the same for every model.

    Timesteps are spread evenly over the schedule, so that a few hundred images suffice.

    Args:
        unet: the network, in evaluation mode.
        noise_scheduler: the scheduler it was trained with.
        original_samples: (N, C, H, W) images in [-1, 1].
        class_labels: (N,) for a class-conditional network.
        seed: of the noise.
    """
    loss_fn = RegularizedLoss(noise_scheduler)
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    number = len(original_samples)
    for repetition in range(_NOISE_LEVELS_PER_IMAGE):
        levels = (torch.randperm(number, generator=generator) + (repetition + 0.5) / _NOISE_LEVELS_PER_IMAGE) / number
        timesteps = (levels * noise_scheduler.config.num_train_timesteps).long()
        noise = torch.randn(original_samples.shape, generator=generator)
        for batch in torch.arange(number).split(64):
            total += (
                len(batch)
                * loss_fn(
                    unet,
                    original_samples[batch],
                    noise=noise[batch].to(original_samples.device),
                    timesteps=timesteps[batch],
                    model_kwargs=None if class_labels is None else {"class_labels": class_labels[batch]},
                ).loss.item()
            )
    return total / (number * _NOISE_LEVELS_PER_IMAGE)


def table(rows: dict[str, Measurement]) -> str:
    """The rows as text: L' with its standard error, distance to the data, denoising loss."""
    lines = _cells(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def markdown_table(rows: dict[str, Measurement]) -> str:
    """What `table` shows, in Markdown."""
    lines = _cells(rows)
    head, *body = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, "|---" * len(lines[0]) + "|", *body])


def _cells(rows: dict[str, Measurement]) -> list[list[str]]:
    names = list(next(iter(rows.values())).terms)
    head = ["", *names, "distance to data", "denoising loss"]
    body = [
        [
            title,
            *(f"{row.terms[name]:.4f} ± {row.standard_errors[name]:.4f}" for name in names),
            f"{row.distance:.4f}",
            "" if row.denoising_loss is None else f"{row.denoising_loss:.5f}",
        ]
        for title, row in rows.items()
    ]
    return [head, *body]


def verdict(plain: Measurement, regularized: Measurement) -> str:
    """One sentence per term on effect and cost, in numbers."""
    cost = regularized.denoising_loss / plain.denoising_loss - 1
    away = regularized.distance / plain.distance - 1
    effects = ", ".join(
        f"{name} {regularized.terms[name] / plain.terms[name] - 1:+.1%}" for name in plain.terms if plain.terms[name]
    )
    if not effects:
        effects = "cannot be said, because the losses need more than a sample"
    return (
        f"With the loss, samples change by: {effects}. Its cost: denoising loss {cost:+.1%}, distance to the data"
        f" {away:+.1%}."
    )


def write_comparison(path: Path, rows: dict[str, Measurement], **settings) -> None:
    """Writes the rows and the settings under which they were measured as JSON."""
    path.write_text(json.dumps({"rows": {title: asdict(row) for title, row in rows.items()}, **settings}, indent=2))


def read_comparison(path: Path) -> dict[str, Measurement]:
    """The rows that `write_comparison` wrote."""
    return {title: Measurement(**row) for title, row in json.loads(path.read_text())["rows"].items()}


def draw_comparison(path: Path, pictures: dict[str, object], rows: dict[str, Measurement]) -> None:
    """One picture: the grids of all rows side by side, each with its numbers under it.

    Args:
        path: a PNG file.
        pictures: a PIL image for each row.
        rows: what was measured, with the keys of `pictures`.
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
