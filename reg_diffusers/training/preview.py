"""Pictures of samples while a model learns."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch
from accelerate import Accelerator
from torch import Tensor

from ..files import write_whole
from ..pipeline import RegDDPMPipeline, fast_scheduler
from ..regularizers import score
from ..term import Term
from .checks import random_numbers_as_before
from .data import TrainingData

__all__ = ["captioned_grid", "conditions_of", "draw_samples", "grid", "preview_conditions", "sampling_pipeline"]
__all__ += ["save_preview"]

_SMALLEST_SIDE = 64  # pixels at which a sample is shown at least
_SMALLEST_CAPTIONED_SIDE = 112  # with a number under it
_GAP = 12  # between captioned samples, and around them
_INK, _GREY = (32, 32, 32), (110, 110, 110)


def sampling_pipeline(unet, noise_scheduler, data: TrainingData) -> RegDDPMPipeline:
    """The pipeline that is saved: the network with its training scheduler and, for fields, their normalization."""
    normalization = None
    if not data.is_picture:
        normalization = {"offset": list(data.normalization.offset), "scale": list(data.normalization.scale)}
    pipeline = RegDDPMPipeline(unet, noise_scheduler, normalization=normalization)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_samples(
    pipeline: RegDDPMPipeline, number: int, steps: int, seed: int, batch_size: int = 64, **conditions: Tensor
) -> Tensor:
    """Samples (N, C, H, W) of `fast_scheduler`, unclipped, from the same noise for the same seed.

    Args:
        pipeline: of the network.
        number: of samples, N.
        steps: calls of the network for each.
        seed: of the noise.
        batch_size: samples drawn at a time.
        **conditions: class_labels (N,) and condition (N, K, H, W) where the network wants them.
    """
    # The identity in place of the picture's or field's own units: samples come as they are, not clipped.
    channels = pipeline.unet.config.out_channels
    as_it_is = {"offset": [0.0] * channels, "scale": [1.0] * channels}
    sampler = RegDDPMPipeline(pipeline.unet, fast_scheduler(pipeline.scheduler), as_it_is)
    sampler.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for start in range(0, number, batch_size):
        size = min(batch_size, number - start)
        given = {name: tensor[start : start + size] for name, tensor in conditions.items()}
        drawn.append(sampler(size, generator, steps, output_type="pt", **given).images.float())
    return torch.cat(drawn)


def preview_conditions(data: TrainingData, number: int) -> dict[str, Tensor]:
    """What to condition `number` samples on: all classes in turn, or the first images of the data."""
    if data.condition_channels:
        batch = data.examples.__getitems__([index % len(data.examples) for index in range(number)])
        return conditions_of(data, batch)
    return {"class_labels": torch.arange(number) % len(data.classes)} if data.classes is not None else {}


def conditions_of(data: TrainingData, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The part of a batch of data that a network is conditioned on, images in [-1, 1]."""
    conditions = {name: batch[name] for name in ("class_labels", "condition") if name in batch}
    if "condition" in conditions:
        conditions["condition"] = data.normalization.normalize(conditions["condition"])
    return conditions


def save_preview(
    accelerator: Accelerator,
    pipeline: RegDDPMPipeline,
    conditions: dict[str, Tensor],
    path: Path,
    args: argparse.Namespace,
    step: int,
    terms: tuple[Term, ...] = (),
    means_on_data: dict[str, float] | None = None,
) -> None:
    """One grid of samples, from the same noise at every call; drawn by the main process.

    Under each is L' of the terms, but of those that need more than a sample and what it is conditioned on.
    """
    if not accelerator.is_main_process:
        return
    samples = draw_samples(pipeline, args.eval_batch_size, args.ddpm_num_inference_steps, args.seed, **conditions)
    values = _values(samples.to(accelerator.device), terms, conditions)
    picture = captioned_grid(samples, values, f"step {step:,}", means_on_data or {}) if values else grid(samples)
    write_whole(path, picture.save)


