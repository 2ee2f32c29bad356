"""File names, and atomic writes."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

__all__ = ["file_name", "write_whole"]


def file_name(title: str) -> str:
    """Converts a title to a unique file name without a suffix.

    A title of ASCII letters, digits and .-_ is not changed. For any other title, these characters are kept, followed
    by a hash of the title.
    """
    kept = re.sub(r"[^A-Za-z0-9_.-]+", "_", title)[:60]
    if kept == title and not title.startswith("."):
        return title
    return f"{kept.lstrip('.')}-{hashlib.sha256(title.encode()).hexdigest()[:12]}"


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write(temporary path)` and renames the result to `path`, so no reader sees an incomplete file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
