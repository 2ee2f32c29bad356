"""Which files may be read as data: those that a flag names, and nothing that they point to outside."""

from __future__ import annotations

import argparse
import functools
import os
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .errors import UsageError

__all__ = ["Source", "check_archive", "check_parquet", "source_of"]

_GIGABYTE = 2**30
_RATIO = 200  # of bytes after and before: pictures and measurements do not shrink so much


@dataclass(frozen=True)
class Source:
    """Where data come from.

    Attributes:
        flag: how the user named it, such as "--train_data_dir photos".
        roots: folders, or beginnings of URLs, in which its files lie.
    """

    flag: str
    roots: tuple[str, ...]

    def check(self, path: str) -> None:
        """Looks at where a file really is, links followed. Of "zip://a.png::/photos/a.zip" the archive counts.

        Raises:
            UsageError: it is somewhere else.
        """
        place = path.split("::")[-1]
        if "://" in place:
            inside = any("://" in root and place.startswith(root) for root in self.roots)
        else:
            inside = any(_is_in(_real_path(place), os.path.realpath(root)) for root in self.roots)
        if not inside:
            raise UsageError(
                f"{self.flag}: {path} is not in there, and is not read: put it in there, or name the folder it is in"
            )

    def check_files(self, paths: Iterable[str]) -> None:
        """Looks at all files before any is opened; also at what archives and tables say of their size.

        Raises:
            UsageError: one is somewhere else, or would expand to what no data are.
        """
        for path in paths:
            self.check(path)
            if "://" not in path and path.endswith(".zip"):
                check_archive(Path(path))
            if "://" not in path and path.endswith(".parquet"):
                check_parquet(Path(path))


def source_of(args: argparse.Namespace, embedded: Path) -> Source:
    """What the flags name as data: a local folder or file, a Hub id, or else the embedded file."""
    name = args.dataset_name or args.train_data_dir
    flag = f"--dataset_name {name}" if args.dataset_name else f"--train_data_dir {name}"
    if name is None:
        return Source("the embedded data", (str(embedded.parent),))
    if args.dataset_name is None or Path(name).exists():
        return Source(flag, (name,) if Path(name).is_dir() else (name, str(Path(name).parent)))
    from datasets.config import HF_DATASETS_CACHE
    from huggingface_hub.constants import HF_HUB_CACHE

    downloads = (f"{HF_HUB_CACHE}/datasets--{name.replace('/', '--')}", str(args.cache_dir or HF_DATASETS_CACHE))
    return Source(flag, (f"hf://datasets/{name}@", f"hf://datasets/{name}/", *downloads))


def check_archive(path: Path) -> None:
    """Raises UsageError for a .zip that would fill the disk: as many bytes from as few as no pictures give."""
    with zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
    if size > _GIGABYTE and size > _RATIO * path.stat().st_size:
        raise UsageError(f"{path}: would expand from {path.stat().st_size:,} to {size:,} bytes, as no pictures do")


def check_parquet(path: Path) -> int:
    """The number of rows of a table.

    Raises:
        UsageError: it says that it holds more than a file of its size can.
    """
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: no parquet file that can be read: {' '.join(str(error).split())}") from error
    file_size = path.stat().st_size
    size = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
    if metadata.num_rows > file_size or (size > _GIGABYTE and size > _RATIO * file_size):
        raise UsageError(
            f"{path}: {metadata.num_rows:,} rows and {size:,} bytes are said to be in a file of {file_size:,} bytes,"
            " as no pictures are"
        )
    return metadata.num_rows


def _real_path(path: str) -> str:
    """The path with links followed; folders are looked at once."""
    folder, name = os.path.split(os.path.join(os.getcwd(), path))
    real = os.path.join(_real_folder(folder), name)
    return os.path.realpath(real) if name in ("", ".", "..") or os.path.islink(real) else real


@functools.lru_cache(maxsize=100_000)
def _real_folder(path: str) -> str:
    return os.path.realpath(path)


def _is_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)
