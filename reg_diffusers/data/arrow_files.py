"""Reads the declared size of an .arrow file's content, without expanding it.

Each batch of rows has a flatbuffers description (Arrow columnar format, "Serialization and interprocess
communication"). Each compressed buffer begins with its uncompressed size. pyarrow reports neither.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

__all__ = ["rows_and_bytes"]

_FILE = b"ARROW1"  # at both ends of the file format; the other format is a stream of messages
_DICTIONARY, _BATCH = 2, 3


def rows_and_bytes(path: Path) -> tuple[int, int]:
    """Returns the number of rows of a file, and their size in memory in bytes.

    Raises:
        Exception: if the file is damaged; of any type, because the content may be corrupt.
    """
    rows = size = 0
    for message in _messages(path):
        content = message.metadata.to_pybytes()
        root = _Table(content, struct.unpack_from("<I", content, 0)[0])
        kind, batch = root.number(1, "<B"), root.table(2)
        if kind == _DICTIONARY:
            batch = batch.table(1)
        elif kind == _BATCH:
            rows += batch.number(0, "<q")
        else:
            continue
        is_compressed = batch.table(3) is not None
        for start, length in batch.structs(2, "<qq"):
            before = _size_before(message.body, start, length) if is_compressed else length
            if before < 0:
                raise ValueError("a buffer of negative size")
            size += before
    return rows, size


def _messages(path: Path) -> Iterator:
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:
        if file.read(len(_FILE)) != _FILE:
            file.seek(0)
            yield from pyarrow.ipc.MessageReader.open_stream(file)
            return
        file.seek(file.size() - len(_FILE) - 4)
        (length,) = struct.unpack("<i", file.read(4))
        file.seek(file.size() - len(_FILE) - 4 - length)
        content = file.read(length)
        footer = _Table(content, struct.unpack_from("<I", content, 0)[0])
        for blocks in (2, 3):
            for place, _, _ in footer.structs(blocks, "<qi4xq"):
                file.seek(place)
                yield pyarrow.ipc.read_message(file)


def _size_before(body, start: int, length: int) -> int:
    """Returns the uncompressed size of a buffer; a stored size of -1 marks a buffer that is not compressed."""
    if length < 8:
        return length
    (size,) = struct.unpack("<q", body.slice(start, 8).to_pybytes())
    return length - 8 if size == -1 else size


class _Table:
    """A flatbuffers table, which finds its fields by number in a table of offsets.

    Args:
        content: all bytes.
        place: the position of the table.
    """

    def __init__(self, content: bytes, place: int):
        self._content, self._place = content, place
        self._offsets = place - struct.unpack_from("<i", content, place)[0]

    def number(self, field: int, form: str) -> int:
        """Returns a number; 0 if the field is absent."""
        place = self._field(field)
        return 0 if place is None else struct.unpack_from(form, self._content, place)[0]

    def table(self, field: int) -> _Table | None:
        """Returns a nested table; None if the field is absent."""
        place = self._field(field)
        return None if place is None else _Table(self._content, self._followed(place))

    def structs(self, field: int, form: str) -> list[tuple]:
        """Returns the entries of a vector of structs."""
        place = self._field(field)
        if place is None:
            return []
        start = self._followed(place)
        (number,) = struct.unpack_from("<I", self._content, start)
        size = struct.calcsize(form)
        return list(struct.iter_unpack(form, self._content[start + 4 : start + 4 + number * size]))

    def _field(self, field: int) -> int | None:
        (size,) = struct.unpack_from("<H", self._content, self._offsets)
        entry = 4 + 2 * field
        offset = struct.unpack_from("<H", self._content, self._offsets + entry)[0] if entry < size else 0
        return self._place + offset if offset else None

    def _followed(self, place: int) -> int:
        return place + struct.unpack_from("<I", self._content, place)[0]
