"""The manifest of a checkpoint: records its files, run and settings, and detects damage.

It holds the size and SHA-256 of every file, and a SHA-256 of itself. So any flipped bit marks the checkpoint as
damaged, and never changes its settings unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path, PurePath

from accelerate.utils.other import load

__all__ = ["MANIFEST", "damage", "force_to_disk", "read_manifest", "write_manifest"]

MANIFEST = "manifest.json"

_OWN_SUM = "sha256"
# Files with these suffixes would be loaded; other files, such as notes, are allowed.
_LOADED = (".bin", ".distcp", ".pkl", ".pt", ".safetensors")


def write_manifest(folder: Path, step: int, settings: dict, run: str, resumed_from: list[dict]) -> None:
    """Writes the manifest of a folder, and flushes the folder to the disk.

    Args:
        folder: the folder of the checkpoint.
        step: number of optimizer steps taken.
        settings: the settings that affect the mathematics, as JSON.
        run: a unique name of this start of the training.
        resumed_from: the checkpoints that the run was resumed from, oldest first: {"run", "step", "checkpoint"} each.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    content = {
        "step": step,
        "run": run,
        "resumed_from": resumed_from,
        "settings": settings,
        "files": {path.relative_to(folder).as_posix(): _size_and_hash(path) for path in files},
    }
    (folder / MANIFEST).write_text(json.dumps({**content, _OWN_SUM: _sum(content)}, indent=1), encoding="utf-8")
    for path in [*files, folder / MANIFEST, folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        force_to_disk(path)


def read_manifest(folder: Path) -> dict:
    """Reads the manifest of a checkpoint; those of older versions lack "run" and "resumed_from".

    Raises:
        ValueError: if it cannot be read or has changed; the message gives the reason.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"its {MANIFEST} cannot be read ({type(error).__name__})") from error
    content = content if isinstance(content, dict) else {}
    own_sum = content.pop(_OWN_SUM, None)  # older versions wrote none
    if own_sum is not None and own_sum != _sum(content):
        raise ValueError(f"the content of its {MANIFEST} has changed")
    files = content.get("files")
    for name in files if isinstance(files, dict) else ():
        if ".." in PurePath(name).parts or PurePath(name).is_absolute():
            raise ValueError(f"its {MANIFEST} names a file outside the folder, {name}")
    if missing := [name for name, is_right in _PARTS.items() if not is_right(content.get(name))]:
        raise ValueError(f"its {MANIFEST} cannot be read (no {', '.join(missing)})")
    return content


def damage(folder: Path) -> str | None:
    """Describes the damage of a checkpoint; None if it is intact."""
    try:
        files = read_manifest(folder)["files"]
        for name, expected in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["size"]:
                return f"{name} has {path.stat().st_size:,} bytes instead of {expected['size']:,}"
            if _size_and_hash(path) != expected:
                return f"the content of {name} has changed"
        present = (path for path in folder.rglob("*") if path.suffix in _LOADED)
        if extra := [path for path in present if path.relative_to(folder).as_posix() not in files]:
            return f"{extra[0].relative_to(folder)} does not belong to it: move that file away"
        if problem := _unreadable_random_states(folder, files):
            return problem
    except OSError as error:
        return f"{error.filename or 'a file'} cannot be read: {error.strerror}"
    except ValueError as error:
        return str(error)
    return None


def force_to_disk(path: Path) -> None:
    """Flushes a file, or the directory entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unreadable_random_states(folder: Path, files: dict) -> str | None:
    """Names random states that cannot be read: Accelerate would silently continue with other random numbers."""
    names = [name for name in files if name.startswith("random_states_")]
    if not names:
        return "its random states are missing"
    for name in names:
        try:
            states = load(folder / name)
        except Exception as error:  # any type, because the file may hold anything
            return f"{name} cannot be read ({type(error).__name__})"
        kept = ("random_state", "numpy_random_seed", "torch_manual_seed")
        if not isinstance(states, dict) or any(states.get(part) is None for part in kept):
            return f"{name} lacks random states"
    return None


def _size_and_hash(path: Path) -> dict:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def _sum(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _is_step(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_files(value) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(file, dict) and isinstance(file.get("size"), int) for file in value.values())
    )


def _is_lineage(value) -> bool:
    return value is None or (
        isinstance(value, list)
        and all(isinstance(entry, dict) and _is_step(entry.get("step")) and "run" in entry for entry in value)
    )


_PARTS = {
    "step": _is_step,
    "settings": lambda value: isinstance(value, dict),
    "files": _are_files,
    "resumed_from": _is_lineage,
}
