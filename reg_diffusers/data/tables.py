"""Reads tables of images by `datasets`: undecoded rows, their columns, their class labels."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np

from ..runs.run_folder import not_data
from ..runtime.errors import UsageError
from ..settings.data import DataSettings
from .columns import TEXTS, kind_of, listed_columns, with_named_images
from .image_folder import ImageFolder, list_images
from .pictures import extensions
from .row_groups import stream_row_groups
from .source import Source, check_parquet

__all__ = [
    "EMBEDDED",
    "LabelsError",
    "caption_column",
    "image_column",
    "label_column",
    "number_of_rows",
    "read_rows",
    "with_class_labels",
]

_KINDS_OF_LABELS = re.compile(r"u?int\d+|bool|(large_)?string(_view)?")
EMBEDDED = Path(__file__).with_name("fashion_mnist.parquet")


class LabelsError(UsageError):
    """Raised if class labels are requested, but the data lack usable ones.

    Attributes:
        flag: the flag that requests or names them.
        reason: the problem and the fix.
    """

    def __init__(self, reason: str, flag: str = "--class_conditional"):
        super().__init__(f"{flag}: {reason}")
        self.flag, self.reason = flag, reason


def read_rows(settings: DataSettings, source: Source, *, streaming: bool, images: Iterable[str] = ()):
    """Returns the rows that the flags name, and a line about unused parts of a folder or data set, or "".

    Rows are a `datasets.Dataset`, or an `IterableDataset` for streaming. Rows that only hold the names of local files,
    or that are saved in the format of `datasets`, are always a `Dataset`, which needs little memory. Columns named in
    `images` become columns of images if they hold file names in the metadata of a folder.

    Raises:
        UsageError: if there is nothing to read, if something is damaged, or if a file lies outside the named data.
    """
    try:
        found, unused = _read(settings, source, streaming, images)
    except UsageError:
        raise
    except Exception as error:  # of any type, because the content may be corrupt
        error = error.__cause__ if type(error).__name__ == "DatasetGenerationError" and error.__cause__ else error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{source.flag}: cannot be read: {reason}") from error
    if isinstance(found, dict):
        if "train" not in found and len(found) > 1:
            raise UsageError(f"{source.flag}: no split 'train' among {', '.join(found)}")
        used = "train" if "train" in found else next(iter(found))
        others = [_split_name(name, rows) for name, rows in found.items() if name != used]
        unused = unused or (f"only the split {used} is used, not {', '.join(others)}" if others else "")
        found = found[used]
    if hasattr(found, "__len__") and len(found) == 0:
        raise UsageError(f"{source.flag}: holds no images")
    return found, unused


def _read(settings: DataSettings, source: Source, streaming: bool, named: Iterable[str]):
    from datasets import load_from_disk

    name, folder = settings.dataset_name, settings.train_data_dir
    if name is None and folder is not None and not Path(folder).is_dir():
        raise UsageError(f"{source.flag}: no such folder")
    if name is not None and any((Path(name) / mark).is_file() for mark in ("dataset_dict.json", "state.json")):
        _check_saved(Path(name), source)
        return load_from_disk(name), ""
    images = _image_folder(settings, source)
    if images is not None and not images.metadata:
        return _rows_of(images, settings), images.unused()
    builder = _builder(settings, source) if images is None else _metadata_builder(images, settings.cache_dir)
    files = [file for split in (builder.config.data_files or {}).values() for file in split]
    source.check_files(files)
    local_names = builder.name == "imagefolder" and not any("://" in file for file in files)
    if streaming and not local_names:
        if _is_read_by_pages(builder, files):
            splits = builder.config.data_files.items()
            return {str(name): stream_row_groups(part, str(name), builder.info) for name, part in splits}, ""
        if hasattr(builder.config, "decode_num_threads"):  # otherwise, files of a Hub repository arrive decoded
            builder.config.decode_num_threads = 0
        found = builder.as_streaming_dataset()
        if any("://" in file for file in files) or not hasattr(next(iter(found.values())), "reshard"):
            return found, ""
        return {name: split.reshard() for name, split in found.items()}, ""  # row groups of tables mix better
    builder.download_and_prepare()
    found = builder.as_dataset()
    if images is None:
        return found, ""
    rows, folder = found["train"], _folder_of_names(images.metadata)
    if folder is not None:
        rows = with_named_images(rows, named, folder, extensions())
    return {"train": rows}, images.unused(_paths(rows, folder))


def _is_read_by_pages(builder, files: list[str]) -> bool:
    """Whether all files are .parquet and need no processing by `datasets`, which would hold whole row groups."""
    chosen = any(getattr(builder.config, name, None) is not None for name in ("columns", "filters"))
    return builder.name == "parquet" and not chosen and all(file.endswith(".parquet") for file in files)


def number_of_rows(settings: DataSettings, rows) -> int | None:
    """Returns the number of rows of a stream, if its metadata or files declare it."""
    declared = (rows.info.splits or {}).get(str(rows.split))
    if declared is not None and declared.num_examples:
        return declared.num_examples
    name = settings.dataset_name or (None if settings.train_data_dir else str(EMBEDDED))
    if name is not None and Path(name).is_file() and Path(name).suffix == ".parquet":
        return check_parquet(Path(name))
    return None


def _builder(settings: DataSettings, source: Source):
    from datasets import load_dataset_builder

    name, cache_dir = settings.dataset_name, settings.cache_dir
    name = name or str(EMBEDDED)
    if Path(name).is_file():
        kind, state = Path(name).suffix.lstrip("."), Path(name).stat()
        if kind not in ("parquet", "arrow"):
            raise UsageError(f"{source.flag}: a file must be .parquet, .arrow, .npy or .npz")
        files = _as_they_are([os.path.abspath(name)], f"{state.st_size} {state.st_mtime_ns}")
        return load_dataset_builder(kind, data_files=files, cache_dir=cache_dir)
    if Path(name).is_dir() and re.search(r"[\[\]*?]", os.path.abspath(name)):  # a pattern for `datasets`
        raise UsageError(
            f"{source.flag}: tables cannot be read from a path with [, ], * or ? in it: rename the folder"
        )
    return load_dataset_builder(name, settings.dataset_config_name, cache_dir=cache_dir)


def _image_folder(settings: DataSettings, source: Source) -> ImageFolder | None:
    """Returns the folder of images that a flag names; None if it names something else."""
    name = settings.dataset_name or settings.train_data_dir
    if name is None or not Path(name).is_dir():
        return None
    if settings.dataset_name is None:
        found = list_images(name, source, not_data(name))
        found.check_any(source)
        return found
    if settings.dataset_config_name or _is_repository(Path(name)):
        return None
    found = list_images(name, source, not_data(name))
    return found if len(found.files) > found.tables else None


def _is_repository(folder: Path) -> bool:
    """Whether a card defines the files of a data set, or a script would load it, which `datasets` rejects."""
    card = folder / "README.md"
    if card.is_file() and "\nconfigs:" in card.read_text(encoding="utf-8", errors="replace"):
        return True
    return any((folder / name).exists() for name in (".huggingface.yaml", f"{folder.resolve().name}.py"))


def _rows_of(images: ImageFolder, settings: DataSettings):
    """Builds a table of the undecoded images of a folder, with their classes if its subfolders define them."""
    import pyarrow
    from datasets import ClassLabel, Dataset, Features, Image

    columns, features = {"image": pyarrow.array(images.files, pyarrow.string())}, Features(image=Image())
    try:
        classes = images.classes()
        names = sorted(set(classes))
        numbers = {name: number for number, name in enumerate(names)}
        columns["label"] = pyarrow.array([numbers[name] for name in classes])  # lists would be encoded one by one
        features["label"] = ClassLabel(names=names)
    except ValueError as error:
        if settings.class_conditional and settings.label_column is None:
            raise LabelsError(str(error)) from error
    table = Dataset.from_dict(columns, features=features)
    return Dataset(table.data, table.info, fingerprint=images.fingerprint)  # so that changed files are decoded again


def _metadata_builder(images: ImageFolder, cache_dir: str | None):
    """Builds a reader of the rows in the metadata; the images lie next to the metadata, or in the same archive."""
    from datasets import load_dataset_builder

    archives = {path.rsplit("::", 1)[1] for path in images.metadata if "::" in path}
    files = [path for path in images.metadata if "::" not in path] + sorted(archives)
    return load_dataset_builder("imagefolder", data_files=_as_they_are(files, images.fingerprint), cache_dir=cache_dir)


def _folder_of_names(metadata: list[str]) -> str | None:
    """Returns the folder that names in the metadata are relative to; None if there are several, or in an archive."""
    return os.path.dirname(metadata[0]) if len(metadata) == 1 and "::" not in metadata[0] else None


def _as_they_are(files: list[str], fingerprint: str) -> dict:
    """Declares the files of one split without pattern matching; a new fingerprint invalidates the cache."""
    from datasets.data_files import DataFilesList

    return {"train": DataFilesList(files, [(fingerprint,)])}


def _paths(rows, folder: str | None) -> set[str]:
    """Returns the files that rows name: in columns of images or lists of images, or as texts relative to a folder."""
    import pyarrow
    from pyarrow import compute

    found = set()
    for column in rows.data.columns:
        while pyarrow.types.is_list(column.type) or pyarrow.types.is_large_list(column.type):
            column = compute.list_flatten(column)
        if pyarrow.types.is_struct(column.type) and column.type.get_field_index("path") >= 0:
            found.update(filter(None, compute.struct_field(column, "path").to_pylist()))
        elif folder is not None and str(column.type) in TEXTS:
            found.update(os.path.join(folder, name) for name in column.to_pylist() if name)
    return found


def _check_saved(folder: Path, source: Source) -> None:
    """Checks that all files listed by a folder of `Dataset.save_to_disk` lie in it."""
    for state in folder.rglob("state.json"):
        files = json.loads(state.read_text())["_data_files"]
        source.check_files(str(state.parent / file["filename"]) for file in files)


def image_column(table, wanted: str | None, *, flag: str = "--image_column", other_than: Collection[str] = ()) -> str:
    """Returns the requested column of images, or else the first one that is not in `other_than`.

    Raises:
        UsageError: if there is none; the message lists the columns.
    """
    from datasets import Image

    images = [name for name, feature in table.features.items() if isinstance(feature, Image) or _holds_bytes(feature)]
    if wanted is None and (others := [name for name in images if name not in other_than]):
        return others[0]
    if wanted in images:
        return wanted
    columns = listed_columns(table.features)
    no_other = f"no column of images other than {', '.join(images)}" if images else "no column of images"
    problem = no_other if wanted is None else f"{flag} {wanted!r} is not a column of images"
    raise UsageError(f"{problem}; the columns are: {columns}")


def caption_column(table, column: str) -> str:
    """Returns the column of the texts of the images.

    Raises:
        UsageError: it does not exist, or holds no texts; the message lists the columns.
    """
    columns = listed_columns(table.features)
    if column not in table.features:
        raise UsageError(f"--caption_column {column}: there is no such column; the columns are: {columns}")
    if kind_of(table.features[column]) not in TEXTS:
        raise UsageError(f"--caption_column {column} holds no texts; the columns are: {columns}")
    return column


def label_column(table, settings: DataSettings) -> str:
    """Returns the column of class labels.

    Raises:
        LabelsError: if it does not exist; the message lists the columns.
    """
    column = settings.label_column or "label"
    if column not in table.column_names:
        raise LabelsError(
            f"no column {column!r} among {', '.join(table.column_names)}; name it by --label_column, or put each class"
            " into its own subfolder"
        )
    return column


def with_class_labels(table, column: str):
    """Returns the table, the name of a column of integers from 0 to n-1, and the names of the n classes.

    Labels without class names are numbered in sorted order: 2 before 10, "ant" before "bee".

    Raises:
        LabelsError: for labels of another type, such as floats or lists, for images without a label, and for a stream
            without class names, because its other labels are unknown.
    """
    from datasets import ClassLabel, Dataset

    feature, flag = table.features[column], f"--label_column {column}"
    if not isinstance(feature, ClassLabel) and not _KINDS_OF_LABELS.match(kind_of(feature)):
        raise LabelsError(
            f"a class must be an integer or a string, but this column holds {kind_of(feature)}: name another one, or"
            " convert it",
            flag,
        )
    if not isinstance(table, Dataset):
        if isinstance(feature, ClassLabel):
            return table, column, feature.names
        raise LabelsError(
            f"a stream needs a column with class names (a ClassLabel), but this column holds {kind_of(feature)}: drop"
            " --streaming, or cast the column",
            flag,
        )
    values = table.select_columns(column)[column][:]
    if any(value is None for value in values):
        raise LabelsError("every image needs an integer or a string, but some have none", flag)
    if isinstance(feature, ClassLabel):
        names, labels = feature.names, np.asarray(values, dtype=np.int64)
        if labels.min() < 0:
            raise LabelsError("some images have no label", flag)
    else:
        found, labels = np.unique(values, return_inverse=True)
        names = [str(name) for name in found]
    table = table.remove_columns([name for name in ("class_label",) if name in table.column_names])
    return table.add_column("class_label", labels.astype(np.int64)), "class_label", names


def _holds_bytes(feature) -> bool:
    """Whether a column without the metadata of `datasets` has the structure of encoded images, as pandas writes it."""
    return isinstance(feature, dict) and set(feature) == {"bytes", "path"}


def _split_name(name: str, rows) -> str:
    """Returns the name of a split with its number of rows, if that is known without reading a stream."""
    return f"{name} ({len(rows):,} rows)" if hasattr(rows, "__len__") else name
