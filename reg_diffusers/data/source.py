"""Restricts the files that may be read as data to those that a flag names, excluding links out of them."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..runtime.errors import UsageError
from ..runtime.links import is_part_of
from ..settings.data import DataSettings
from .arrow_files import rows_and_bytes

__all__ = ["FLAGS_OF_TRAINING", "Naming", "Source", "check_archive", "check_arrow", "check_parquet", "source_of"]

_GIGABYTE = 2**30
_RATIO = 200  # largest compression ratio: images and measurements do not compress that much


@dataclass(frozen=True)
class Naming:
    """The names of data and model in messages.

    Attributes:
        data: the flag that names the data; None for the flag of train_reg.py that is set.
        model: the name of the model that the data are for.
    """

    data: str | None = None
    model: str = "the given model"


FLAGS_OF_TRAINING = Naming()


@dataclass(frozen=True)
class Source:
    """The location of the data.

    Attributes:
        flag: the user's flag, such as "--train_data_dir photos".
        roots: the folders or URL prefixes that its files must lie in.
    """

    flag: str
    roots: tuple[str, ...]

    def holds(self, path: str) -> bool:
        """Whether a file lies there after links are resolved; for "zip://a.png::/photos/a.zip" the archive counts."""
        place = path.split("::")[-1] if "://" in path else path
        if "://" in place:
            return any("://" in root and place.startswith(root) for root in self.roots)
        return any(is_part_of(place, root) for root in self.roots)

    def check(self, path: str) -> None:
        """Checks that a file lies in the source after links are resolved.

        Raises:
            UsageError: if it does not.
        """
        if not self.holds(path):
            raise UsageError(
                f"{self.flag}: {path} lies outside and is not read: put it inside, or name the folder that holds it"
            )

    def check_files(self, paths: Iterable[str]) -> None:
        """Checks the location of all files, and the declared size of archives and tables, before any is opened.

        Raises:
            UsageError: if a file lies outside, or if it would expand to more than a plausible size.
        """
        for path in paths:
            self.check(path)
            check = _CHECKS.get(Path(path).suffix.lower())
            if "://" not in path and check is not None:
                check(Path(path))


def source_of(settings: DataSettings, embedded: Path, naming: Naming = FLAGS_OF_TRAINING) -> Source:
    """Returns the source that the flags name: a local folder or file, a Hub id, or else the embedded file."""
    name = settings.dataset_name or settings.train_data_dir
    flag = f"{naming.data or ('--dataset_name' if settings.dataset_name else '--train_data_dir')} {name}"
    if name is None:
        return Source("the embedded data", (str(embedded.parent),))
    if settings.dataset_name is None or Path(name).exists():
        return Source(flag, (name,) if Path(name).is_dir() else (name, str(Path(name).parent)))
    from datasets.config import HF_DATASETS_CACHE
    from huggingface_hub.constants import HF_HUB_CACHE

    downloads = (f"{HF_HUB_CACHE}/datasets--{name.replace('/', '--')}", str(settings.cache_dir or HF_DATASETS_CACHE))
    return Source(flag, (f"hf://datasets/{name}@", f"hf://datasets/{name}/", *downloads))


def check_archive(path: Path) -> None:
    """Raises UsageError for a .zip file with a compression ratio above that of any images: it could fill the disk."""
    with zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
    if size > _GIGABYTE and size > _RATIO * path.stat().st_size:
        raise UsageError(f"{path}: would expand from {path.stat().st_size:,} to {size:,} bytes, unlike any images")


def check_parquet(path: Path) -> int:
    """Returns the number of rows of a table.

    Raises:
        UsageError: if it declares more content than a file of its size can hold.
    """
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: not a readable parquet file: {' '.join(str(error).split())}") from error
    size = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
    _check_size(path, metadata.num_rows, size)
    return metadata.num_rows


def check_arrow(path: Path) -> None:
    """Raises UsageError for an Arrow file that declares more content than a file of its size can hold."""
    try:
        rows, size = rows_and_bytes(path)
    except Exception as error:  # of any type, because the content may be corrupt
        raise UsageError(f"{path}: not a readable arrow file: {' '.join(str(error).split())}") from error
    _check_size(path, rows, size)


def _check_size(path: Path, rows: int, size: int) -> None:
    file_size = path.stat().st_size
    if rows > file_size or (size > _GIGABYTE and size > _RATIO * file_size):
        raise UsageError(
            f"{path}: {rows:,} rows and {size:,} bytes are declared in a file of {file_size:,} bytes, unlike any"
            " images"
        )


_CHECKS = {".zip": check_archive, ".parquet": check_parquet, ".arrow": check_arrow}
