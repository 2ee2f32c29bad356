"""Draws batches of rows from a stream, in an order that depends only on the seed, and resumes exactly.

The main process reads undecoded rows; workers decode them, and their number does not affect the order. The data set is
divided into pieces of one or more shards. Each pass over the data distributes the pieces to the processes again. No
process waits for others at the end of a pass; it continues with the next pass. Rows are shuffled in blocks of about a
thousand. A position refers to the first row of a block, in the format of `datasets`, so resuming reads at most one
block again.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator
from itertools import islice

import numpy as np
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard

from ..runs.checkpoint import Progress
from ..runtime.errors import DataError, warn
from .loader import prepared_loader
from .source import Source
from .streaming import ROWS_OF_A_PIECE, StreamedPictures, bytes_of, shards_of_table, unreadable

__all__ = ["RowBatches", "stream_dataloader"]

_BLOCK = 1024  # rows that are shuffled together
_BLOCK_BYTES = 2**28  # of encoded images: a block of large images has fewer rows
_PIECES = 1024  # a small piece costs an open call for few rows, a large one mixes badly
_EMPTY_PASSES = 100


class RowBatches:
    """The batch sampler of one process: yields batches of rows endlessly. Its state is the position in the stream.

    Args:
        rows: the stream.
        batch_size: rows per batch.
        seed: the seed of the order.
        process: the index of this process.
        processes: the number of processes.
        progress: the progress of the training, which is behind the rows read ahead for workers.
        source: the source of the rows, for messages.
        number: the number of rows, if known.
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
        self._blocks: deque[dict] = deque()  # the starts of all blocks that a pending batch may need

    def __len__(self) -> int:
        """Returns the number of batches per pass over the data; `sys.maxsize` if the number of rows is unknown."""
        if self._number is None:
            return sys.maxsize
        return -(-self._number // (self.batch_size * self._processes))

    def __iter__(self) -> Iterator[list[tuple[int, dict]]]:
        done = -(-self._start["row"] // self.batch_size)
        yield from ([] for _ in range(done))  # resuming skips as many batches
        rows = self._shuffled()
        for _ in range(done * self.batch_size - self._start["row"]):
            next(rows)
        while True:
            yield list(islice(rows, self.batch_size))

    def state_dict(self) -> dict:
        """Returns the start of the last block before the next batch of the training, and the number of shards."""
        while len(self._blocks) > 1 and self._blocks[1]["row"] <= self._progress.batch * self.batch_size:
            self._blocks.popleft()
        return {**(self._blocks[0] if self._blocks else self._start), "shards": self._rows.num_shards}

    def load_state_dict(self, state: dict) -> None:
        """Continues from a position; if the shards are others now, with a new pass over the data."""
        self._start = {"row": state["row"], "position": state["position"]}
        before = state.get("shards", self._shards_of_earlier_versions())
        if before == self._rows.num_shards:
            return
        started = (state["position"] or {"pass": -1})["pass"]
        self._start["position"] = _start_of_pass(started + 1)
        if self._process == 0:
            warn(
                f"--streaming: the checkpoint was saved when the data had {before:,} shards, but now they have"
                f" {self._rows.num_shards:,}, in another order: training continues with a new pass over the data"
            )

    def _shards_of_earlier_versions(self) -> int:
        """Returns the number of shards in the state of a version that did not store it."""
        is_table = self._number is not None and self._rows.num_shards == shards_of_table(self._number)
        return min(self._number, _PIECES) if is_table else self._rows.num_shards

    def _shuffled(self) -> Iterator[tuple[int, dict]]:
        """Yields the shuffled rows from the start, block by block; a block belongs to one pass."""
        number = self._start["row"]
        reader = _Reader(self._rows, self._seed, self._process, self._processes, self._source, self._start["position"])
        while True:
            self._blocks.append({"row": number, "position": reader.position()})
            block = reader.block()
            order = np.random.default_rng([self._seed, self._process, number]).permutation(len(block))
            yield from (block[place] for place in order)
            number += len(block)
            del block  # free it before the next block is read


class _Reader:
    """Reads the rows of one process, pass after pass, each as (id, row)."""

    def __init__(self, rows, seed: int, process: int, processes: int, source: Source, position: dict | None):
        self._rows, self._seed, self._source = rows, seed, source
        self._process, self._processes = process, processes
        shards = rows.num_shards
        # With fewer shards than processes, each process reads all rows and keeps its share.
        self._shared = shards < processes
        self._pieces = shards if self._shared else min(shards, max(_PIECES, processes)) // processes * processes
        self._position = position or _start_of_pass(0)
        self._piece = None
        self._generator = self._read()

    def block(self) -> list[tuple[int, dict]]:
        """Returns the next rows of one pass, at least one."""
        block, size = [], 0
        try:
            for found in self._generator:
                if found is not None:
                    block.append(found)
                    size += bytes_of(found[1])
                if (found is None and block) or len(block) >= _BLOCK or size >= _BLOCK_BYTES:
                    return block
        except Exception as error:
            raise unreadable(self._source, error) from error
        raise DataError(f"{self._source.flag}: process {self._process} of {self._processes} finds no images")

    def position(self) -> dict:
        """Returns the position after the last row, as plain data, to continue reading from."""
        state = self._position["state"] if self._piece is None else self._piece.state_dict()
        return {**self._position, "state": state}

    def _read(self) -> Iterator[tuple[int, dict] | None]:
        """Yields the rows, and None at the end of each pass."""
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
                        yield number * ROWS_OF_A_PIECE + at["row"] - 1, row
                self._piece = None
                at.update(place=at["place"] + 1, row=0, state=None)
            at.update({"pass": at["pass"] + 1, "place": 0, "passed": 0})
            yield None


def _start_of_pass(number: int) -> dict:
    return {"pass": number, "place": 0, "row": 0, "passed": 0, "state": None}


def stream_dataloader(
    data: StreamedPictures, batch_size: int, seed: int, num_workers: int, accelerator: Accelerator, progress: Progress
) -> DataLoaderShard:
    """Builds an endless loader of batches on the device; save its `batch_sampler` with the state of the training.

    The loader is already prepared: `accelerator.prepare` would make each process read the rows of all processes.
    """
    processes = accelerator.num_processes
    if data.rows.num_shards < processes and accelerator.is_main_process:
        warn(
            f"--streaming: {processes} processes, but only {data.rows.num_shards} shards: each process reads all rows"
            " and keeps its share; split the data into more files for faster reading"
        )
    batches = RowBatches(
        data.rows, batch_size, seed, accelerator.process_index, processes, progress, data.source, data.number
    )
    return prepared_loader(data.decoder, batches, seed, num_workers, accelerator, drop_last=True)
