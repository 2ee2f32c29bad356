"""Saves and loads checkpoints; a training resumes from them at the same step and with the same result.

A checkpoint is a folder checkpoint-STEP. It holds the files of accelerate (weights, optimizer, random states of each
process), the states that all processes share, the counters of each process, and a manifest with the size and SHA-256
of every file, the settings that affect the mathematics, and the checkpoints that the run was resumed from. It is
written under another name, flushed to the disk, and renamed when it is complete. So a folder of that name is complete;
the manifest detects damage on the disk.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import uuid
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed

from ..runtime.errors import UsageError
from ..runtime.machines import bring_files, check_folder
from ..runtime.messages import say
from ..runtime.processes import on_main_process, together
from ..settings.output import OutputSettings
from .lineage import PREFIX, REPLACED, checkpoints, find_checkpoint, free_name, is_named, set_aside, step_of
from .manifest import MANIFEST, force_to_disk, read_manifest, write_manifest
from .run_folder import ABANDONED, is_of_checkpoint

__all__ = ["Checkpoints", "Progress", "endless_batches"]


class Progress:
    """The progress of a training; one of the states of its `Checkpoints`.

    Attributes:
        step: number of optimizer steps taken.
        epoch: number of epochs completed.
        batch: number of batches of the current epoch processed, in each process, by the current division.
        divisions: how the images of the current epoch were divided before another number of processes continued the
            run, oldest first: (number of processes, images per batch, number of batches in each process).
    """

    def __init__(self):
        self.step = self.epoch = self.batch = 0
        self.divisions: list[tuple[int, int, int]] = []

    def divide_again(self, processes: int, batch_size: int) -> None:
        """Leaves the rest of the epoch to another division, after one with these numbers."""
        self.divisions.append((processes, batch_size, self.batch))
        self.batch = 0

    def images_drawn(self) -> int:
        """Returns the number of images of the current epoch that were drawn by earlier divisions."""
        return sum(map(math.prod, self.divisions))

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


def endless_batches(accelerator: Accelerator, dataloader, progress: Progress):
    """Yields batches epoch by epoch, with a new shuffle for each, starting at `progress`, which it updates."""
    while True:
        dataloader.set_epoch(progress.epoch)
        remaining = accelerator.skip_first_batches(dataloader, progress.batch) if progress.batch else dataloader
        for batch in remaining:
            progress.batch += 1
            yield batch
        progress.epoch += 1
        progress.batch = 0
        progress.divisions = []


class Stateful(Protocol):
    """An object with a state dict."""

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


class Checkpoints:
    """The checkpoints of one training, in its output folder.

    Args:
        accelerator: the accelerator, with everything prepared.
        output_dir: the folder of the checkpoints.
        states: the states that are equal in all processes, by name, including "lr_scheduler" and "progress"; tensors
            and plain values. They are not registered with accelerate, which would load them as pickles that can run
            code.
        settings: the settings that affect the mathematics, as JSON; each checkpoint stores them, see
            `changed_settings`.
        limit: the number of checkpoints to keep; None keeps all.
        counters: the counters of each process, by name; JSON.
        command: the command line that continues the run; printed with each checkpoint.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: Path,
        states: dict[str, Stateful],
        settings: dict,
        limit: int | None = None,
        counters: dict[str, Stateful] | None = None,
        command: str = "",
    ):
        self._accelerator = accelerator
        self._output_dir = output_dir
        self._states = states
        self._settings = settings
        self._limit = limit
        self._counters = counters or {}
        self._command = command
        self._run = uuid.uuid4().hex  # of this start, for the lineage
        self._resumed_from: list[dict] = []

    def resume(self, output: OutputSettings) -> Path | None:
        """Loads the checkpoint that the flags name, or the newest intact one; returns its folder.

        All processes load the checkpoint that the main process found. New settings override those in the checkpoint.
        If the flags name a checkpoint, later checkpoints of the abandoned branch are set aside.

        Another number of processes may have saved it. Then Accelerate reshards sharded weights and their optimizer,
        the rest of the epoch is divided among these processes, and their noise is new.

        Raises:
            UsageError: if the named checkpoint is damaged, or if another machine does not see it.
        """
        found = [None, None]
        if self._accelerator.is_main_process:
            try:
                found[0] = find_checkpoint(output, self._output_dir, _report)
            except UsageError as error:
                found[1] = str(error)
        folder, problem = broadcast_object_list(found)
        if problem:
            raise UsageError(problem)
        if folder is None:
            return None
        check_folder(self._accelerator.state, folder)
        lr_scheduler = self._states["lr_scheduler"]
        new = _hyperparameters(lr_scheduler)
        self._accelerator.load_state(str(folder))
        self._load_states(folder)
        manifest = read_manifest(folder)
        if manifest["settings"] != self._settings:
            _keep_hyperparameters(lr_scheduler, new)
        processes = manifest["settings"].get("processes", self._accelerator.num_processes)
        states = json.loads((folder / _counters_file(self._accelerator.process_index % processes)).read_text())
        for name, counter in self._counters.items():
            if name in states:  # not in a checkpoint of an older version
                counter.load_state_dict(states[name])
        self._divide_again(manifest)
        origin = {"run": manifest.get("run"), "step": manifest["step"], "checkpoint": folder.name}
        self._resumed_from = [*(manifest.get("resumed_from") or []), origin]
        if not is_named(output, self._output_dir):
            return folder
        self._accelerator.wait_for_everyone()  # until all have read it
        named = on_main_process(self._accelerator.state, lambda: set_aside(self._output_dir, folder))
        return broadcast_object_list([named])[0]

    def save(self, step: int) -> Path:
        """Saves the state of all processes to checkpoint-STEP and returns that folder.

        After that, it deletes the oldest checkpoints beyond the limit. The main process reports the path.

        Raises:
            UsageError: if the checkpoint cannot be written; earlier checkpoints are unchanged.
        """
        folder = self._output_dir / f"{PREFIX}{step}"
        unfinished = self._output_dir / f".{folder.name}"
        accelerator = self._accelerator
        if accelerator.is_main_process:
            _remove_unfinished(unfinished)  # from a run that was killed while it saved
        accelerator.wait_for_everyone()
        try:
            together(accelerator.state, lambda: self._write(unfinished))
            bring_files(accelerator.state, unfinished)
            on_main_process(accelerator.state, lambda: self._complete(unfinished, folder, step))
        except Exception as error:  # the type depends on the library that writes
            shutil.rmtree(unfinished, ignore_errors=True)
            raise _not_saved(folder, error) from error
        if accelerator.is_main_process:
            say(f"saved {folder}; continue with: {self._command}")
        elif accelerator.is_local_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)  # on a machine that does not see the folder
        return folder

    def _write(self, unfinished: Path) -> None:
        self._accelerator.save_state(str(unfinished))
        for name, state in self._states.items():
            content = state.state_dict()  # in all processes, because weights may be sharded
            if self._accelerator.is_main_process:
                torch.save(content, unfinished / f"{name}.bin")
        states = {name: counter.state_dict() for name, counter in self._counters.items()}
        (unfinished / _counters_file(self._accelerator.process_index)).write_text(json.dumps(states))

    def _divide_again(self, manifest: dict) -> None:
        """Adapts to another number of processes or batch size than that of the checkpoint."""
        before, now = (
            (settings.get("processes"), settings.get("--train_batch_size"))
            for settings in (manifest["settings"], self._settings)
        )
        if before != now and None not in before and not self._settings.get("--streaming"):  # it has places of its own
            self._states["progress"].divide_again(*before)
        if before[0] not in (None, now[0]):
            # The saved states belong to other processes, and the seed itself would repeat the noise of the first step.
            seeds = np.random.SeedSequence([self._settings["--seed"], manifest["step"], now[0]])
            set_seed(int(seeds.generate_state(1)[0]), device_specific=True)

    def _load_states(self, folder: Path) -> None:
        for name, state in self._states.items():
            path = folder / f"{name}.bin"
            if not path.is_file():  # with --allow_changed_settings
                raise UsageError(f"--resume: {folder} has no {name}: drop the flag that needs it, such as --use_ema")
            state.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    def _complete(self, unfinished: Path, folder: Path, step: int) -> None:
        write_manifest(unfinished, step, self._settings, self._run, self._resumed_from)
        if folder.exists() or folder.is_symlink():  # the run was resumed from an earlier checkpoint
            replaced = folder.with_name(f".{folder.name}{REPLACED}")
            _remove(replaced)
            folder.rename(replaced)
            unfinished.rename(folder)
            _remove(replaced)
        else:
            unfinished.rename(folder)
        force_to_disk(folder.parent)
        if self._limit:
            # Later checkpoints can only be damaged, and this run replaces them when it reaches their step.
            before = [old for old in checkpoints(self._output_dir) if step_of(old) < step]
            for old in before[: max(len(before) - (self._limit - 1), 0)]:
                _remove(old)


