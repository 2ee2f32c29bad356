"""Estimates how long a run takes and how much space its files need, before the first step."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, send_to_device
from torch import nn

from ..context import cut
from ..data.training_data import StreamedLatents, TrainingData, batches_per_epoch
from ..networks.attention import use_explicit_attention
from ..networks.build import GivenModel
from ..networks.computation import Computation
from ..networks.trained import trained_parameters
from ..objective import RegularizedLoss, draw_timesteps
from ..runs.lineage import named_checkpoint
from ..runs.manifest import read_manifest
from ..runs.run_folder import PLAIN_FOLDER
from ..runtime.amounts import duration_text, size_text
from ..runtime.errors import warn
from ..settings import Settings
from ..settings.optimization import OptimizationSettings
from ..settings.output import OutputSettings
from ..term import Term
from ..trial.checks import random_numbers_as_before
from .batches import Context
from .optimizer import bytes_of_moments
from .report import images_measured

__all__ = ["Speed", "describe_needs", "measure_speed", "number_of_steps"]

_SECONDS = 2.0  # of a measured step: a large network gets fewer images than a batch has
_BYTES = 4  # of a number: weights, moments of AdamW and averages are kept in float32


@dataclass(frozen=True)
class Speed:
    """Seconds per image.

    Attributes:
        step: forward and backward pass with the losses; in a stream of latents, also their encoding.
        call: one call of the network without a gradient, as in sampling.
    """

    step: float
    call: float


def describe_needs(
    settings: Settings,
    state: PartialState,
    data: TrainingData,
    given: GivenModel,
    unet,
    noise_scheduler,
    terms: tuple[Term, ...],
    computation: Computation,
    beside: int = 0,
) -> tuple[str, str]:
    """Returns the lines about the time and the disk that a run needs; `beside`: bytes saved with the network."""
    loss, optimization, output = settings.loss, settings.optimization, settings.output
    models = 2 if loss.compare and terms else 1
    measured = images_measured(data) if loss.compare or settings.hub.push_to_hub else 0
    active = tuple(replace(term, weight=term.weight or 1.0) for term in terms)  # a measured weight starts at 0
    speed = measure_speed(
        RegularizedLoss(noise_scheduler, active, snr_gamma=loss.snr_gamma, max_nonfinite_steps=None).to(state.device),
        unet,
        noise_scheduler,
        data,
        state,
        model=given.as_called(unet, data),
        mixed_precision=computation.mixed_precision.value,
        is_explicit=computation.attention.value == "explicit",
        batch_size=optimization.train_batch_size,
    )
    steps, _ = number_of_steps(optimization, data, state.num_processes)
    folders = (Path(output.output_dir), Path(output.output_dir, PLAIN_FOLDER))[:models]
    done = [_steps_done(output, folder) for folder in folders]
    needed = _time(speed, optimization, output, data, state.num_processes, done=done, measured=measured)
    trained = sum(parameter.numel() for parameter in trained_parameters(unet))
    whole = sum(parameter.numel() for parameter in unet.parameters())
    is_adapted = trained < whole  # by LoRA, which saves the trained parameters only
    kept, saved = (trained, _BYTES * trained) if is_adapted else (whole, _BYTES * whole + beside)
    moments = bytes_of_moments(trained_parameters(unet), optimization)
    named = "LoRA weights" if is_adapted else "a pipeline"
    return needed, _disk(
        saved, kept, trained, optimization, output, steps, models=models, named=named, moments=moments
    )


def number_of_steps(settings: OptimizationSettings, data: TrainingData, processes: int) -> tuple[int, float]:
    """Returns the steps of a training, and those of one epoch; the latter are infinite for a stream.

    Args:
        settings: settings with the length of the training and the size of a batch.
        data: the data; a stream of unknown length needs --max_train_steps.
        processes: number of processes.
    """
    batches = batches_per_epoch(data, settings.train_batch_size, processes)
    if batches is None:
        return settings.max_train_steps, math.inf
    per_epoch = math.ceil(batches / settings.gradient_accumulation_steps)
    steps = math.ceil(settings.num_epochs * batches / settings.gradient_accumulation_steps)
    return settings.max_train_steps or steps, per_epoch


def measure_speed(
    loss_fn: RegularizedLoss,
    unet: nn.Module,
    noise_scheduler,
    data: TrainingData,
    state: PartialState,
    *,
    model: Callable,
    mixed_precision: str,
    is_explicit: bool,
    batch_size: int,
) -> Speed | str:
    """Times a step on the first images, the faster of two; returns the reason if that is not possible.

    The network is left on the device of the training, with gradients removed and weights unchanged. The global random
    generators are left unchanged.

    Args:
        loss_fn: loss of the training.
        unet: a network like that of the training.
        noise_scheduler: scheduler of the training.
        data: data of the training.
        state: processes of the launch; with several on CPUs, the others are idle meanwhile.
        model: the network as a loss calls it.
        mixed_precision: precision of the training.
        is_explicit: whether attention is computed by explicit matrix products.
        batch_size: images per process and step.
    """
    if any(parse_flag_from_env(f"ACCELERATE_USE_{engine}") for engine in ("FSDP", "DEEPSPEED")):
        return "the network is sharded"
    device = state.device
    if is_explicit:
        use_explicit_attention(unet)
    unet.to(device).train()
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(mixed_precision)
    start = time.perf_counter()
    batch = data.examples.__getitems__(list(range(min(batch_size, len(data.examples)))))
    batch = send_to_device(batch, device)
    if device.type != "cpu":
        torch.accelerator.synchronize()
    encoding = (time.perf_counter() - start) / len(batch["ids"]) if isinstance(data, StreamedLatents) else 0.0
    samples, context = data.normalization.normalize(batch["values"]), Context.of_batch(data, batch)
    needed = context.needed(loss_fn.regularization.needs)

    def step(number: int, with_gradient: bool = True) -> float:
        rows = torch.arange(number, device=device) % len(samples)
        chosen, given = samples[rows], context.conditions.of_images(rows)
        bound, arguments = given.bind(model)
        timesteps, noise = draw_timesteps(noise_scheduler, number), torch.randn_like(chosen)
        arguments["return_dict"] = False
        start = time.perf_counter()
        with torch.set_grad_enabled(with_gradient), torch.autocast(device.type, dtype, enabled=dtype is not None):
            if with_gradient:
                of_rows = {name: cut(value, rows, len(samples), name) for name, value in needed.items()}
                output = loss_fn(bound, chosen, noise=noise, timesteps=timesteps, model_kwargs=arguments, **of_rows)
                output.loss.backward()
            else:
                bound(chosen, timesteps.to(device), **arguments)
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return (time.perf_counter() - start) / number

    try:
        with random_numbers_as_before(device):
            number = max(min(batch_size, int(_SECONDS / step(1))), 1)
            warm_up = step(number) if number > 1 else math.inf
            fastest = min(warm_up, step(number))  # other programs may delay one of them
            return Speed(fastest + encoding, step(number, with_gradient=False))
    except Exception as error:  # the training itself reports it, with the step
        return f"a step failed: {' '.join(str(error).split())[:80] or type(error).__name__}"
    finally:
        unet.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _time(
    speed: Speed | str,
    optimization: OptimizationSettings,
    output: OutputSettings,
    data: TrainingData,
    processes: int,
    *,
    done: list[int],
    measured: int,
) -> str:
    """Returns the line about the time of a run; of a resumed one, about what remains.

    Args:
        speed: the measured speed, or why there is none.
        optimization: settings of the optimization.
        output: settings of the output.
        data: data of the training.
        processes: number of processes.
        done: steps of each training before the checkpoint that it is resumed from, or 0.
        measured: samples of each model that are measured at the end.
    """
    steps, per_epoch = number_of_steps(optimization, data, processes)
    models, left = len(done), [max(steps - before, 0) for before in done]
    trained = f"{models} x " * (models > 1) + f"{steps:,} step{'s' * (steps > 1)}"
    if any(done):
        trained = f"{' and '.join(f'{number:,}' for number in left)} of {trained} left"
    if isinstance(speed, str):
        return f"{trained}; not estimated: {speed}"
    images = optimization.train_batch_size  # a batch larger than the data holds all of them
    images = images if data.number is None else min(images, math.ceil(data.number / processes))
    of_a_step = speed.step * images * optimization.gradient_accumulation_steps
    interval = output.preview_steps or output.save_images_epochs * per_epoch
    previews = [steps // interval - min(before, steps) // interval + 1 for before in done]
    calls = output.ddpm_num_inference_steps * (sum(previews) * output.eval_batch_size + models * measured)
    seconds = sum(left) * of_a_step + calls * speed.call
    short = f"{of_a_step:.2g} s" if of_a_step >= 0.1 else f"{1000 * of_a_step:.2g} ms"
    each = duration_text(of_a_step) if of_a_step >= 10 else short
    comparison = f", {measured} samples to measure" if measured else ""
    most = max(previews)
    number = f"{most:.0f} previews" if most > 1 else "a preview"
    if models > 1:
        number = f"{number} each" if len(set(previews)) == 1 else f"{sum(previews):.0f} previews"
    steps_of = f"{trained}, {each} each" if any(done) else f"{trained} of {each}"
    return f"about {duration_text(seconds)}: {steps_of}, {number}{comparison}"


def _steps_done(output: OutputSettings, folder: Path) -> int:
    """Returns the step of the checkpoint that a training in this folder is resumed from, or 0."""
    checkpoint = named_checkpoint(output, folder)
    if checkpoint is None:
        return 0
    try:
        return read_manifest(checkpoint)["step"]
    except ValueError:  # the training itself takes an older one then
        return 0


def _disk(
    saved: int,
    kept_at_each: int,
    trained: int,
    optimization: OptimizationSettings,
    output: OutputSettings,
    steps: int,
    *,
    models: int,
    named: str,
    moments: int,
) -> str:
    """Returns the line about the space of the files of a run, and warns if the disk has less.

    Args:
        saved: bytes of the saved model.
        kept_at_each: number of parameters of the network in a checkpoint.
        trained: number of trained parameters.
        optimization: settings of the optimization.
        output: settings of the output.
        steps: steps of a training.
        models: number of trainings.
        named: what is saved.
        moments: bytes of the moments of AdamW.
    """
    checkpoint = _BYTES * (kept_at_each + trained * optimization.use_ema) + moments
    written = steps // output.checkpointing_steps + (models > 1 and steps % output.checkpointing_steps > 0)
    kept = min(output.checkpoints_total_limit or written, written)
    needed = models * (saved + kept * checkpoint)
    folder = Path(output.output_dir).absolute()
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    # A new checkpoint is complete before the oldest is deleted.
    if not output.resume_from_checkpoint and needed + (checkpoint if kept < written else 0) > free:
        warn(
            f"--output_dir {output.output_dir}: {size_text(needed)} are needed, {size_text(free)} are free: name"
            " another disk, or a smaller --checkpoints_total_limit"
        )
    checkpoints = f"{kept} checkpoint{'s' * (kept != 1)} of {size_text(checkpoint)}" if kept else "no checkpoints"
    each = f"{checkpoints}, {named} of {size_text(saved)}"
    each = f"{models} x ({each})" if models > 1 else each
    return f"about {size_text(needed)}: {each}; {size_text(free)} free"
