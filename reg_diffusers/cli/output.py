"""Checks the folder of --output, and reads and writes the settings in it."""

from __future__ import annotations

import json
import os
from pathlib import Path

__all__ = ["check_folder", "read_settings", "write_settings"]


def check_folder(output: Path) -> None:
    """Raises `UsageError` unless this is a writable folder or can be created as one."""
    from ..runtime.errors import UsageError

    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output} is a file: name a folder")
    there = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not os.access(there, os.W_OK):
        raise UsageError(f"--output {output} cannot be written: permission denied")


def read_settings(output: Path, name: str) -> dict | None:
    """Reads the settings from a file of this name; None if there is no such file.

    Raises:
        UsageError: if the file cannot be read.
    """
    from ..runtime.errors import UsageError

    path = output / name
    if not path.is_file():
        return None
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise UsageError(f"--output {output}: {name} cannot be read: name another folder") from error
    return settings


def write_settings(output: Path, name: str, settings: dict) -> None:
    """Writes the settings to a file of this name.

    Raises:
        UsageError: if the folder cannot be written.
    """
    from ..runtime.errors import UsageError
    from ..runtime.files import write_whole

    text = json.dumps(settings, indent=2) + "\n"
    try:
        write_whole(output / name, lambda part: part.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--output {output} cannot be written: {error.strerror}") from error
