"""Checkpoints to resume a training from, at the very step, with the same future.

A checkpoint is a folder checkpoint-STEP: what accelerate saves (weights, optimizer, random numbers of each process),
the states that all processes share, the counters of each process, and a manifest with the size and SHA-256 of every
file and the settings that the mathematics depends on. It is written under another name, forced to the disk, and
renamed when it is complete; so a folder of that name is whole, unless the disk damaged it, which the manifest tells.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from .errors import UsageError
from .machines import bring_files, check_folder
from .processes import on_main_process, together

__all__ = ["Checkpoints", "Progress", "changed_settings", "endless_batches", "named_checkpoint"]

_PREFIX = "checkpoint-"
_MANIFEST = "manifest.json"
_REPLACED = ".replaced"


class Progress:
    """How far a training is; one of the states of its `Checkpoints`.

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


class Stateful(Protocol):
    """What has a state to go on from."""

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


class Checkpoints:
    """The checkpoints of one training, in its output folder.

    Args:
        accelerator: with everything prepared.
        output_dir: where they are.
        states: by name, what is the same in all processes, the "lr_scheduler" among them; tensors and plain values.
            Not registered with accelerate, which would load them as pickles that can run code.
        settings: what the mathematics depends on, as JSON; kept in each checkpoint for `changed_settings`.
        limit: how many are kept; None: all.
        counters: by name, what each process counts for itself; JSON.
        command: that goes on with the run; told at each saving.
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

    def resume(self, args: argparse.Namespace) -> Path | None:
        """Loads the checkpoint that the flags name, or the newest that is whole; returns its folder.

        Each process loads the one that the main process has found. New settings win over those in the checkpoint.

        Raises:
            UsageError: the one named is damaged, or another machine does not see it.
        """
        found = [None, None]
        if self._accelerator.is_main_process:
            try:
                found[0] = _find(args, self._output_dir)
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
        if _read_manifest(folder)["settings"] != self._settings:
            _keep_hyperparameters(lr_scheduler, new)
        states = json.loads((folder / self._counters_file).read_text())
        for name, counter in self._counters.items():
            if name in states:  # not in a checkpoint of an older version
                counter.load_state_dict(states[name])
        return folder

    def save(self, step: int, tell: Callable[[str], None] = print) -> Path:
        """Saves the state of all processes to checkpoint-STEP and returns that folder.

        Only when it is complete are the oldest beyond the limit deleted. The main process tells where it is.

        Raises:
            UsageError: it cannot be written; the ones before it are as they were.
        """
        folder = self._output_dir / f"{_PREFIX}{step}"
        unfinished = self._output_dir / f".{folder.name}"
        accelerator = self._accelerator
        if accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed while it saved
        accelerator.wait_for_everyone()
        try:
            together(accelerator.state, lambda: self._write(unfinished))
            bring_files(accelerator.state, unfinished)
            on_main_process(accelerator.state, lambda: self._complete(unfinished, folder, step))
        except Exception as error:  # which one it is depends on the library that wrote
            shutil.rmtree(unfinished, ignore_errors=True)
            raise _not_saved(folder, error) from error
        if accelerator.is_main_process:
            tell(f"saved {folder}; go on from there with: {self._command}")
        elif accelerator.is_local_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)  # of a machine that does not see the folder
        return folder

    def _write(self, unfinished: Path) -> None:
        self._accelerator.save_state(str(unfinished))
        for name, state in self._states.items():
            content = state.state_dict()  # asked of all processes, because weights may be divided among them
            if self._accelerator.is_main_process:
                torch.save(content, unfinished / f"{name}.bin")
        states = {name: counter.state_dict() for name, counter in self._counters.items()}
        (unfinished / self._counters_file).write_text(json.dumps(states))

    def _load_states(self, folder: Path) -> None:
        for name, state in self._states.items():
            path = folder / f"{name}.bin"
            if not path.is_file():  # with --allow_changed_settings
                raise UsageError(f"--resume: {folder} has no {name}: leave out what needs it, such as --use_ema")
            state.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    def _complete(self, unfinished: Path, folder: Path, step: int) -> None:
        files = sorted(path for path in unfinished.rglob("*") if path.is_file())
        manifest = {
            "step": step,
            "settings": self._settings,
            "files": {path.relative_to(unfinished).as_posix(): _fingerprint(path) for path in files},
        }
        (unfinished / _MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in [*files, unfinished / _MANIFEST, *_folders(unfinished)]:
            _force_to_disk(path)
        if folder.exists():  # left by a run that was resumed from before it
            replaced = folder.with_name(f".{folder.name}{_REPLACED}")
            shutil.rmtree(replaced, ignore_errors=True)
            folder.rename(replaced)
            unfinished.rename(folder)
            shutil.rmtree(replaced)
        else:
            unfinished.rename(folder)
        _force_to_disk(folder.parent)
        for old in _checkpoints(self._output_dir)[: -self._limit if self._limit else 0]:
            shutil.rmtree(old)

    @property
    def _counters_file(self) -> str:
        return f"counters_{self._accelerator.process_index}.json"


def named_checkpoint(args: argparse.Namespace, output_dir: Path) -> Path | None:
    """The checkpoint that --resume_from_checkpoint names, or else the newest; None without one, or without the flag.

    Raises:
        UsageError: a folder is named that is not there.
    """
    wanted = args.resume_from_checkpoint
    if wanted is None:
        return None
    if _is_newest_wanted(args, output_dir):
        found = _checkpoints(output_dir)  # none yet: the first start of a job that always says "latest"
        return found[-1] if found else None
    for folder in (Path(wanted), output_dir / wanted):
        if folder.is_dir():
            return folder
    raise UsageError(f"--resume_from_checkpoint {wanted}: no such folder; 'latest' takes the newest of --output_dir")


def changed_settings(folder: Path, settings: dict) -> list[str]:
    """How the settings differ from those of a checkpoint, as "--reg_weight 0.1 -> 0.2"; empty for a damaged one."""
    try:
        before = _read_manifest(folder)["settings"]
    except (OSError, ValueError, KeyError):
        return []
    # A flag that an earlier version did not have changes nothing while it is off.
    names = dict.fromkeys([*before, *(name for name, value in settings.items() if name in before or value)])
    return [
        f"{name} {_said(before.get(name))} -> {_said(settings.get(name))}"
        for name in names
        if before.get(name) != settings.get(name)
    ]


def _find(args: argparse.Namespace, output_dir: Path) -> Path | None:
    """The checkpoint that is named, or the newest that is whole; tells what is lost."""
    named = named_checkpoint(args, output_dir)
    found = _checkpoints(output_dir)
    if named is None:
        return None
    if not _is_newest_wanted(args, output_dir):
        if problem := _damage(named):
            raise UsageError(f"--resume_from_checkpoint {named}: {problem}: name another, or 'latest'")
        return named
    _tell_unfinished(output_dir)
    for folder in reversed(found):
        if not (problem := _damage(folder)):
            lost = _step(found[-1]) - _step(folder)
            _tell(f"going on from {folder}" + (f": {lost} steps are lost" if lost else ""))
            return folder
        _tell(f"{folder} is damaged and left out: {problem}")
    raise UsageError(f"--resume: no checkpoint in {output_dir} is whole: start anew by --overwrite_output_dir")


def _is_newest_wanted(args: argparse.Namespace, output_dir: Path) -> bool:
    """A folder is named for the main training only, not for the plain one of --compare."""
    return args.resume_from_checkpoint == "latest" or output_dir != Path(args.output_dir)


def _tell_unfinished(output_dir: Path) -> None:
    for folder in sorted(output_dir.glob(f".{_PREFIX}*")):
        if not folder.name.endswith(_REPLACED):
            _tell(f"{folder.name.removeprefix('.')} was not complete when the run ended, and is left out")


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, if anything."""
    try:
        files = _read_manifest(folder)["files"]
        for name, expected in files.items():
            if ".." in Path(name).parts or Path(name).is_absolute():
                return f"its {_MANIFEST} names a file outside of it, {name}"
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["size"]:
                return f"{name} has {path.stat().st_size:,} bytes instead of {expected['size']:,}"
            if _fingerprint(path) != expected:
                return f"the content of {name} has changed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {_MANIFEST} cannot be read ({type(error).__name__})"
    return None


