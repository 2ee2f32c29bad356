"""Handles machines without a shared file system: sends small files to the main process, raises for large ones."""

from __future__ import annotations

from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from .errors import UsageError
from .processes import on_main_process, together

__all__ = ["bring_files", "check_folder"]

_SMALL = 2**20  # bytes; the state of a process in a checkpoint has a few thousand


def bring_files(state: PartialState, folder: Path) -> None:
    """Copies files of a folder to the main process if another machine has its own folder of that name.

    Does nothing if all processes share the folder. Call it in all processes, after all have written.

    Raises:
        UsageError: in all processes, if shards of the weights are among the files.
    """
    if state.num_processes == 1:
        return
    seen = [_names(folder) if state.is_main_process else None]
    (seen,) = broadcast_object_list(seen)
    missing = [name for name in _names(folder) if name not in seen] if state.is_local_main_process else []
    brought = gather_object(together(state, lambda: [(name, _small_file(folder / name)) for name in missing]))
    on_main_process(state, lambda: [_write(folder / name, content) for name, content in brought])


def check_folder(state: PartialState, folder: Path) -> None:
    """Checks that all processes see a folder that the main process found.

    Raises:
        UsageError: in all processes, if one does not.
    """

    def check() -> None:
        if not folder.is_dir():
            raise UsageError(f"{folder} does not exist: {_FIX}, or copy the folder to each machine")

    together(state, check)


_FIX = "name an --output_dir that all machines share"


def _names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _small_file(path: Path) -> bytes:
    if path.stat().st_size > _SMALL:
        raise UsageError(f"{path.name} is too large to send to the main process: {_FIX}")
    return path.read_bytes()


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
