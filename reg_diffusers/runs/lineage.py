"""Finds the checkpoint to resume from, and sets aside the checkpoints of an abandoned branch.

A run that is resumed from an earlier checkpoint than its last one abandons a branch: its later checkpoints. They are
renamed, so the newest checkpoint always belongs to the run, and no limit deletes the abandoned ones.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

from ..runtime.errors import UsageError
from ..settings.output import OutputSettings
from .manifest import damage, read_manifest
from .run_folder import ABANDONED, LOGS, PLAIN_FOLDER, files_left, is_of_checkpoint

__all__ = ["CONTENT", "PREFIX", "REPLACED", "changed_settings", "checkpoints", "find_checkpoint", "named_checkpoint"]
__all__ += ["free_name", "is_named", "resume_flag", "set_aside", "step_of"]

PREFIX = "checkpoint-"
REPLACED = ".replaced"
_NEWEST = ("latest", "auto")  # values of --resume_from_checkpoint and --resume
CONTENT = "content of the data"
_BEFORE_THE_FLAG = {"--reg_units": "model", "--field_scale": "channel"}  # the behaviour of versions without the flag


def checkpoints(output_dir: Path) -> list[Path]:
    """Returns the folders of complete checkpoints, oldest first; skips folders without checkpoint files."""
    found = [folder for folder in output_dir.glob(f"{PREFIX}*") if re.fullmatch(f"{PREFIX}[0-9]+", folder.name)]
    return sorted(
        (folder for folder in found if folder.is_dir() and any(map(is_of_checkpoint, os.listdir(folder)))),
        key=step_of,
    )


def step_of(folder: Path) -> int:
    """Returns the step in the name of a checkpoint."""
    return int(folder.name.removeprefix(PREFIX))


def resume_flag(settings: OutputSettings) -> str:
    """Returns the resume flag of the command line, as typed."""
    wanted = settings.resume_from_checkpoint
    return "--resume auto" if wanted == "auto" else f"--resume_from_checkpoint {wanted}"


def is_named(settings: OutputSettings, output_dir: Path) -> bool:
    """Whether the flags name one checkpoint; only for the main training, not for the plain one of --compare."""
    return settings.resume_from_checkpoint not in (None, *_NEWEST) and output_dir == Path(settings.output_dir)


def named_checkpoint(settings: OutputSettings, output_dir: Path) -> Path | None:
    """Returns the checkpoint that --resume_from_checkpoint names, or the newest; None without one or without the flag.

    Raises:
        UsageError: if the named folder does not exist.
    """
    wanted = settings.resume_from_checkpoint
    if wanted is None:
        return None
    if not is_named(settings, output_dir):
        found = checkpoints(output_dir)  # empty at the first start of a job that always passes "latest"
        return found[-1] if found else None
    for folder in (Path(wanted), output_dir / wanted):
        if folder.is_dir():
            return folder
    raise UsageError(f"--resume_from_checkpoint {wanted}: no such folder; 'latest' uses the newest in --output_dir")


def find_checkpoint(settings: OutputSettings, output_dir: Path, tell=lambda line: None) -> Path | None:
    """Returns the named checkpoint or the newest intact one; reports lost steps.

    Raises:
        UsageError: if the named checkpoint is damaged, or if all are.
    """
    named = named_checkpoint(settings, output_dir)
    if named is None:
        return None
    if is_named(settings, output_dir):
        if problem := damage(named):
            raise UsageError(f"--resume_from_checkpoint {named}: {problem}: name another, or 'latest'")
        return named
    for folder in sorted(output_dir.glob(f".{PREFIX}*")):
        if not folder.name.endswith(REPLACED):
            tell(f"skipping {folder.name.removeprefix('.')}: it was incomplete when the run ended")
    found, problem = checkpoints(output_dir), None
    for folder in reversed(found):
        if not (problem := damage(folder)):
            lost = step_of(found[-1]) - step_of(folder)
            tell(f"continuing from {folder}" + (f": {lost} step{'s are' if lost > 1 else ' is'} lost" if lost else ""))
            return folder
        tell(f"skipping {folder}, which is damaged: {problem}")
    raise UsageError(
        f"{resume_flag(settings)}: no checkpoint in {output_dir} is intact ({found[0].name}: {problem}): start again"
        " with --overwrite_output_dir"
    )


def changed_settings(folder: Path, settings: dict) -> list[str]:
    """Lists the changes of the settings since an intact checkpoint, such as "--reg_weight 0.1 -> 0.2"."""
    before = read_manifest(folder)["settings"]
    before = {name: value for name, value in _BEFORE_THE_FLAG.items() if name in settings} | before
    if CONTENT not in before:  # a version that did not record it
        settings = {name: value for name, value in settings.items() if name != CONTENT}
    # A flag that an earlier version lacks changes nothing while it is off.
    names = dict.fromkeys([*before, *(name for name, value in settings.items() if name in before or value)])
    return [
        f"{CONTENT} (other images or columns under the same name)"
        if name == CONTENT
        else f"{name} {_shown(before.get(name))} -> {_shown(settings.get(name))}"
        for name in names
        if before.get(name) != settings.get(name)
    ]


def set_aside(output_dir: Path, start: Path) -> Path:
    """Renames the files of abandoned branches when a run is resumed from a checkpoint.

    These are the checkpoints that do not lead to it (copies of the logs move with them), later checkpoints of the
    plain model of --compare, and sample images of later steps. If the checkpoint itself was set aside before, it gets
    its name back, and the run gets its logs back.

    Args:
        output_dir: the output folder of the run.
        start: the checkpoint to resume from, in any folder.

    Returns:
        The checkpoint under its new name.
    """
    manifest = read_manifest(start)
    own = [folder for folder in checkpoints(output_dir) if not folder.samefile(start)]
    left = [folder for folder in own if not _leads_to(folder, manifest)]
    left += [folder for folder in checkpoints(output_dir / PLAIN_FOLDER) if step_of(folder) > manifest["step"]]
    for folder in left:
        aside = folder.rename(free_name(folder.with_name(f"{ABANDONED}{folder.name}")))
        for log in (folder.with_name(name) for name in LOGS):
            if log.is_file():
                shutil.copy2(log, aside)
        _report(f"{folder} is not on the branch of {start.name}: renamed to {aside.name}")
    for picture in files_left(output_dir, lambda left: left.stale == "later"):
        if (number := re.fullmatch("step-([0-9]+)", picture.stem)) and int(number[1]) > manifest["step"]:
            picture.rename(free_name(picture.with_name(f"{ABANDONED}{picture.name}")))
    own_name = output_dir / f"{PREFIX}{manifest['step']}"
    is_own = start.parent.resolve() == output_dir.resolve() and start.name.startswith(ABANDONED)
    if not is_own or own_name.exists():
        return start
    for log in (start / name for name in LOGS):
        if log.is_file():
            log.replace(output_dir / log.name)
    return start.rename(own_name)


def free_name(path: Path) -> Path:
    """Returns the first free path among path, path-2, path-3 and so on."""
    number, free = 1, path
    while free.exists() or free.is_symlink():
        number += 1
        free = path.with_stem(f"{path.stem}-{number}")
    return free


def _leads_to(folder: Path, later: dict) -> bool:
    """Whether a checkpoint is an ancestor of the checkpoint with the manifest `later`."""
    try:
        earlier = read_manifest(folder)
    except ValueError:
        return step_of(folder) <= later["step"]
    if "run" not in earlier or "run" not in later:  # from an older version
        return earlier["step"] <= later["step"]
    until = {entry["run"]: entry["step"] for entry in later["resumed_from"]} | {later["run"]: later["step"]}
    return earlier["step"] <= until.get(earlier["run"], -1)


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _shown(value) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