def _read_manifest(folder: Path) -> dict:
    return json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))


def _fingerprint(path: Path) -> dict:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def _force_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _folders(folder: Path) -> list[Path]:
    return [folder, *(path for path in folder.rglob("*") if path.is_dir())]


def _not_saved(folder: Path, error: Exception) -> UsageError:
    free = shutil.disk_usage(folder.parent).free
    reason = " ".join(str(error).split()) or type(error).__name__
    before = _checkpoints(folder.parent)
    rest = f"go on from {before[-1]} by --resume auto" if before else "nothing was saved before it"
    return UsageError(
        f"{folder} cannot be saved ({reason}; {free / 2**20:,.0f} MiB are free there): make room, by"
        f" --checkpoints_total_limit for instance; {rest}"
    )


def _hyperparameters(lr_scheduler) -> list[dict]:
    groups = lr_scheduler.optimizer.param_groups
    return [{name: value for name, value in group.items() if name != "params"} for group in groups]


def _keep_hyperparameters(lr_scheduler, groups: list[dict]) -> None:
    """Puts the learning rate and the like of this start in place of those that were loaded."""
    lr_scheduler.base_lrs = [group["initial_lr"] for group in groups]
    factors = [factor(lr_scheduler.last_epoch) for factor in lr_scheduler.lr_lambdas]
    lr_scheduler._last_lr = [base * factor for base, factor in zip(lr_scheduler.base_lrs, factors, strict=True)]
    for group, new, rate in zip(lr_scheduler.optimizer.param_groups, groups, lr_scheduler._last_lr, strict=True):
        group.update({**new, "lr": rate})


def _said(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix(_PREFIX))


def _checkpoints(output_dir: Path) -> list[Path]:
    """Folders of complete checkpoints, oldest first."""
    found = [folder for folder in output_dir.glob(f"{_PREFIX}*") if folder.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=_step)
