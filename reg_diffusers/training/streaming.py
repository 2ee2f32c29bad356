"""Pictures from a stream: read as they are needed, never all in memory or on the disk, and resumed exactly.

The main process reads rows, undecoded, in an order that depends on the seed alone; workers decode them, and their
number changes nothing. The data set is cut into pieces, its shards or several of them. In each pass over the data they
are dealt to the processes anew; no process waits for others at the end of a pass, each goes on with the next. Rows are
shuffled in blocks of about a thousand. A position is the place of a block's first row, in the terms of `datasets`:
resuming reads one block again, at most.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard
from torch import Tensor

from .checkpoint import Progress
from .errors import DataError, UsageError, warn
from .normalization import PICTURES
from .pictures import BadImage, decode_stored, has_colour
from .source import Source

__all__ = ["RowBatches", "RowDecoder", "StreamedPictures", "stream_dataloader"]

_BLOCK = 1024  # rows that are shuffled together
_BLOCK_BYTES = 2**28  # of encoded images: fewer rows where they are large
_PIECES = 1024  # a small piece is opened for few rows, a large one mixes badly
_EXAMPLES = 512
_EXAMPLE_BYTES = 2**26
_BAD_IMAGES_NAMED = 10
_EMPTY_PASSES = 100
_ROWS = 10**9  # an image's id is its piece times this, and its row in the piece


class StreamedPictures:
    """Pictures of a `datasets.IterableDataset`; batches come from `stream_dataloader`.

    Args:
        rows: with the columns below, images as {"bytes", "path"}.
        columns: by "pixels" and "condition" the column's name and its channels, None to look at the first images.
        label: column of the class labels, whole numbers.
        classes: their names.
        resolution: side of the pictures.
        number: of rows, where it is known.
        source: where images may lie.
        skip_bad_images: leave out images that cannot be decoded.

    Attributes:
        rows, source, number, classes: as given.
        shape: (C, H, W).
        normalization: from 0..255 to [-1, 1], of the conditioning images too.
        condition_channels: channels K of the conditioning images, 0 without.
        decoder: makes batches of rows.
        examples: the first pictures, for what needs the same ones again and again.

    Raises:
        UsageError: no rows, or they cannot be read.
    """

    normalization = PICTURES
    is_picture = True

    def __init__(
        self,
        rows,
        columns: dict[str, tuple[str, int | None]],
        label: str | None,
        classes: list[str] | None,
        resolution: int,
        number: int | None,
        source: Source,
        *,
        skip_bad_images: bool,
    ):
        self.rows, self.source, self.number, self.classes = rows, source, number, classes
        first = _first_rows(rows, source)
        channels = {
            into: wanted or (3 if any(has_colour(row[name], source) for _, row in first) else 1)
            for into, (name, wanted) in columns.items()
        }
        self.shape = (channels["pixels"], resolution, resolution)
        self.condition_channels = channels.get("condition", 0)
        images = {into: (name, channels[into]) for into, (name, _) in columns.items()}
        self.decoder = RowDecoder(images, label, resolution, source, skip_bad_images=skip_bad_images)
        self.examples = _Examples(first, self.decoder)


class RowDecoder(torch.utils.data.Dataset):
    """Makes batches of rows (id, {column: value}); to a `DataLoader` the rows are the indices.

    Args:
        images: by "pixels" and "condition" the column's name and its channels.
        label: column of the class labels.
        resolution: side of the pictures.
        source: where images may lie.
        skip_bad_images: leave out images that cannot be decoded.
    """

    def __init__(
        self,
        images: dict[str, tuple[str, int]],
        label: str | None,
        resolution: int,
        source: Source,
        *,
        skip_bad_images: bool,
    ):
        self._images, self._label, self._resolution, self._source = images, label, resolution, source
        self._skip = skip_bad_images
        self._bad = 0

    def __getitems__(self, rows: list[tuple[int, dict]]) -> dict[str, Tensor]:
        """{"values": (B, C, H, W) uint8, "ids": (B,), "condition": (B, K, H, W) uint8, "class_labels": (B,)}.

        Where bad images are left out, others of the batch come twice, so that a batch is always as large.

        Raises:
            UsageError: an image that cannot be decoded, or a whole batch of them; a row without a label.
        """
        decoded = [found for row in rows if (found := self.decode(*row)) is not None]
        if not decoded:
            raise DataError(f"{self._source.flag}: none of {len(rows)} images can be decoded")
        return _stack([decoded[place % len(decoded)] for place in range(len(rows))])

    def decode(self, id: int, row: dict) -> dict[str, np.ndarray] | None:
        """One row of a batch; None for a bad image that is left out."""
        where = f"row {id % _ROWS} of piece {id // _ROWS}"
        try:
            found = {
                {"pixels": "values"}.get(into, into): decode_stored(
                    row[name], where, self._resolution, channels, self._source
                )
                for into, (name, channels) in self._images.items()
            }
        except BadImage as error:
            if not self._skip:
                raise
            self._bad += 1
            if self._bad <= _BAD_IMAGES_NAMED:
                rest = "; further ones are not named" if self._bad == _BAD_IMAGES_NAMED else ""
                warn(f"--skip_bad_images: left out {str(error).split('. Remove it')[0]}{rest}")
            return None
        found["ids"] = np.int64(id)
        if self._label is not None:
            if row[self._label] is None or row[self._label] < 0:
                raise DataError(f"--label_column {self._label}: {where} has no label")
            found["class_labels"] = np.int64(row[self._label])
        return found


class _Examples:
    """The first rows of a stream, decoded when they are asked for."""

    normalization = PICTURES

    def __init__(self, rows: list[tuple[int, dict]], decoder: RowDecoder):
        self._rows, self._decoder = rows, decoder

    def __len__(self) -> int:
        return len(self._rows)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        return _stack([self._readable(index) for index in indices])

    def _readable(self, index: int) -> dict[str, np.ndarray]:
        """The row, or where bad images are left out the next one that can be decoded."""
        for place in range(index, index + len(self)):
            if (found := self._decoder.decode(*self._rows[place % len(self)])) is not None:
                return found
        raise UsageError(f"none of the first {len(self)} images can be decoded")


class RowBatches:
    """Batches of rows for ever: the batch sampler of one process. Its state says where the training is in the stream.

    Args:
        rows: the stream.
        batch_size: rows of each.
        seed: of the order.
        process: which one of
        processes: so many.
        progress: of the training, which is behind what was read for workers.
        source: of the rows, for messages.
        number: of rows, where it is known.
    """

    drop_last = True

    def __init__(
        self,
        rows,
        batch_size: int,
        seed: int,
        process: int,
        processes: int,
        progress: Progress,
        source: Source,
        number: int | None,
    ):
        self.batch_size = batch_size
        self._rows, self._source, self._progress, self._number = rows, source, progress, number
        self._seed, self._process, self._processes = seed, process, processes
        self._start = {"row": 0, "position": None}
        self._blocks: deque[dict] = deque()  # where those began from which a batch may be under way

    def __len__(self) -> int:
        """Batches in a pass over the data; so many as never end where the rows are not known."""
        if self._number is None:
            return sys.maxsize
        return -(-self._number // (self.batch_size * self._processes))

    def __iter__(self) -> Iterator[list[tuple[int, dict]]]:
        done = -(-self._start["row"] // self.batch_size)
        yield from ([] for _ in range(done))  # whoever resumes leaves out what was done
        rows = self._shuffled()
        for _ in range(done * self.batch_size - self._start["row"]):
            next(rows)
        while True:
            yield list(islice(rows, self.batch_size))

    def state_dict(self) -> dict:
        """The last block that began before the training's next batch."""
        while len(self._blocks) > 1 and self._blocks[1]["row"] <= self._progress.batch * self.batch_size:
            self._blocks.popleft()
        return self._blocks[0] if self._blocks else self._start

    def load_state_dict(self, state: dict) -> None:
        self._start = state

    def _shuffled(self) -> Iterator[tuple[int, dict]]:
        """The rows from the start on, block by block; a block belongs to one pass."""
        number = self._start["row"]
        reader = _Reader(self._rows, self._seed, self._process, self._processes, self._source, self._start["position"])
        while True:
            self._blocks.append({"row": number, "position": reader.position()})
            block = reader.block()
            order = np.random.default_rng([self._seed, self._process, number]).permutation(len(block))
            yield from (block[place] for place in order)
            number += len(block)
            del block  # before the next one is read


