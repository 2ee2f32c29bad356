"""What the mathematics of a run depends on: with the same settings, a run that is resumed ends where it would have."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from accelerate import PartialState

from .checkpoint import changed_settings, named_checkpoint
from .data import TrainingData
from .errors import UsageError

__all__ = ["check_settings", "mathematical_settings"]

# All flags count but those that say where things are, what is told, and when a run pauses.
_NO_MATHEMATICS = {
    *("config", "cache_dir", "output_dir", "overwrite_output_dir", "logger", "logging_dir", "compare"),
    *("eval_batch_size", "save_images_epochs", "preview_steps", "ddpm_num_inference_steps", "save_model_epochs"),
    *("checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "allow_changed_settings"),
    *("max_train_time", "max_bad_steps", "push_to_hub", "hub_strategy", "hub_token", "hub_model_id"),
    *("hub_private_repo", "hub_license", "num_threads", "dataloader_num_workers", "local_rank", "center_crop"),
    *("enable_xformers_memory_efficient_attention", "gradient_checkpointing", "profile"),
}
_PATHS = ("dataset_name", "train_data_dir", "pretrained_model_name_or_path", "model_config_name_or_path")
_LENGTHS = ("num_epochs", "max_train_steps")


def mathematical_settings(
    args: argparse.Namespace, data: TrainingData, state: PartialState, mixed_precision: str, attention: str
) -> dict:
    """The settings by flag, as JSON, with what they mean here: number of images, processes, precision,
    how attention is computed.

    A folder counts by its last name, because clusters lay the same files under another path at each start.
    """
    found = {name: value for name, value in vars(args).items() if name not in _NO_MATHEMATICS}
    for name in _PATHS:
        if found.get(name) and Path(found[name]).exists():
            found[name] = Path(found[name]).resolve().name
    if args.lr_scheduler.startswith("constant"):  # then a longer run begins as a shorter one does
        found = {name: value for name, value in found.items() if name not in _LENGTHS}
    found |= {"mixed_precision": mixed_precision, "attention": attention}
    flags = {f"--{name}": value for name, value in found.items()}
    given = {**flags, "images": data.number, "shape": list(data.shape), "processes": state.num_processes}
    return json.loads(json.dumps(given, default=str))  # rules of weights as they are said


def check_settings(args: argparse.Namespace, output_dir: Path, settings: dict) -> None:
    """Refuses to go on with other mathematics than before, unless --allow_changed_settings.

    Raises:
        UsageError: with the list of differences.
    """
    folder = named_checkpoint(args, output_dir)
    if folder is None or args.allow_changed_settings:
        return
    if changed := changed_settings(folder, settings):
        raise UsageError(
            f"--resume: {folder} was trained with other settings: {', '.join(changed)}. Use those, start anew in"
            " another --output_dir, or pass --allow_changed_settings"
        )
