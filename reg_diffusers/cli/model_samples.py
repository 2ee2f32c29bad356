"""Draws the samples that `evaluate` and `sweep` measure into a folder, and reads them from there."""

from __future__ import annotations

import argparse
import functools
import hashlib
from pathlib import Path

from ..runtime.files import file_name
from ..runtime.messages import say
from .bench import Bench

__all__ = ["draw_samples_of", "read_samples", "samplers_of"]


def samplers_of(args: argparse.Namespace, models: dict, names: dict, bench: Bench, folder: Path) -> dict:
    """Returns the sampler, the store and the missing indices of each model.

    Raises:
        UsageError: if settings do not fit the model, or if the folder holds samples of other settings.
    """
    from ..runtime.errors import UsageError
    from ..sampling.drawing import find_missing
    from ..sampling.sampler import Sampler, model_sha256
    from ..sampling.schedulers import fitting_samplers
    from ..sampling.settings import SampleSettings
    from ..sampling.store import ArrayFile

    found = {}
    labels, conditions = bench.conditions.get("class_labels"), bench.conditions.get("condition")
    for title, pipeline in models.items():
        by_class = pipeline.num_classes is not None
        settings = SampleSettings(
            model=names[title],
            model_sha256=model_sha256(pipeline),
            scheduler=args.scheduler or next(iter(fitting_samplers(pipeline))),
            num_inference_steps=args.num_inference_steps,
            seed=args.seed,
            mixed_precision=args.mixed_precision,
            class_labels=tuple(labels.tolist()) if by_class else (),
            prompts=tuple(bench.texts) if pipeline.takes_prompts else (),
            guidance_scale=_guidance_scale(args, pipeline),
            condition_sha256=hashlib.sha256(conditions.numpy()).hexdigest() if conditions is not None else "",
            output_type="latent",
        )
        path = folder / f"{file_name(title)}.npz"
        try:
            sampler = Sampler(pipeline, settings, conditions)
        except ValueError as error:
            raise UsageError(f"--{error}") from error
        try:
            store = ArrayFile(path, is_field=True)
            found[title] = sampler, store, find_missing(store, sampler.settings, bench.number)
        except ValueError as error:
            raise UsageError(f"--output {error}") from error
    return found


def _guidance_scale(args: argparse.Namespace, pipeline) -> float | None:
    return pipeline.default_guidance_scale if args.guidance_scale is None else args.guidance_scale


def draw_samples_of(args: argparse.Namespace, samplers: dict, state) -> None:
    """Draws the missing samples in all processes.

    Raises:
        UsageError: if memory is insufficient, or if the folder cannot be written.
    """
    import torch

    from ..runtime.errors import UsageError
    from ..sampling.drawing import draw_missing

    if state.is_main_process and (line := _time(samplers, args.batch_size, state.num_processes)):
        say(line)
    for title, (sampler, store, missing) in samplers.items():
        if not missing:
            continue
        batch_size = args.batch_size or sampler.typical_batch
        if state.is_main_process:
            say(f"sampling    {title}: {len(missing):,} images")
        try:
            draw_missing(sampler, store, missing, batch_size, state)
        except torch.OutOfMemoryError as error:
            raise UsageError(f"--batch_size {batch_size}: too large for the memory of {state.device}") from error
        except PermissionError as error:
            raise UsageError(f"--output {store.path} cannot be written: {error.strerror}") from error


def _time(samplers: dict, batch_size: int | None, processes: int) -> str:
    """Returns a line about the time that the missing samples take; empty if none is missing."""
    import torch

    from ..runtime.amounts import duration_text

    seconds, numbers = 0.0, []
    for sampler, _, missing in samplers.values():
        share = missing[::processes]
        if not share:
            continue
        numbers.append(f"{len(missing):,}")
        batch = share[: batch_size or sampler.typical_batch]
        try:
            of_an_image = sampler.seconds_per_step(batch) / len(batch)
        except torch.OutOfMemoryError:  # reported where the samples are drawn
            return ""
        seconds += of_an_image * sampler.settings.num_inference_steps * len(share)
    if not numbers:
        return ""
    return f"time        about {duration_text(seconds)} to draw {' + '.join(numbers)} images; then they are measured"


def read_samples(bench: Bench, samplers: dict) -> dict:
    """Opens the first N samples of each model, (N, C, H, W), which are read when they are needed; see `Images`.

    Raises:
        UsageError: if samples are missing because another machine wrote them to its own disk.
    """
    from ..evaluation.images import Images
    from ..runtime.errors import UsageError

    samples = {}
    for title, (_, store, _) in samplers.items():
        if lacking := set(range(bench.number)) - store.present():
            raise UsageError(
                f"--output {store.path}: {len(lacking):,} samples drawn by other processes are missing: name a folder"
                " that all machines share"
            )
        store.finish(bench.number)
        samples[title] = Images(bench.number, functools.partial(_read, store.mapped()))
    return samples


def _read(mapped, places: range):
    import numpy as np
    import torch

    return torch.from_numpy(np.array(mapped[places.start : places.stop]))
