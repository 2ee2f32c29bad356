"""Machines that do not see each other's files: small ones are brought to the main process, large ones refused."""

from __future__ import annotations

from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from .errors import UsageError
from .processes import on_main_process, together

__all__ = ["bring_files", "check_folder"]

_SMALL = 2**20  # bytes; the state of a process in a checkpoint is some thousands


def bring_files(state: PartialState, folder: Path) -> None:
    """Writes what the main process does not see of a folder, because another machine has its own of that name.

    Where all see one and the same folder, nothing is done. To be called by all processes, when all have written.

    Raises:
        UsageError: in all processes: parts of the weights are among it.
    """
    if state.num_processes == 1:
        return
    seen = [_names(folder) if state.is_main_process else None]
    (seen,) = broadcast_object_list(seen)
    missing = [name for name in _names(folder) if name not in seen] if state.is_local_main_process else []
    brought = gather_object(together(state, lambda: [(name, _small_file(folder / name)) for name in missing]))
    on_main_process(state, lambda: [_write(folder / name, content) for name, content in brought])


def check_folder(state: PartialState, folder: Path) -> None:
    """Whether all processes see a folder that the main process has found.

    Raises:
        UsageError: in all processes: one does not.
    """

    def check() -> None:
        if not folder.is_dir():
            raise UsageError(f"{folder} is not there: {_FIX}, or copy the folder to each")

    together(state, check)


_FIX = "name an --output_dir that all machines see"


def _names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _small_file(path: Path) -> bytes:
    if path.stat().st_size > _SMALL:
        raise UsageError(f"{path.name} is too large to be sent to the main process: {_FIX}")
    return path.read_bytes()


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
