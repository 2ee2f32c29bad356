"""Grids of samples, drawn during a training."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch
from accelerate import Accelerator
from diffusers import DiTTransformer2DModel
from diffusers.utils import make_image_grid
from torch import Tensor

from ..data.training_data import TrainingData
from ..networks.conditions import Conditions
from ..networks.dit import RegDiTPipeline
from ..pipeline import RegDDPMPipeline, fast_scheduler
from ..runtime.errors import warn
from ..runtime.files import write_whole
from ..runtime.interruption import Interruption
from ..sampling.inference_steps import available_steps
from ..term import Term, score
from ..trial.checks import random_numbers_as_before
from .ending import Ending
from .trackers import Trackers

__all__ = ["Previews", "captioned_grid", "draw_samples", "grid", "inference_steps"]
__all__ += ["sampling_pipeline"]

_SMALLEST_SIDE = 64  # pixels: smaller samples are enlarged
_SMALLEST_CAPTIONED_SIDE = 112  # the same for samples with captions
_GAP = 12  # between captioned samples, and around them
_FIX = "the training continues; --eval_batch_size sets the size of a preview, --preview_steps the interval"
_INK, _GREY = (32, 32, 32), (110, 110, 110)


def sampling_pipeline(unet, noise_scheduler, data: TrainingData, vae=None) -> RegDDPMPipeline:
    """Builds the pipeline to save: network, training scheduler, autoencoder, and what is known of the data."""
    normalization = None
    if not data.is_picture:
        normalization = {"offset": list(data.normalization.offset), "scale": list(data.normalization.scale)}
    kind = RegDiTPipeline if isinstance(unet, DiTTransformer2DModel) else RegDDPMPipeline
    pipeline = kind(unet, noise_scheduler, normalization, vae, data.classes, data.white)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def inference_steps(asked: int, noise_scheduler) -> int:
    """Returns --ddpm_num_inference_steps; fewer, with a warning, if the schedule has fewer noise levels."""
    return available_steps(noise_scheduler, asked, warn, "--ddpm_num_inference_steps")


def draw_samples(
    pipeline: RegDDPMPipeline, number: int, steps: int, seed: int, batch_size: int | None = None, **conditions: Tensor
) -> Tensor:
    """Draws samples (N, C, H, W) with `fast_scheduler`, without clipping; equal seeds give equal noise.

    Latents are decoded.

    Args:
        pipeline: pipeline of the network.
        number: number of samples, N.
        steps: network calls per sample.
        seed: seed of the noise.
        batch_size: number of samples drawn at a time; by default, what usually fits into memory.
        **conditions: conditions of the samples; those that pipelines do not take have the pipeline's defaults.
    """
    sampler = pipeline.with_parts(scheduler=fast_scheduler(pipeline.scheduler))
    sampler.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    drawn, batch_size = [], batch_size or pipeline.typical_batch
    for start in range(0, number, batch_size):
        size = min(batch_size, number - start)
        given = Conditions(conditions).of_samples().of_images(slice(start, start + size))
        samples = sampler(size, generator, steps, output_type="latent", **given).images
        drawn.append(sampler.decode(samples).float())
    return torch.cat(drawn)


class Previews:
    """Draws grids of samples during a training, on the main process and from the same noise at every step.

    Below each sample is L' of the terms that need only a sample and its conditions. `ending` records a failure, and a
    signal stops the drawing, so that a picture cannot cost a trained model.

    Args:
        accelerator: accelerator of the training.
        draw: draws samples with the weights to sample from, see `draw_samples`: (number, steps, seed, **conditions).
        number: number of samples in a grid.
        num_inference_steps: network calls per sample.
        seed: seed of the noise.
        data: data of the training, for classes and conditions.
        output_dir: folder of the run; pictures are saved in its folder "samples".
        terms: terms of the loss.
        means_on_data: mean of L' on the data by the names of the terms, for the heading.
        interruption: interruption of the run.
        ending: ending of the run.
        trackers: logger, which gets the pictures, too.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        draw: Callable[..., Tensor],
        number: int,
        num_inference_steps: int,
        seed: int,
        data: TrainingData,
        output_dir: Path,
        terms: tuple[Term, ...],
        means_on_data: dict[str, float],
        interruption: Interruption,
        ending: Ending,
        trackers: Trackers,
    ):
        self._accelerator, self._draw_samples = accelerator, draw
        self._number, self._num_inference_steps, self._seed = number, num_inference_steps, seed
        self._folder = output_dir / "samples"
        self._terms, self._means_on_data = terms, means_on_data
        self._interruption, self._ending, self._trackers = interruption, ending, trackers
        self._conditions = Conditions.for_previews(data, number)

    def draw(self, step: int) -> None:
        """Saves the grid of a step as samples/step-STEP.png."""
        if self._accelerator.is_main_process:
            what, work = f"the preview of step {step}", partial(self._draw, step)
            self._interruption.cut_short(lambda: self._ending.attempt(what, _FIX, work))

    def _draw(self, step: int) -> None:
        samples = self._draw_samples(self._number, self._num_inference_steps, self._seed, **self._conditions)
        values = _values(samples.to(self._accelerator.device), self._terms, self._conditions)
        picture = captioned_grid(samples, values, f"step {step:,}", self._means_on_data) if values else grid(samples)
        write_whole(self._folder / f"step-{step:06d}.png", picture.save)
        self._trackers.log_picture("samples", picture, step)


