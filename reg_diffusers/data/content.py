"""Hashes of the content of a data set, so that a run is not continued on other images of the same names.

They do not depend on paths and modification times, because a cluster may copy the data for each job. A table of
decoded images is hashed once per state of its files: the result is kept next to the decoded images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from .. import __version__
from ..runtime.files import write_whole

__all__ = ["array_digest", "joined", "stream_digest", "table_digests"]

_ROWS = 1000  # at a time
_STREAMED = 16  # images


def table_digests(table, cache_dir: Path) -> dict[str, str]:
    """Returns a hash of each column of a table of decoded images, by name.

    Args:
        table: a `datasets.Dataset`; images are flattened uint8.
        cache_dir: the folder that keeps the result for the next run.
    """
    names = table.column_names
    key = hashlib.sha256(repr((table._fingerprint, names, __version__)).encode()).hexdigest()
    path = cache_dir / f"content-{key}.txt"
    try:
        found = path.read_text(encoding="ascii").split()
        if len(found) == len(names):
            return dict(zip(names, found, strict=True))
    except (OSError, ValueError):
        pass  # missing or damaged
    digests = [hashlib.sha256() for _ in names]
    rows = table.with_format("arrow")
    for start in range(0, len(table), _ROWS):
        part = rows[start : start + _ROWS].combine_chunks()
        for name, digest in zip(names, digests, strict=True):
            digest.update(_bytes_of(part.column(name)))
    found = [digest.hexdigest() for digest in digests]
    write_whole(path, lambda temporary: temporary.write_text("\n".join(found), encoding="ascii"))
    return dict(zip(names, found, strict=True))


def array_digest(array: np.ndarray) -> str:
    """Returns a hash of an array (N, ...), which may be mapped from a file."""
    digest = hashlib.sha256(repr((array.dtype.str, array.shape)).encode())
    for start in range(0, len(array), _ROWS):
        digest.update(np.ascontiguousarray(array[start : start + _ROWS]))
    return digest.hexdigest()


def stream_digest(examples) -> str:
    """Returns a hash of the first images of a stream, with what belongs to them."""
    batch = examples.__getitems__(list(range(min(len(examples), _STREAMED))))
    columns = batch.pop("columns", {})
    content = {
        name: value.numpy().tobytes() if isinstance(value, torch.Tensor) else value
        for name, value in {**batch, **columns}.items()
    }
    return hashlib.sha256(repr(sorted(content.items())).encode()).hexdigest()


def joined(digests: Iterable[str]) -> str:
    """Returns one hash of several."""
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


def _bytes_of(column) -> bytes | np.ndarray:
    import pyarrow

    column = column.combine_chunks()
    if pyarrow.types.is_list(column.type) or pyarrow.types.is_fixed_size_list(column.type):
        return np.ascontiguousarray(column.flatten().to_numpy())
    return repr(column.to_pylist()).encode("utf-8", "surrogatepass")
