"""Rows that are computed once: what is there already is not computed again."""

import multiprocessing
import os
import signal
import threading
import time

import numpy as np
import pytest
import torch

from reg_diffusers.data import stored_rows as module
from reg_diffusers.data.stored_rows import stored_rows

pytestmark = pytest.mark.training

ROWS = np.arange(40, dtype=np.float32).reshape(20, 2)


def computing(started, until=20, wait=0.0):
    """Computes 4 rows at a time up to one, and notes from where."""

    def compute(first):
        started.append(first)
        for start in range(first, 20, 4):
            if start >= until:
                raise KeyboardInterrupt
            time.sleep(wait)
            yield torch.from_numpy(ROWS[start : start + 4])

    return compute


def test_an_interrupted_computation_continues_where_it_ended(tmp_path, caplog):
    path, started = tmp_path / "rows.npy", []
    for until in (0, 8, 16):
        with pytest.raises(KeyboardInterrupt):
            stored_rows(path, 20, computing(started, until))
        assert not path.exists()
    assert np.array_equal(stored_rows(path, 20, computing(started)), ROWS)
    assert started == [0, 0, 8, 16]
    assert os.listdir(tmp_path) == ["rows.npy"]
    assert np.array_equal(stored_rows(path, 20, computing(started)), ROWS) and len(started) == 4


def _computes_forever(path):
    module._SECONDS = 0.0
    stored_rows(path, 20, computing([], wait=0.2))


def test_a_killed_computation_continues_at_what_was_on_the_disk(tmp_path):
    path, record, started = tmp_path / "rows.npy", tmp_path / ".rows.rows", []
    process = multiprocessing.get_context("fork").Process(target=_computes_forever, args=(path,))
    process.start()
    while not record.exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with (tmp_path / ".rows.part").open("ab") as file:
        file.write(b"half a row")  # beyond the record: not to be believed
    assert np.array_equal(stored_rows(path, 20, computing(started)), ROWS)
    assert started[0] >= 4 and started[0] % 4 == 0 and len(started) == 1


@pytest.mark.parametrize("damage", ["x", "8", "8 100000", ""])
def test_an_unusable_record_starts_again(tmp_path, damage):
    path, started = tmp_path / "rows.npy", []
    with pytest.raises(KeyboardInterrupt):
        stored_rows(path, 20, computing(started, 8))
    (tmp_path / ".rows.rows").write_text(damage)
    assert np.array_equal(stored_rows(path, 20, computing(started)), ROWS)
    assert started == [0, 0]


def test_two_runs_compute_the_rows_once(tmp_path):
    path, started, found = tmp_path / "rows.npy", [], []
    run = lambda: found.append(stored_rows(path, 20, computing(started, wait=0.02)))  # noqa: E731
    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert started == [0] and len(found) == 3 and all(np.array_equal(rows, ROWS) for rows in found)
