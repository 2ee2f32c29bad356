"""Decides which files belong to a folder: those that lie in it after links are resolved."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch

__all__ = ["check_links", "is_part_of", "linked_folders"]

_REPOSITORY = re.compile(r"(models|datasets|spaces|kernels)--.+")
_SHARED_BLOB = re.compile(r"[0-9a-f]{2}/[0-9a-f]{64}")


def is_part_of(path: str, folder: str) -> bool:
    """Whether a file may be read as part of a folder: it lies there after links are resolved.

    A snapshot in the Hub cache holds links to the blobs of its repository; these count as part of it.

    Args:
        path: a file or folder, absolute or relative to the current folder.
        folder: the folder; it may itself be a link.
    """
    real, root = _real_path(path), _real_folder(os.path.abspath(folder))
    return _is_in(real, root) or _is_blob(real, root)


def check_links(folder: str | os.PathLike, names: Iterable[str] = (".",), ignored: Sequence[str] = ()) -> None:
    """Raises if a folder to upload contains a link to a file or folder outside.

    Args:
        folder: the folder.
        names: the entries of the folder to check, with everything below them.
        ignored: patterns of paths below the folder that are not uploaded, in the syntax of the Hub client.

    Raises:
        ValueError: if there is such a link; the message names it.
    """
    folder = os.fspath(folder)
    for name in names:
        top = os.path.normpath(os.path.join(folder, name))
        for path in (top, *_below(top)) if name != "." else _below(top):
            if not os.path.islink(path) or is_part_of(path, folder):
                continue
            if not _is_ignored(path, folder, ignored):
                raise ValueError(
                    f"{path} is a link out of {folder}, which is not uploaded: replace it by its target, or remove it"
                )


def linked_folders(folder: str | os.PathLike, ignored: Sequence[str] = ()) -> list[str]:
    """Returns the links to folders in a folder; the Hub client skips them with all their content.

    Args:
        folder: the folder to upload.
        ignored: see `check_links`.
    """
    folder = os.fspath(folder)
    links = (path for path in _below(folder) if os.path.islink(path) and os.path.isdir(path))
    return sorted(path for path in links if not _is_ignored(path, folder, ignored))


def _below(top: str) -> Iterator[str]:
    """Yields all files and folders below a folder, without following links to folders."""
    for place, folders, files in os.walk(top):
        yield from (os.path.join(place, entry) for entry in (*folders, *files))


def _is_ignored(path: str, folder: str, patterns: Sequence[str]) -> bool:
    relative = os.path.relpath(path, folder).replace(os.sep, "/")
    return any(fnmatch(relative, pattern) or fnmatch(f"{relative}/", pattern) for pattern in patterns)


def _is_blob(real: str, root: str) -> bool:
    """Whether a real path is a blob of the Hub's cache, for a real folder models--user--name/snapshots/<commit>."""
    parts = root.split(os.sep)
    for place in range(len(parts) - 2, 0, -1):
        if parts[place] == "snapshots" and _REPOSITORY.fullmatch(parts[place - 1]):
            blobs = os.sep.join((*parts[:place], "blobs"))
            shared = os.sep.join((*parts[: place - 1], "blobs", ""))  # shared by all repositories of the cache
            inside = real.removeprefix(shared) if real.startswith(shared) else ""
            return os.path.dirname(real) == blobs or _SHARED_BLOB.fullmatch(inside.replace(os.sep, "/")) is not None
    return False


def _real_path(path: str) -> str:
    """Resolves the links of a path; caches the folders."""
    folder, name = os.path.split(os.path.join(os.getcwd(), path))
    real = os.path.join(_real_folder(folder), name)
    return os.path.realpath(real) if name in ("", ".", "..") or os.path.islink(real) else real


@functools.lru_cache(maxsize=100_000)
def _real_folder(path: str) -> str:
    return os.path.realpath(path)


def _is_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)