def _values(samples: Tensor, terms: tuple[Term, ...], conditions: Conditions) -> dict[str, list[float]]:
    """Returns L' of each sample, by term; random numbers of a regularizer do not change those of the training."""
    values = {}
    with random_numbers_as_before(samples.device):
        for term in terms:
            if all(need in conditions for need in term.needs):
                given = {need: conditions[need].to(samples.device) for need in term.needs}
                values[term.name] = score(term, samples, given).tolist()
    return values


def grid(samples: Tensor, gap: int = 1) -> PIL.Image.Image:
    """Arranges samples (N, C, H, W) in [-1, 1] in a nearly square picture: RGB, RGBA on white, else channel 0."""
    number, channels, height, width = samples.shape
    if channels == 4:
        opacity = ((samples[:, 3:] + 1) / 2).clamp(0, 1)
        samples = samples[:, :3] * opacity + 1 - opacity
    samples = samples if channels in (3, 4) else samples[:, :1].expand(-1, 3, -1, -1)
    columns = math.ceil(math.sqrt(number))
    rows = math.ceil(number / columns)
    cells = torch.ones(rows * columns, 3, height + gap, width + gap)
    cells[:number, :, :height, :width] = samples.cpu()
    pixels = ((cells + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    picture = make_image_grid([PIL.Image.fromarray(cell) for cell in pixels], rows, columns)
    picture = picture.crop((0, 0, picture.width - gap, picture.height - gap))
    zoom = max(math.ceil(_SMALLEST_SIDE / max(height, width)), 1)
    return picture.resize((picture.width * zoom, picture.height * zoom), PIL.Image.Resampling.NEAREST)


def captioned_grid(
    samples: Tensor, values: dict[str, list[float]], title: str, means_on_data: dict[str, float]
) -> PIL.Image.Image:
    """Arranges samples as `grid` does, with the values of each below it and a heading above.

    Args:
        samples: samples in [-1, 1], (N, C, H, W).
        values: one number per sample, by the name of a loss.
        title: beginning of the heading.
        means_on_data: mean over the data, by the same names, where it is known.
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
        *(_summary(name, numbers, means_on_data.get(name)) for name, numbers in values.items()),
    ]
    top = 2 * _GAP + (line + 2) * len(heading)
    cell_height = height + line * len(values) + _GAP
    heading_width = max(small.getlength(text) for text in heading) + 2 * _GAP
    canvas_width = max(columns * (width + _GAP) + _GAP, math.ceil(heading_width))
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


def _summary(name: str, numbers: list[float], mean_on_data: float | None) -> str:
    data = "" if mean_on_data is None else f", data {mean_on_data:.3g}"
    return f"{name}: mean {sum(numbers) / len(numbers):.3g}{data}"