def _values(samples: Tensor, terms: tuple[Term, ...], conditions: dict[str, Tensor]) -> dict[str, list[float]]:
    """L' of each sample by the terms' names; what a regularizer draws at random changes nothing for the training."""
    values = {}
    with random_numbers_as_before(samples.device):
        for term in terms:
            needs = getattr(term.regularizer, "needs", ())
            if all(need in conditions for need in needs):
                given = {need: conditions[need].to(samples.device) for need in needs}
                values[term.name] = score(term.regularizer, samples, **given).tolist()
    return values


def grid(samples: Tensor, gap: int = 1) -> PIL.Image.Image:
    """Samples (N, C, H, W) in [-1, 1] as one nearly square picture; of other than 3 channels the first is shown."""
    number, channels, height, width = samples.shape
    samples = samples if channels == 3 else samples[:, :1].expand(-1, 3, -1, -1)
    columns = math.ceil(math.sqrt(number))
    rows = math.ceil(number / columns)
    canvas = torch.ones(3, rows * (height + gap) - gap, columns * (width + gap) - gap)
    for place, sample in enumerate(samples.cpu()):
        top, left = place // columns * (height + gap), place % columns * (width + gap)
        canvas[:, top : top + height, left : left + width] = sample
    pixels = ((canvas + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    zoom = max(math.ceil(_SMALLEST_SIDE / max(height, width)), 1)
    return PIL.Image.fromarray(pixels).resize(
        (pixels.shape[1] * zoom, pixels.shape[0] * zoom), PIL.Image.Resampling.NEAREST
    )


def captioned_grid(
    samples: Tensor, values: dict[str, list[float]], title: str, means_on_data: dict[str, float]
) -> PIL.Image.Image:
    """Samples as `grid` shows them, each with its values under it, and what they are above all.

    Args:
        samples: (N, C, H, W) in [-1, 1].
        values: by the name of a loss, one number for each sample.
        title: first words of the heading.
        means_on_data: by the same names, the mean over the data, where it is known.
    """
    size, small = PIL.ImageFont.load_default(15), PIL.ImageFont.load_default(13)
    zoom = max(math.ceil(_SMALLEST_CAPTIONED_SIDE / max(samples.shape[2:])), 1)
    height, width = (zoom * side for side in samples.shape[2:])
    columns = math.ceil(math.sqrt(len(samples)))
    rows = math.ceil(len(samples) / columns)
    line = 18
    order = ", in this order" if len(values) > 1 else ""
    heading = [
        f"{title}, L' under each picture{order}",
        *(_said(name, numbers, means_on_data.get(name)) for name, numbers in values.items()),
    ]
    top = 2 * _GAP + (line + 2) * len(heading)
    cell_height = height + line * len(values) + _GAP
    wanted = max(small.getlength(text) for text in heading) + 2 * _GAP
    canvas_width = max(columns * (width + _GAP) + _GAP, math.ceil(wanted))
    canvas = PIL.Image.new("RGB", (canvas_width, top + rows * cell_height + _GAP // 2), "white")
    draw = PIL.ImageDraw.Draw(canvas)
    for number, text in enumerate(heading):
        place = (_GAP, _GAP + (line + 2) * number)
        draw.text(place, text, _GREY if number else _INK, small if number else size)
    for number, sample in enumerate(samples):
        left = _GAP + number % columns * (width + _GAP)
        upper = top + number // columns * cell_height
        shown = grid(sample[None]).resize((width, height), PIL.Image.Resampling.NEAREST)
        canvas.paste(shown, (left, upper))
        for place, numbers in enumerate(values.values()):
            below = (left + width / 2, upper + height + 3 + line * place)
            draw.text(below, f"{numbers[number]:#.3g}".rstrip("."), _INK, small, anchor="ma")
    return canvas


def _said(name: str, numbers: list[float], mean_on_data: float | None) -> str:
    data = "" if mean_on_data is None else f", data {mean_on_data:.3g}"
    return f"{name}: mean {sum(numbers) / len(numbers):.3g}{data}"
