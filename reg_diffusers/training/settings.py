"""The settings that decide the result of a run: a resumed run must have the same."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from ..data.training_data import TrainingData
from ..runs.checkpoint import Progress
from ..runs.lineage import changed_settings, find_checkpoint, resume_flag
from ..runs.manifest import read_manifest
from ..runtime.errors import UsageError, warn
from ..settings import Settings
from ..settings.optimization import OptimizationSettings
from ..settings.output import OutputSettings

__all__ = ["check_settings", "mathematical_settings"]

_PATHS = ("dataset_name", "train_data_dir", "validation_data_dir")
_PATHS += ("pretrained_model_name_or_path", "model_config_name_or_path", "vae")
_LENGTHS = ("num_epochs", "max_train_steps")
_OF_FIELDS = ("field_scale", "reg_units")
_OF_A_STEP = ("processes", "--train_batch_size", "--gradient_accumulation_steps")


def mathematical_settings(
    settings: Settings, data: TrainingData, state: PartialState, computation: Mapping[str, str]
) -> dict:
    """Returns the settings that decide the result, by flag, as JSON.

    They include the number of images and processes, the precision and the attention chosen for this machine. A folder
    counts by its last name, because clusters may mount the same files under another path at each start.
    """
    found = settings.mathematics()
    for name in _PATHS:
        if found.get(name) and Path(found[name]).exists():
            found[name] = Path(found[name]).resolve().name
    if settings.optimization.lr_scheduler.startswith("constant"):  # then a longer run begins like a shorter one
        found = {name: value for name, value in found.items() if name not in _LENGTHS}
    for name in _OF_FIELDS if data.is_picture else [] if settings.loss.regularizer else ["reg_units"]:
        del found[name]
    found |= computation
    flags = {f"--{name}": value for name, value in found.items()}
    given = {**flags, "images": data.number, "shape": list(data.shape), "processes": state.num_processes}
    return json.loads(json.dumps(given, default=str))  # weight rules as text


def check_settings(
    output: OutputSettings, optimization: OptimizationSettings, mathematics: dict, batches: int | None
) -> None:
    """Refuses to continue with other settings than before, unless --allow_changed_settings.

    Another number of processes is allowed, with a warning, and so is another length, with a warning where the learning
    rate decays over it.

    Args:
        output: the settings that name the checkpoint.
        optimization: the settings with the length of the run.
        mathematics: the `mathematical_settings` of the run.
        batches: batches that each process draws in an epoch; None for a stream of unknown length.

    Raises:
        UsageError: settings differ; the message lists them. Or the checkpoint cannot be continued by these processes,
            because only one of the two shards its weights, the data are a stream, or the length is given in epochs.
    """
    folder = find_checkpoint(output, Path(output.output_dir))
    if folder is None:
        return
    manifest, flag = read_manifest(folder), resume_flag(output)
    before = manifest["settings"]
    _check_sharding(folder, manifest["files"], mathematics["processes"], flag)
    if before.get("processes", mathematics["processes"]) != mathematics["processes"]:
        _warn_of_processes(folder, before, mathematics, optimization, batches, flag)
    if output.allow_changed_settings:
        return
    changed = changed_settings(folder, {**mathematics, "processes": before.get("processes")})
    if any(difference.split()[0].removeprefix("--") not in _LENGTHS for difference in changed):
        raise UsageError(
            f"{flag}: {folder} was trained with other settings: {', '.join(changed)}. Use those, start"
            " anew in another --output_dir, or pass --allow_changed_settings"
        )
    if changed:
        warn(
            f"{', '.join(changed)}: from here on the learning rate follows --lr_scheduler {optimization.lr_scheduler}"
            " over the new length, so the result differs from a run with this length from the start; constant avoids"
            " this"
        )


def _check_sharding(folder: Path, files: Iterable[str], processes: int, flag: str) -> None:
    """Raises UsageError if either the checkpoint or this launch shards the weights, but not both."""
    is_sharded = any(name.endswith(".distcp") for name in files)
    if is_sharded == (processes > 1 and parse_flag_from_env("ACCELERATE_USE_FSDP")):
        return
    if is_sharded:
        fix = "launch at least 2 processes with docs/accelerate/fsdp2.yaml"
        raise UsageError(f"{flag}: {folder} holds sharded weights, which these processes do not: {fix}")
    raise UsageError(f"{flag}: {folder} holds whole weights: launch without an FSDP configuration")


def _warn_of_processes(
    folder: Path, before: Mapping, now: Mapping, optimization: OptimizationSettings, batches: int | None, flag: str
) -> None:
    """Warns that another number of processes continues a checkpoint.

    Raises:
        UsageError: the data are a stream, or the length is given in epochs, whose steps have another number of images.
    """
    processes = f"{before['processes']} -> {now['processes']} processes"
    if now.get("--streaming") or batches is None:
        raise UsageError(
            f"{flag}: {processes}: {folder} has the place of each process in the stream, which cannot be divided"
            f" again: launch {before['processes']}"
        )
    progress = Progress()
    progress.load_state_dict(torch.load(folder / "progress.bin", weights_only=True))
    progress.divide_again(before["processes"], before["--train_batch_size"])
    if optimization.max_train_steps is None:
        drawn = progress.images_drawn() / (optimization.train_batch_size * now["processes"])
        left = (optimization.num_epochs - progress.epoch) * batches - drawn
        steps = progress.step + max(math.ceil(left / optimization.gradient_accumulation_steps), 0)
        raise UsageError(
            f"{flag}: {processes}: the steps of an epoch change: give the length by --max_train_steps, {steps} for"
            f" --num_epochs {optimization.num_epochs}"
        )
    images = " -> ".join(str(math.prod(settings[name] for name in _OF_A_STEP)) for settings in (before, now))
    warn(
        f"{flag}: {processes}, {images} images in a step: the noise from here on is new, so the result is not equal"
        f" bit for bit to that of {before['processes']}; no image of the epoch is drawn twice or left out"
    )
