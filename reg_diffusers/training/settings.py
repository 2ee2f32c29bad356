"""The settings that decide the result of a run: a resumed run must have the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from accelerate import PartialState

from ..data.training_data import TrainingData
from ..runs.lineage import changed_settings, find_checkpoint, resume_flag
from ..runs.manifest import read_manifest
from ..runtime.errors import UsageError, warn
from ..settings import Settings
from ..settings.output import OutputSettings

__all__ = ["check_settings", "mathematical_settings"]

_PATHS = ("dataset_name", "train_data_dir", "validation_data_dir")
_PATHS += ("pretrained_model_name_or_path", "model_config_name_or_path", "vae")
_LENGTHS = ("num_epochs", "max_train_steps")
_OF_FIELDS = ("field_scale", "reg_units")


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


def check_settings(output: OutputSettings, lr_scheduler: str, mathematics: dict) -> None:
    """Refuses to continue with other settings than before, unless --allow_changed_settings.

    Another length is allowed, with a warning where the learning rate decays over it.

    Raises:
        UsageError: settings differ; the message lists them. Or the number of processes differs, which is never
            allowed, because the checkpoint has a state for each process.
    """
    folder = find_checkpoint(output, Path(output.output_dir))
    if folder is None:
        return
    before, now = read_manifest(folder)["settings"].get("processes"), mathematics["processes"]
    if output.allow_changed_settings and before not in (None, now):
        raise UsageError(
            f"--allow_changed_settings: {folder} was saved by {before} processes, so {now} cannot continue it:"
            f" launch {before}"
        )
    if output.allow_changed_settings:
        return
    changed = changed_settings(folder, mathematics)
    if any(difference.split()[0].removeprefix("--") not in _LENGTHS for difference in changed):
        raise UsageError(
            f"{resume_flag(output)}: {folder} was trained with other settings: {', '.join(changed)}. Use those, start"
            " anew in another --output_dir, or pass --allow_changed_settings"
        )
    if changed:
        warn(
            f"{', '.join(changed)}: from here on the learning rate follows --lr_scheduler {lr_scheduler} over the"
            " new length, so the result differs from a run with this length from the start; constant avoids this"
        )
