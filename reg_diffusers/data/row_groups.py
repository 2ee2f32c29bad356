"""Streams Parquet files a few rows at a time, so memory does not depend on the size of their row groups."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["stream_row_groups"]

_ROWS = 16  # rows per read
_BUFFER = 2**20  # bytes per column
_REMOTE_BUFFER = 2**23  # bytes per column; each buffer is one request
_READ_AHEAD = 2**16  # small, because columns alternate in a file, and data beyond a request are wasted


def stream_row_groups(files: list[str], split: str, info):
    """Returns the rows of all files as a `datasets.IterableDataset`.

    `datasets` holds whole row groups in memory, several times over. This reader holds one page of the file, typically
    up to a thousand rows. A shard is a row group of a local file or a whole remote file, because the number of row
    groups of a remote file would need a request per file.

    Args:
        files: local paths, or URLs that `datasets` can open, such as hf://datasets/NAME/FILE.
        split: the name of their split.
        info: the `datasets.DatasetInfo` of the data set; if it has no features, they are read from the first file.
    """
    from datasets import Features, IterableDataset, NamedSplit
    from datasets.iterable_dataset import ArrowExamplesIterable

    info = info.copy()
    if info.features is None:
        with _opened(files[0]) as table:
            info.features = Features.from_arrow_schema(table.schema_arrow)
    groups = [shard for file in files for shard in _shards(file)]
    tables = ArrowExamplesIterable(_tables, {"groups": groups, "schema": info.features.arrow_schema})
    return IterableDataset(tables, info=info, split=NamedSplit(split))


def _shards(file: str) -> list[tuple[str, int | None]]:
    """Returns the row groups of a local file, or a whole remote file."""
    import pyarrow.parquet

    if "://" in file:
        return [(file, None)]
    return [(file, group) for group in range(pyarrow.parquet.read_metadata(file).num_row_groups)]


def _tables(groups: list[tuple[str, int | None]], schema) -> Iterator[tuple]:
    """Yields parts of row groups, each with a key."""
    import pyarrow
    from datasets.table import table_cast

    for file, group in groups:
        with _opened(file) as table:
            batches = table.iter_batches(_ROWS, row_groups=None if group is None else [group], use_threads=False)
            for number, batch in enumerate(batches):
                yield f"{file} {group} {number}", table_cast(pyarrow.Table.from_batches([batch]), schema)


@contextmanager
def _opened(file: str):
    """Opens a `pyarrow.parquet.ParquetFile` that reads its columns in small buffers."""
    import pyarrow.parquet
    from datasets.utils.file_utils import xopen

    if "://" not in file:
        with pyarrow.parquet.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False) as table:
            yield table
        return
    with (
        xopen(file, "rb", block_size=_READ_AHEAD) as content,  # retries if the connection breaks
        pyarrow.parquet.ParquetFile(content, buffer_size=_REMOTE_BUFFER, pre_buffer=False) as table,
    ):
        yield table
