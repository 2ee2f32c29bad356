"""Checks the folder that --output names."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["check_folder"]


def check_folder(output: Path) -> None:
    """Raises `UsageError` unless this is a folder that can be written, or one that can be made."""
    from ..training.errors import UsageError

    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output} is a file: name a folder")
    there = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not os.access(there, os.W_OK):
        raise UsageError(f"--output {output} cannot be written: permission denied")