def _counters_file(process: int) -> str:
    return f"counters_{process}.json"


def _remove_unfinished(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Deletes a checkpoint, but no other files in its folder and no targets of links."""
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
        return
    try:
        known = read_manifest(folder)["files"]
    except ValueError:
        known = {}
    places = sorted((path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink()), reverse=True)
    for path in [folder / MANIFEST, *(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())]:
        if path.relative_to(folder).as_posix() in known or is_of_checkpoint(path.name):
            path.unlink(missing_ok=True)
    for place in [*places, folder] if folder.is_dir() else ():
        if not any(place.iterdir()):
            place.rmdir()
    if folder.is_dir():
        kept = folder.rename(
            free_name(folder.with_name(f"{ABANDONED}{folder.name.strip('.').removesuffix(REPLACED)}"))
        )
        _report(f"{kept} keeps the files of {folder.name} that do not belong to the checkpoint")


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _not_saved(folder: Path, error: Exception) -> UsageError:
    free = shutil.disk_usage(folder.parent).free
    reason = " ".join(str(error).split()) or type(error).__name__
    before = checkpoints(folder.parent)
    rest = f"continue from {before[-1]} by --resume auto" if before else "there is no earlier checkpoint"
    return UsageError(
        f"{folder} cannot be saved ({reason}; {free / 2**20:,.0f} MiB free): free disk space, for example by"
        f" --checkpoints_total_limit; {rest}"
    )


def _hyperparameters(lr_scheduler) -> list[dict]:
    groups = lr_scheduler.optimizer.param_groups
    return [{name: value for name, value in group.items() if name != "params"} for group in groups]


def _keep_hyperparameters(lr_scheduler, groups: list[dict]) -> None:
    """Replaces the loaded hyperparameters, such as the learning rate, by those of this start."""
    lr_scheduler.base_lrs = [group["initial_lr"] for group in groups]
    factors = [factor(lr_scheduler.last_epoch) for factor in lr_scheduler.lr_lambdas]
    lr_scheduler._last_lr = [base * factor for base, factor in zip(lr_scheduler.base_lrs, factors, strict=True)]
    for group, new, rate in zip(lr_scheduler.optimizer.param_groups, groups, lr_scheduler._last_lr, strict=True):
        group.update({**new, "lr": rate})
