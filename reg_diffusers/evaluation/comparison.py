"""What the extra losses did to a model, and what they cost.

Two models, trained on the same batches and noise with and without the extra losses, are asked for samples from the
same noise in the same steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..conditioning import with_condition
from ..measurement import Measurement
from ..objective import RegularizedLoss
from ..regularizers import score
from ..term import Term
from .metrics import sliced_wasserstein

__all__ = ["denoising_loss", "draw_comparison", "measure", "verdict"]

_NOISE_LEVELS_PER_IMAGE = 4


def measure(
    samples: Tensor,
    reference: Tensor,
    terms: Sequence[Term],
    denoising_loss: float | None = None,
    **conditions: Tensor,
) -> Measurement:
    """Measures samples (N, C, H, W) in [-1, 1] against reference images of the same number and shape.

    Terms whose regularizer needs more than the image and its `conditions` (class_labels, condition) are left out.
    """
    means, errors = {}, {}
    for term in terms:
        needs = getattr(term.regularizer, "needs", ())
        if any(need not in conditions for need in needs):
            continue
        values = score(term.regularizer, samples, **{need: conditions[need] for need in needs})
        means[term.name] = values.mean().item()
        errors[term.name] = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Measurement(len(samples), means, errors, sliced_wasserstein(samples, reference), denoising_loss)


@torch.no_grad()
def denoising_loss(unet, noise_scheduler, original_samples: Tensor, seed: int, **conditions: Tensor) -> float:
    """The plain denoising loss of a model on fixed images, noise and timesteps, the same for every model.

    Timesteps are spread evenly over the schedule, so that a few hundred images suffice.

    Args:
        unet: the network, in evaluation mode.
        noise_scheduler: the scheduler it was trained with.
        original_samples: (N, C, H, W) images in [-1, 1].
        seed: of the noise.
        **conditions: what the network is conditioned on: class_labels (N,), condition (N, K, H, W).
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
            given = {name: tensor[batch] for name, tensor in conditions.items()}
            output = loss_fn(
                with_condition(unet, given.pop("condition", None)),
                original_samples[batch],
                noise=noise[batch].to(original_samples.device),
                timesteps=timesteps[batch],
                model_kwargs=given,
            )
            total += len(batch) * output.loss.item()
    return total / (number * _NOISE_LEVELS_PER_IMAGE)


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
