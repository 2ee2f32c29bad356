"""Checkpoints to resume a training from."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from accelerate import Accelerator

from .errors import UsageError

__all__ = ["Progress", "endless_batches", "find_checkpoint", "save_checkpoint"]

_PREFIX = "checkpoint-"


class Progress:
    """How far a training is; register it with `accelerator.register_for_checkpointing`.

    Attributes:
        step: optimizer steps done.
        epoch: epochs finished.
        batch: batches of the current epoch done, on each process.
    """

    def __init__(self):
        self.step = self.epoch = self.batch = 0

    def state_dict(self) -> dict[str, int]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, int]) -> None:
        vars(self).update(state)


def endless_batches(accelerator: Accelerator, dataloader, progress: Progress):
    """Batches of one epoch after the other, shuffled anew for each, from where `progress` is; keeps it up to date."""
    while True:
        dataloader.set_epoch(progress.epoch)
        remaining = accelerator.skip_first_batches(dataloader, progress.batch) if progress.batch else dataloader
        for batch in remaining:
            progress.batch += 1
            yield batch
        progress.epoch += 1
        progress.batch = 0


def save_checkpoint(accelerator: Accelerator, output_dir: Path, step: int, limit: int | None) -> Path:
    """Saves the state of all processes to output_dir/checkpoint-STEP and returns that folder.

    The folder gets its name when it is complete; only then the oldest beyond `limit` are deleted.
    """
    folder = output_dir / f"{_PREFIX}{step}"
    unfinished = output_dir / f".{folder.name}"
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
        for old in _checkpoints(output_dir)[: -limit if limit else 0]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return folder


def find_checkpoint(args: argparse.Namespace, output_dir: Path) -> Path | None:
    """The checkpoint that --resume_from_checkpoint names, or None without the flag.

    Raises:
        UsageError: a folder is named that is not there.
    """
    wanted = args.resume_from_checkpoint
    is_main_run = output_dir == Path(args.output_dir)
    if wanted is None:
        return None
    if wanted == "latest" or not is_main_run:
        found = _checkpoints(output_dir)  # none yet: the first start of a job that always says "latest"
        return found[-1] if found else None
    for folder in (Path(wanted), output_dir / wanted):
        if folder.is_dir():
            return folder
    raise UsageError(f"--resume_from_checkpoint {wanted}: no such folder; 'latest' takes the newest of --output_dir")


def _checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [folder for folder in output_dir.glob(f"{_PREFIX}*") if folder.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=lambda folder: int(folder.name.removeprefix(_PREFIX)))
