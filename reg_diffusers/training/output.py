"""Claims the output folder of a run, clears it, and writes settings and pipeline into it atomically."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path

import yaml

from ..hub.card import read_card
from ..runs.lineage import named_checkpoint
from ..runs.run_folder import CARD_FILE, LOCK_FILE, PLAIN_FOLDER, SETTINGS_FILE, files_left, obstacle
from ..runs.run_lock import RunLock
from ..runtime.errors import UsageError, warn
from ..runtime.files import write_whole
from ..settings import Settings
from ..settings.flag_values import inner_folder
from ..settings.output import OutputSettings

__all__ = ["claim_output_dir", "remove_earlier_run", "save_pipeline", "write_settings"]


def claim_output_dir(output: OutputSettings) -> RunLock:
    """Creates the output folder if needed, and locks it without changing its files. For the main process only.

    Returns:
        The lock, held until the caller releases it.

    Raises:
        UsageError: the folder holds other files, or an earlier run without --overwrite_output_dir or
            --resume_from_checkpoint; another run writes there; links or files take the place of a run's files; the
            checkpoint does not exist; the card cannot be read, and so cannot be updated at the end; or the folder is
            not writable.
    """
    folder = Path(output.output_dir)
    flag = f"--output_dir {folder}"
    try:
        is_file = folder.exists() and not folder.is_dir()
    except OSError as error:  # a name that the file system refuses
        raise UsageError(f"{flag} cannot be written: {error.strerror}") from error
    if is_file:
        raise UsageError(f"{flag} is a file: name another")
    holds_files = folder.is_dir() and any(path.name != LOCK_FILE for path in folder.iterdir())
    if holds_files and not (folder / SETTINGS_FILE).is_file():
        raise UsageError(f"{flag} exists, but does not belong to an earlier run of this script: name another")
    _check_neighbours(folder, flag)
    named_checkpoint(output, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        lock = RunLock(folder)
    except OSError as error:
        raise UsageError(f"{flag} cannot be written: {error.strerror}") from error
    try:
        if holds_files and not (output.overwrite_output_dir or output.resume_from_checkpoint):
            raise UsageError(
                f"{flag} holds an earlier run: name another, or pass --resume_from_checkpoint latest to continue, or"
                " --overwrite_output_dir to start anew"
            )
        if problem := obstacle(folder, output.logging_dir):
            raise UsageError(f"{flag}: {problem}")
        _check_card(folder, flag)
    except BaseException:
        lock.release()
        raise
    return lock


def remove_earlier_run(output: OutputSettings) -> None:
    """Deletes only the files of an earlier run, if the settings ask for it, and reports what remains.

    The table of `run_folder` lists these files; the logging folder is that of the earlier run.
    """
    folder = Path(output.output_dir)
    if output.resume_from_checkpoint or not (folder / SETTINGS_FILE).is_file():
        return
    emptied = set()
    for path in files_left(folder, lambda left: left.deleted, _earlier_logging_dir(folder)):
        path.unlink(missing_ok=True)
        emptied |= {above for above in path.parents if folder in above.parents}
    emptied |= {link for link in folder.glob("checkpoint-*") if link.is_symlink() and link.is_dir()}
    for place in sorted(emptied, key=lambda place: len(place.parts), reverse=True):
        if place.is_symlink():
            place.unlink()
        elif not any(place.iterdir()):
            place.rmdir()
    kept = sorted(path.name for path in folder.iterdir() if path.name not in (SETTINGS_FILE, CARD_FILE, LOCK_FILE))
    if kept:
        warn(f"--overwrite_output_dir deletes the files of a run only; {folder} keeps {', '.join(kept)}")


def _check_neighbours(folder: Path, flag: str) -> None:
    """Raises `UsageError` if the plain model of --compare would be written into the folder of another run."""
    real = Path(os.path.realpath(folder))
    if real.name == PLAIN_FOLDER and (real.parent / SETTINGS_FILE).is_file():
        raise UsageError(f"{flag} holds the plain model of the run in {real.parent}: name another")
    if (folder / PLAIN_FOLDER / SETTINGS_FILE).is_file():
        raise UsageError(f"{flag}: {folder / PLAIN_FOLDER} is the folder of another run: name another")


def _check_card(folder: Path, flag: str) -> None:
    try:
        if (folder / CARD_FILE).is_file():
            read_card(folder / CARD_FILE)
    except ValueError as error:
        raise UsageError(f"{flag}: {error}: repair or remove that file") from error


def _earlier_logging_dir(folder: Path) -> str:
    """Returns the logging folder of the run in a folder; its settings may be corrupt."""
    try:
        return inner_folder(yaml.safe_load((folder / SETTINGS_FILE).read_text(encoding="utf-8"))["logging_dir"])
    except (yaml.YAMLError, ValueError, TypeError, KeyError, argparse.ArgumentTypeError):
        return "logs"


def save_pipeline(pipeline, folder: Path) -> None:
    """Saves a pipeline, and replaces each file atomically: the old one remains until the new one is complete.

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
    except Exception as error:  # its type depends on the library that writes
        if "No space left" not in str(error):
            raise
        raise UsageError(f"{folder}: the pipeline cannot be saved: no space left on device: make room") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_settings(settings: Settings, folder: Path) -> None:
    """Writes the resolved settings in the form that train_reg.py takes as its first argument.

    Tokens and settings for one start only are omitted.
    """
    kept = settings.kept()
    if not kept["regularizer"]:
        kept["regularizer"] = ["none"]
        del kept["reg_weight"], kept["reg_weighting"], kept["reg_estimator"], kept["reg_schedule"]
    kept = json.loads(json.dumps(kept, default=str))  # weight rules as text
    write_whole(folder / SETTINGS_FILE, lambda path: path.write_text(yaml.safe_dump(kept, sort_keys=False)))
