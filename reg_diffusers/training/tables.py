"""Tables of pictures as `datasets` reads them: rows not yet decoded, their columns, their class labels."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from .errors import UsageError
from .source import Source, check_parquet

__all__ = ["EMBEDDED", "image_column", "label_column", "number_of_rows", "read_rows", "with_class_labels"]

EMBEDDED = Path(__file__).parents[1] / "data" / "fashion_mnist.parquet"


def read_rows(args: argparse.Namespace, source: Source, *, streaming: bool):
    """The rows that the flags name: a `datasets.Dataset`, or for streaming an `IterableDataset`.

    Where rows are only the names of local files, or are on the disk as `datasets` keeps them, they are a `Dataset` in
    either case: it is mapped into memory, and needs none of it.

    Raises:
        UsageError: nothing to read there, something damaged, or a file that lies outside of what was named.
    """
    try:
        found = _read(args, source, streaming)
    except UsageError:
        raise
    except Exception as error:  # any kind, for the content is anybody's
        error = error.__cause__ if type(error).__name__ == "DatasetGenerationError" and error.__cause__ else error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{source.flag}: cannot be read: {reason}") from error
    if isinstance(found, dict):
        if "train" not in found and len(found) > 1:
            raise UsageError(f"{source.flag}: no split 'train' among {', '.join(found)}")
        found = found["train"] if "train" in found else next(iter(found.values()))
    if hasattr(found, "__len__") and len(found) == 0:
        raise UsageError(f"{source.flag}: holds no images")
    return found


def _read(args: argparse.Namespace, source: Source, streaming: bool):
    from datasets import load_from_disk

    name, folder = args.dataset_name, args.train_data_dir
    if name is None and folder is not None and not Path(folder).is_dir():
        raise UsageError(f"{source.flag}: no such folder")
    if name is not None and any((Path(name) / mark).is_file() for mark in ("dataset_dict.json", "state.json")):
        _check_saved(Path(name), source)
        return load_from_disk(name)
    builder = _builder(args, source)
    files = [file for split in (builder.config.data_files or {}).values() for file in split]
    source.check_files(files)
    local_names = builder.name == "imagefolder" and not any("://" in file for file in files)
    if streaming and not local_names:
        if hasattr(builder.config, "decode_num_threads"):  # files of a Hub repository would come decoded
            builder.config.decode_num_threads = 0
        found = builder.as_streaming_dataset()
        if any("://" in file for file in files) or not hasattr(next(iter(found.values())), "reshard"):
            return found
        return {name: split.reshard() for name, split in found.items()}  # tables by row groups, which mix better
    builder.download_and_prepare()
    return builder.as_dataset()


def number_of_rows(args: argparse.Namespace, rows) -> int | None:
    """How many rows a stream has, where its author or its files say so."""
    said = (rows.info.splits or {}).get(str(rows.split))
    if said is not None and said.num_examples:
        return said.num_examples
    name = args.dataset_name or (None if args.train_data_dir else str(EMBEDDED))
    if name is not None and Path(name).is_file() and Path(name).suffix == ".parquet":
        return check_parquet(Path(name))
    return None


def _builder(args: argparse.Namespace, source: Source):
    from datasets import load_dataset_builder

    name, folder, cache_dir = args.dataset_name, args.train_data_dir, args.cache_dir
    if name is None and folder is None:
        return load_dataset_builder("parquet", data_files=str(EMBEDDED), cache_dir=cache_dir)
    if name is None:
        return load_dataset_builder("imagefolder", data_dir=folder, cache_dir=cache_dir)
    if Path(name).is_file():
        kind = Path(name).suffix.lstrip(".")
        if kind not in ("parquet", "arrow"):
            raise UsageError(f"{source.flag}: a file must be .parquet, .arrow, .npy or .npz")
        return load_dataset_builder(kind, data_files=name, cache_dir=cache_dir)
    return load_dataset_builder(name, args.dataset_config_name, cache_dir=cache_dir)


def _check_saved(folder: Path, source: Source) -> None:
    """The files that a folder of `Dataset.save_to_disk` lists must be in it."""
    for state in folder.rglob("state.json"):
        for file in json.loads(state.read_text())["_data_files"]:
            source.check(str(state.parent / file["filename"]))


def image_column(table, wanted: str | None, *, flag: str = "--image_column", other_than: str | None = None) -> str:
    """The column of images that is wanted, or else the first but one.

    Raises:
        UsageError: there is none; the message lists the columns.
    """
    from datasets import Image

    images = [name for name, feature in table.features.items() if isinstance(feature, Image) or _holds_bytes(feature)]
    if wanted is None and (others := [name for name in images if name != other_than]):
        return others[0]
    if wanted in images:
        return wanted
    columns = ", ".join(f"{name} ({_kind(feature)})" for name, feature in table.features.items())
    problem = "no column of images" if wanted is None else f"{flag} {wanted!r} is not a column of images"
    raise UsageError(f"{problem}; the columns are: {columns}")


def label_column(table, args: argparse.Namespace) -> str:
    """The column of class labels.

    Raises:
        UsageError: it is not there; the message lists the columns.
    """
    column = args.label_column or "label"
    if column not in table.column_names:
        raise UsageError(
            f"--class_conditional: no column {column!r} among {', '.join(table.column_names)}; name it by"
            " --label_column, or put each class into a subfolder of its own"
        )
    return column


def with_class_labels(table, column: str):
    """The table, the name of a column of whole numbers from 0 to n-1, and the names of the n classes.

    Labels without names are numbered in their order: 2 before 10, "ant" before "bee".

    Raises:
        UsageError: images without a label; labels without names in a stream, which nobody has seen to its end.
    """
    from datasets import ClassLabel, Dataset

    feature = table.features[column]
    if not isinstance(table, Dataset):
        if isinstance(feature, ClassLabel):
            return table, column, feature.names
        raise UsageError(
            f"--label_column {column}: in a stream the names of the classes must be known (a ClassLabel); this is"
            f" {_kind(feature)}: drop --streaming, or cast the column"
        )
    values = table.select_columns(column)[column][:]
    if any(value is None or isinstance(value, float) for value in values):
        raise UsageError(f"--label_column {column}: every image needs a whole number or a word, some have none")
    if isinstance(feature, ClassLabel):
        names, labels = feature.names, np.asarray(values, dtype=np.int64)
        if labels.min() < 0:
            raise UsageError(f"--label_column {column}: some images have no label")
    else:
        found, labels = np.unique(values, return_inverse=True)
        names = [str(name) for name in found]
    table = table.remove_columns([name for name in ("class_label",) if name in table.column_names])
    return table.add_column("class_label", labels.astype(np.int64)), "class_label", names


def _holds_bytes(feature) -> bool:
    """Whether a column without the metadata of `datasets` can hold encoded images, as pandas writes them."""
    return isinstance(feature, dict) and set(feature) == {"bytes", "path"}


def _kind(feature) -> str:
    return getattr(feature, "dtype", None) or type(feature).__name__