class _Reader:
    """The rows of one process, pass after pass, each as (id, row)."""

    def __init__(self, rows, seed: int, process: int, processes: int, source: Source, position: dict | None):
        self._rows, self._seed, self._source = rows, seed, source
        self._process, self._processes = process, processes
        shards = rows.num_shards
        # With fewer shards than processes each process reads all rows, and keeps its share.
        self._shared = shards < processes
        self._pieces = shards if self._shared else min(shards, max(_PIECES, processes)) // processes * processes
        self._position = position or {"pass": 0, "place": 0, "row": 0, "passed": 0, "state": None}
        self._piece = None
        self._generator = self._read()

    def block(self) -> list[tuple[int, dict]]:
        """The next rows of one pass, at least one."""
        block, size = [], 0
        try:
            for found in self._generator:
                if found is not None:
                    block.append(found)
                    size += _bytes(found[1])
                if (found is None and block) or len(block) >= _BLOCK or size >= _BLOCK_BYTES:
                    return block
        except Exception as error:
            raise _unreadable(self._source, error) from error
        raise DataError(f"{self._source.flag}: process {self._process} of {self._processes} finds no images")

    def position(self) -> dict:
        """From which the rows after the last one can be read: plain data."""
        state = self._position["state"] if self._piece is None else self._piece.state_dict()
        return {**self._position, "state": state}

    def _read(self) -> Iterator[tuple[int, dict] | None]:
        """The rows; None at the end of each pass."""
        at = self._position
        last_found = at["pass"]
        while at["pass"] <= last_found + _EMPTY_PASSES:
            order = np.random.default_rng([self._seed, at["pass"]]).permutation(self._pieces)
            order = order.tolist() if self._shared else order[self._process :: self._processes].tolist()
            while at["place"] < len(order):
                number = order[at["place"]]
                piece = self._rows.shard(num_shards=self._pieces, index=number)
                if at["state"] is not None:
                    piece.load_state_dict(at["state"])
                self._piece = piece
                for row in piece:
                    at["row"] += 1
                    at["passed"] += 1
                    if not self._shared or (at["passed"] - 1) % self._processes == self._process:
                        last_found = at["pass"]
                        yield number * _ROWS + at["row"] - 1, row
                self._piece = None
                at.update(place=at["place"] + 1, row=0, state=None)
            at.update({"pass": at["pass"] + 1, "place": 0, "passed": 0})
            yield None


