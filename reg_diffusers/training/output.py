"""The folder of a run: whose it is, its settings, files written whole or not at all."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import yaml

from ..card import CARD_FILE, read_card
from ..files import write_whole
from .checkpoint import named_checkpoint
from .errors import UsageError
from .profiling import PROFILE_FOLDER

__all__ = ["SETTINGS_FILE", "prepare_output_dir", "save_pipeline", "write_settings"]

SETTINGS_FILE = "reg_settings.yaml"


def prepare_output_dir(args: argparse.Namespace) -> None:
    """Makes the output folder if need be; refuses one that holds somebody else's files. For the main process alone.

    Raises:
        UsageError: it holds other files, or an earlier run that neither --overwrite_output_dir nor
            --resume_from_checkpoint is about; there is no such checkpoint; its card cannot be read, and so not be
            written anew at the end; or the folder cannot be written.
    """
    folder = Path(args.output_dir)
    flag = f"--output_dir {folder}"
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{flag} is a file: name another")
    holds_files = folder.is_dir() and any(folder.iterdir())
    if holds_files and not (folder / SETTINGS_FILE).is_file():
        raise UsageError(f"{flag} exists and is not of an earlier run of this script: name another")
    if holds_files and not (args.overwrite_output_dir or args.resume_from_checkpoint):
        raise UsageError(
            f"{flag} holds an earlier run: name another, or pass --resume_from_checkpoint latest to go on, or"
            " --overwrite_output_dir to start anew"
        )
    named_checkpoint(args, folder)
    try:
        if (folder / CARD_FILE).is_file():
            read_card(folder / CARD_FILE)
    except ValueError as error:
        raise UsageError(f"{flag}: {error}: repair or remove that file") from error
    if holds_files and not args.resume_from_checkpoint:
        _remove_earlier_run(args, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"{flag} cannot be written: {error.strerror}") from error


def _remove_earlier_run(args: argparse.Namespace, folder: Path) -> None:
    """Deletes what a run of this script writes, and nothing else."""
    written = ["plain", "samples", "unet", "scheduler", "model_index.json", "pipeline.py", "metrics.jsonl"]
    written += ["bad_steps.jsonl", "reg_config.json", "comparison.json", "comparison.png", "evaluation.png"]
    written += [args.logging_dir, PROFILE_FOLDER, ".upload", ".pipeline"]
    for path in [*(folder / name for name in written), *folder.glob("checkpoint-*"), *folder.glob(".checkpoint-*")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def save_pipeline(pipeline, folder: Path) -> None:
    """Saves a pipeline file by file, each whole or not at all: until a new one is there, the old one is.

    Raises:
        UsageError: the disk is full.
    """
    temporary = folder / ".pipeline"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        pipeline.save_pretrained(str(temporary))
        for path in [path for path in temporary.rglob("*") if path.is_file()]:
            target = folder / path.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
    except Exception as error:  # which one it is depends on the library that wrote
        if "No space left" not in str(error):
            raise
        raise UsageError(f"{folder}: the pipeline cannot be saved: no space left on device: make room") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_settings(args: argparse.Namespace, folder: Path) -> None:
    """The resolved settings, in the form that train_reg.py takes as its first argument.

    Without tokens, and without what was said for this start only.
    """
    left_out = ("config", "hub_token", "local_rank", "resume_from_checkpoint", "overwrite_output_dir")
    left_out += ("allow_changed_settings", "profile")
    left_out += ("push_to_hub", "hub_strategy")  # else an upload would be repeated by whoever repeats the training
    settings = {name: value for name, value in vars(args).items() if name not in left_out}
    if not settings["regularizer"]:
        settings["regularizer"] = ["none"]
        del settings["reg_weight"], settings["reg_weighting"]
    settings = json.loads(json.dumps(settings, default=str))  # rules of weights as they are said
    write_whole(folder / SETTINGS_FILE, lambda path: path.write_text(yaml.safe_dump(settings, sort_keys=False)))
