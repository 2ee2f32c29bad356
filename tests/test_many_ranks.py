"""The order of the data over 64 ranks, simulated in one process: who reads which image in which step."""

import json
import random
from collections import Counter
from itertools import islice

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset

from reg_diffusers.data import stream_batches
from reg_diffusers.data.source import Source
from reg_diffusers.data.training_data import make_dataloader
from reg_diffusers.runs.checkpoint import Progress, endless_batches
from reg_diffusers.runtime.engine import build_accelerator
from reg_diffusers.settings.optimization import OptimizationSettings

pytestmark = pytest.mark.reliability

RANKS, BATCH = 64, 2


class Numbers(torch.utils.data.Dataset):
    """Images that are their own number."""

    def __init__(self, number):
        self.number = number

    def __len__(self):
        return self.number

    def __getitems__(self, indices):
        return {"ids": torch.tensor(indices)}


@pytest.fixture
def rank_of(monkeypatch, tmp_path):
    """Makes an accelerator believe that it is one of 64 ranks; the batches of a training on it, as lists of ids."""

    def batches(rank, number, done=0, epoch=0, ranks=RANKS, divisions=()):
        monkeypatch.setattr(Accelerator, "num_processes", ranks)
        monkeypatch.setattr(Accelerator, "process_index", rank)
        accelerator = build_accelerator("no", 1, 7, None, tmp_path)
        progress = Progress()
        progress.epoch = epoch
        for before, batches in divisions:
            progress.batch = batches
            progress.divide_again(before, BATCH)
        progress.batch = done
        settings = OptimizationSettings(train_batch_size=BATCH, seed=7)
        loader = accelerator.prepare(make_dataloader(Numbers(number), settings, 0, accelerator, progress))
        return loader, (batch["ids"].tolist() for batch in endless_batches(accelerator, loader, progress))

    return batches


@pytest.mark.parametrize("left_over", [0, 1, RANKS * BATCH - 1])
def test_every_image_once_an_epoch_in_equal_steps_except_what_fills_no_step(rank_of, left_over):
    steps = 5
    number = steps * RANKS * BATCH + left_over
    epochs = [Counter(), Counter()]
    for rank in range(RANKS):
        loader, batches = rank_of(rank, number)
        assert len(loader) == steps
        for seen in epochs:
            for batch in islice(batches, steps):
                assert len(batch) == BATCH
                seen.update(batch)
    for seen in epochs:
        assert set(seen.values()) == {1} and len(seen) == number - left_over
    assert left_over == 0 or set(epochs[0]) != set(epochs[1])  # others are left out in the next epoch


def test_every_rank_resumes_at_any_step(rank_of):
    number, steps = 5 * RANKS * BATCH + 3, 5
    chosen = random.Random(0)
    for rank in chosen.sample(range(RANKS), 6):
        whole = list(islice(rank_of(rank, number)[1], 3 * steps))
        done = chosen.randrange(3 * steps)
        resumed = rank_of(rank, number, done=done % steps, epoch=done // steps)[1]
        assert list(islice(resumed, 3 * steps - done)) == whole[done:]


def test_an_epoch_that_other_numbers_of_ranks_continue_has_every_image_once(rank_of):
    """64 ranks, then 24, then 40, the last of them resumed once more: 24 does not divide what 64 have drawn."""
    number, seen = 9 * RANKS * BATCH + 1, Counter()
    divisions = [(64, 3), (24, 5), (40, 4)]
    for place, (ranks, batches) in enumerate(divisions):
        for rank in range(ranks):
            _, own = rank_of(rank, number, ranks=ranks, divisions=divisions[:place])
            seen.update(image for batch in islice(own, batches) for image in batch)
    assert set(seen.values()) == {1} and len(seen) == BATCH * sum(ranks * batches for ranks, batches in divisions)
    left = number - len(seen)
    for rank in range(40):
        _, own = rank_of(rank, number, done=4, ranks=40, divisions=divisions[:2])
        seen.update(image for batch in islice(own, left // (40 * BATCH)) for image in batch)
    assert set(seen.values()) == {1} and number - len(seen) < 40 * BATCH
    whole = {image for rank in range(40) for image in next(rank_of(rank, number, epoch=1, ranks=40)[1])}
    following = set()
    for rank in range(40):
        _, own = rank_of(rank, number, done=4, ranks=40, divisions=divisions[:2])
        following.update(list(islice(own, left // (40 * BATCH) + 1))[-1])
    assert following == whole  # the next epoch is an ordinary one


# Streams


ROWS = 5000


@pytest.fixture(scope="module")
def stream():
    return Dataset.from_dict({"n": list(range(ROWS))}).to_iterable_dataset(num_shards=1000)


def row_batches(rows, rank, progress=None):
    source = Source("--dataset_name table", ("/",))
    return stream_batches.RowBatches(rows, BATCH, 7, rank, RANKS, progress or Progress(), source, None)


@pytest.mark.slow
def test_a_stream_of_a_thousand_shards_shows_each_row_once_in_each_pass(stream):
    """1,000 shards make 960 pieces, 15 for each rank, so shares differ by some rows, but no rank reads another's."""
    passes = 2
    seen, shares = Counter(), []
    for rank in range(RANKS):
        reader = stream_batches._Reader(stream, 7, rank, RANKS, Source("", ("/",)), None)
        share = []
        while reader.position()["pass"] < passes:
            share += [row["n"] for _, row in reader.block()]
        seen.update(share)
        shares.append(len(share) / passes)
    assert seen == Counter(dict.fromkeys(range(ROWS), passes))
    assert max(shares) - min(shares) <= 15 * (ROWS // 960 + 1 - ROWS // 1000)


def test_a_rank_of_a_stream_resumes_at_any_step_and_never_ends_before_others(stream):
    chosen = random.Random(0)
    for rank in chosen.sample(range(RANKS), 4):
        whole = list(islice(row_batches(stream, rank), 120))  # three passes of about 39 batches
        assert all(len(batch) == BATCH for batch in whole)
        done, progress = chosen.randrange(100), Progress()
        before = row_batches(stream, rank, progress)
        for _ in islice(before, done):
            pass
        progress.batch = done
        after = row_batches(stream, rank, progress)
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        assert list(islice(after, done, done + 20)) == whole[done : done + 20]