def stream_dataloader(
    data: StreamedPictures, batch_size: int, seed: int, num_workers: int, accelerator: Accelerator, progress: Progress
) -> DataLoaderShard:
    """Batches on the device, for ever; its `batch_sampler` is to be kept with the training's state.

    It comes as `accelerator.prepare` would return it, which would let each process read the rows of all.
    """
    processes = accelerator.num_processes
    if data.rows.num_shards < processes and accelerator.is_main_process:
        warn(
            f"--streaming: {processes} processes, but {data.rows.num_shards} shards: each process reads all rows and"
            " keeps its share; more files would be read faster"
        )
    batches = RowBatches(
        data.rows, batch_size, seed, accelerator.process_index, processes, progress, data.source, data.number
    )
    loader = DataLoaderShard(
        data.decoder,
        device=accelerator.device,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(seed),  # else a resumed run takes from the noise
        persistent_workers=num_workers > 0,
        _drop_last=True,
        _non_blocking=True,
    )
    loader._is_accelerate_prepared = True
    return loader


def _stack(rows: list[dict[str, np.ndarray]]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}


def _as_it_is(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch


def _first_rows(rows, source: Source) -> list[tuple[int, dict]]:
    first, size = [], 0
    try:
        for row in rows:
            first.append((len(first), row))
            size += _bytes(row)
            if len(first) >= _EXAMPLES or size >= _EXAMPLE_BYTES:
                break
    except Exception as error:
        raise _unreadable(source, error) from error
    if not first:
        raise UsageError(f"{source.flag}: holds no images")
    return first


def _bytes(row: dict) -> int:
    return sum(len(value.get("bytes") or b"") for value in row.values() if isinstance(value, dict))


def _unreadable(source: Source, error: Exception) -> DataError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return DataError(f"{source.flag}: cannot be read: {reason}")
