"""Streams: every image once in a pass, over processes and workers; resumed exactly; refused clearly."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import islice

import numpy as np
import PIL.Image
import pyarrow.parquet
import pytest
import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, Features, Image, Value, load_dataset
from hub_client import TRAIN_REG, Client, asked
from hub_server import HubServer
from hub_storage import Repository, sha256
from limits import memory_limited
from runs import ACCELERATE, QUICK, ROOT, differ, metrics, refusal, weights

from reg_diffusers.data import stream_batches, streaming
from reg_diffusers.data.row_groups import stream_row_groups
from reg_diffusers.data.source import Source
from reg_diffusers.data.training_data import load_training_data, make_dataloader
from reg_diffusers.runs.checkpoint import Progress
from reg_diffusers.runtime.errors import UsageError
from reg_diffusers.settings.arguments import parse_args

pytestmark = pytest.mark.training

STREAM = ("--streaming", "--resolution", 8)


def pictures(number):
    """One pixel value for each: images that can be told apart by their mean, also when they are stored."""
    return [PIL.Image.new("L", (8, 8), value) for value in range(number)]


def tables(folder, sizes=(5, 7, 4, 8), **columns):
    """Parquet files with 24 numbered images in all, with a second column of images if asked for."""
    folder.mkdir(parents=True, exist_ok=True)
    images = pictures(sum(sizes))
    features = Features(image=Image(), label=ClassLabel(names=["even", "odd"]), negative=Image())
    start = 0
    for number, size in enumerate(sizes):
        part = range(start, start + size)
        rows = {
            "image": [images[value] for value in part],
            "label": [value % 2 for value in part],
            "negative": [PIL.Image.new("L", (8, 8), 255 - value) for value in part],
        }
        Dataset.from_dict(rows, features).to_parquet(folder / f"train-{number}.parquet")
        start += size
    return folder


@pytest.fixture
def load(tmp_path):
    """Loads the data of a command line."""

    def load_with(*flags):
        settings = parse_args([*map(str, flags), "--cache_dir", str(tmp_path / "cache")])
        return settings, load_training_data(settings.data)

    return load_with


def batches_of(settings, data):
    return make_dataloader(
        data, settings.optimization, settings.data.dataloader_num_workers, Accelerator(cpu=True), Progress()
    )


def taken(loader, batches):
    """The images of so many batches, each by its value."""
    return [int(value) for batch in islice(loader, batches) for value in batch["values"][:, 0, 0, 0]]


def row_batches(rows, size=2, process=0, processes=1, seed=0, progress=None, number=None):
    source = Source("--dataset_name table", ("/",))
    return stream_batches.RowBatches(rows, size, seed, process, processes, progress or Progress(), source, number)


def stream_of(number, shards):
    """A stream of numbers, in files of unequal size for unequal shards."""
    return Dataset.from_dict({"n": list(range(number))}).to_iterable_dataset(num_shards=shards)


def numbers(batches, count):
    return [row["n"] for batch in islice(batches, count) for _, row in batch]


# What can be a stream


def test_every_kind_of_source_shows_each_image_once_in_a_pass(load, tmp_path):
    folder = tables(tmp_path / "tables")
    table = load_dataset("parquet", data_files=str(folder / "*.parquet"), split="train", cache_dir=str(tmp_path / "c"))
    table.save_to_disk(tmp_path / "saved")
    (tmp_path / "photos").mkdir()
    for value, image in enumerate(pictures(24)):
        image.save(tmp_path / "photos" / f"{value}.png")
    (saved,) = (tmp_path / "saved").glob("*.arrow")
    for flags in (
        ("--dataset_name", folder, "--max_train_steps", 1),
        ("--dataset_name", saved, "--max_train_steps", 1),
        ("--dataset_name", tmp_path / "saved"),
        ("--train_data_dir", tmp_path / "photos"),
    ):
        settings, data = load(*STREAM, *flags, "--train_batch_size", 4)
        assert data.shape == (1, 8, 8) and data.is_picture and data.classes is None
        assert sorted(taken(batches_of(settings, data), 6)) == list(range(24)), flags
        assert not (tmp_path / "cache" / "reg_diffusers").exists()  # nothing is stored decoded


def test_pictures_are_those_of_the_table(load, tmp_path):
    folder = tables(tmp_path / "tables")
    flags = ("--dataset_name", folder / "train-3.parquet", "--class_conditional", "--train_batch_size", 8)
    flags += ("--conditioning_image_column", "negative", "--image_column", "image", "--resolution", 8)
    (settings, stream), (_, whole) = load(*flags, "--streaming"), load(*flags)
    assert (stream.shape, stream.classes, stream.condition_channels, stream.number) == (
        (whole.shape, whole.classes, whole.condition_channels, whole.number)
    )
    (batch,) = islice(batches_of(settings, stream), 1)
    order = batch["values"][:, 0, 0, 0].argsort()
    expected = whole.__getitems__(list(range(8)))
    for name in ("values", "condition", "class_labels"):
        assert torch.equal(batch[name][order], expected[name]) and batch[name].dtype == expected[name].dtype
    assert batch["ids"].dtype == torch.int64


def test_the_embedded_data_are_a_stream_too(load):
    settings, data = load(*STREAM)
    assert data.number == 5000 and len(batches_of(settings, data)) == 157


def test_examples_are_the_first_images_and_the_same_ones_again(load, tmp_path):
    _, data = load(*STREAM, "--dataset_name", tables(tmp_path / "t") / "train-1.parquet")
    assert len(data.examples) == 7
    for _ in range(2):
        assert data.examples.__getitems__([6, 0])["values"][:, 0, 0, 0].tolist() == [11, 5]


def test_colour_among_the_first_images_makes_a_stream_colour(load, tmp_path):
    images = [PIL.Image.new("L", (4, 4))] * 100 + [PIL.Image.new("RGB", (4, 4))]
    Dataset.from_dict({"image": images}, Features(image=Image())).to_parquet(tmp_path / "t.parquet")
    assert load(*STREAM, "--dataset_name", tmp_path / "t.parquet")[1].shape[0] == 3


# The order


@pytest.mark.parametrize("shards", [1, 3, 6])
def test_each_pass_and_each_seed_has_an_order_of_its_own(shards):
    passes = [numbers(row_batches(stream_of(60, shards)), 90)[start : start + 60] for start in (0, 60, 120)]
    for order in passes:
        assert sorted(order) == list(range(60))
    assert passes[0] != passes[1] != passes[2]
    assert numbers(row_batches(stream_of(60, shards)), 30) == passes[0]
    assert numbers(row_batches(stream_of(60, shards), seed=1), 30) not in passes


def test_neighbours_in_the_file_are_not_neighbours_in_the_training():
    order = np.array(numbers(row_batches(stream_of(1000, 1)), 500))
    assert np.corrcoef(order, np.arange(1000))[0, 1] < 0.2
    assert np.abs(np.diff(order)).mean() > 200  # a third of a thousand for a random order


@pytest.mark.parametrize(("shards", "processes"), [(6, 2), (6, 3), (7, 3), (2, 3), (1, 2), (4, 4)])
def test_processes_share_each_pass_without_gaps_or_repetition(shards, processes):
    seen = Counter()
    for process in range(processes):
        reader = stream_batches._Reader(stream_of(84, shards), 0, process, processes, Source("", ("/",)), None)
        while reader.position()["pass"] < 3:
            seen.update(row["n"] for _, row in reader.block())
    assert seen == Counter(dict.fromkeys(range(84), 3))


def test_pieces_are_dealt_anew_in_each_pass():
    shares = []
    for start in (0, 20, 40):
        shares.append(frozenset(numbers(row_batches(stream_of(40, 8), processes=2, size=1), 60)[start : start + 20]))
    assert len(set(shares)) > 1


def test_a_large_table_is_dealt_and_mixed_by_its_row_groups(load, tmp_path):
    rows = Dataset.from_dict({"image": pictures(256)}, Features(image=Image()))
    rows.to_parquet(tmp_path / "t.parquet", batch_size=32)
    settings, data = load(*STREAM, "--dataset_name", tmp_path / "t.parquet", "--train_batch_size", 8)
    assert data.rows.num_shards == 8 and data.number == 256
    assert sorted(taken(batches_of(settings, data), 32)) == list(range(256))


def test_memory_does_not_grow_with_the_row_group(load, tmp_path):
    schema = pyarrow.schema({"image": pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})})
    generator = np.random.default_rng(0)
    rows = [{"image": {"bytes": generator.bytes(2**16), "path": None}} for _ in range(2560)]
    table = pyarrow.Table.from_pylist(rows, schema)
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet", row_group_size=len(rows), write_batch_size=16)
    del rows, table
    _, data = load(*STREAM, "--dataset_name", tmp_path / "t.parquet")
    assert data.rows.num_shards == 1
    with memory_limited(2**27):  # `datasets` holds the 160 MiB of the row group twice
        assert sum(len(row["image"]["bytes"]) == 2**16 for row in data.rows) == 2560


def test_unequal_shares_do_not_make_a_process_wait(tmp_path):
    """3 files for 2 processes: one has 2 of them in a pass, the other 1; both go on for ever."""
    folder = tables(tmp_path / "t", sizes=(20, 2, 2))
    rows = load_dataset("parquet", data_files=str(folder / "*"), split="train", streaming=True)
    counts = Counter()
    for process in range(2):
        batches = row_batches(rows.select_columns(["label"]), process=process, processes=2, size=4)
        assert sum(len(batch) for batch in islice(batches, 50)) == 200
        counts.update(row[0] // streaming.ROWS_OF_A_PIECE for batch in islice(batches, 50) for row in batch)
    assert set(counts) == {0, 1}


def test_the_number_of_workers_changes_nothing(load, tmp_path):
    folder = tables(tmp_path / "t")
    found = []
    for workers in (0, 2):
        flags = ("--dataset_name", folder, "--max_train_steps", 1, "--train_batch_size", 4)
        found.append(taken(batches_of(*load(*STREAM, *flags, "--dataloader_num_workers", workers)), 20))
    assert found[0] == found[1] and len(set(found[0])) == 24


def test_an_image_is_found_by_its_id(load, tmp_path):
    settings, data = load(*STREAM, "--dataset_name", tables(tmp_path / "t"), "--max_train_steps", 1)
    for batch in islice(batches_of(settings, data), 3):
        for id, value in zip(batch["ids"].tolist(), batch["values"][:, 0, 0, 0].tolist(), strict=True):
            piece, row = divmod(id, streaming.ROWS_OF_A_PIECE)
            assert value == (0, 5, 12, 16)[piece] + row


# Where it is


def resumed(rows, done, ahead, **options):
    """Batches of a stream whose training did `done` batches, when `ahead` more had been read for workers."""
    progress = Progress()
    before = row_batches(rows, progress=progress, **options)
    for _ in islice(before, done + ahead):
        pass
    progress.batch = done
    state = json.loads(json.dumps(before.state_dict()))
    after = row_batches(rows, progress=progress, **options)
    after.load_state_dict(state)
    return state, islice(after, done, None)


@pytest.mark.parametrize(
    ("shards", "process", "processes"), [(1, 0, 1), (5, 0, 1), (6, 1, 2), (7, 2, 3), (1, 1, 2), (2, 0, 3)]
)
@pytest.mark.parametrize("size", [1, 3])
def test_from_every_batch_the_rest_is_as_if_it_had_not_stopped(monkeypatch, shards, process, processes, size):
    monkeypatch.setattr(stream_batches, "_BLOCK", 6)
    options = {"process": process, "processes": processes, "size": size}
    whole = list(islice(row_batches(stream_of(40, shards), **options), 70))
    for done in range(0, 46, 5):
        for ahead in (0, 1, 8):
            state, rest = resumed(stream_of(40, shards), done, ahead, **options)
            assert list(islice(rest, 20)) == whole[done : done + 20]
            assert 0 <= done * size - state["row"] <= 6  # what was before the block is not read again


def test_other_shards_than_those_of_the_checkpoint_start_a_new_pass(monkeypatch, capsys):
    monkeypatch.setattr(stream_batches, "_BLOCK", 8)
    state, _ = resumed(stream_of(40, 5), 4, 1)
    assert capsys.readouterr().err == ""
    after = row_batches(stream_of(40, 8), progress=Progress())
    after.load_state_dict(state)
    assert "the data had 5 shards, but now they have 8" in capsys.readouterr().err
    assert after.state_dict() == {"row": 8, "position": stream_batches._start_of_pass(1), "shards": 8}
    assert sorted(numbers(islice(after, 4, None), 20)) == list(range(40))  # all of the new pass


@pytest.mark.parametrize(
    ("number", "shards", "reported"), [(1600, 100, "had 1,024 shards"), (1600, 9, ""), (60, 60, "")]
)
def test_a_table_that_earlier_versions_divided_otherwise_is_reported(capsys, number, shards, reported):
    state, _ = resumed(stream_of(number, shards), 4, 0)
    del state["shards"]  # as those versions saved it
    row_batches(stream_of(number, shards), number=number).load_state_dict(state)
    assert reported in (told := capsys.readouterr().err) and bool(reported) == bool(told)


@pytest.mark.parametrize("row_groups", [False, True], ids=["files", "row groups"])
def test_tables_are_resumed_within_a_file(monkeypatch, tmp_path, row_groups):
    monkeypatch.setattr(stream_batches, "_BLOCK", 4)
    folder = tables(tmp_path / "t", sizes=(30, 25))
    rows = load_dataset("parquet", data_files=str(folder / "*"), split="train", streaming=True)
    if row_groups:
        rows = stream_row_groups(sorted(map(str, folder.iterdir())), "train", rows.info)
    rows = rows.select_columns(["label"]).cast_column("label", Value("int64"))
    whole = [[id for id, _ in batch] for batch in islice(row_batches(rows), 40)]
    for done in range(1, 30, 4):
        _, rest = resumed(rows, done, 2)
        assert [[id for id, _ in batch] for batch in islice(rest, 10)] == whole[done : done + 10]


def test_large_images_make_smaller_blocks(monkeypatch):
    monkeypatch.setattr(stream_batches, "_BLOCK_BYTES", 1000)
    images = [{"bytes": bytes(100), "path": None}] * 100
    rows = Dataset.from_dict({"image": images}, Features(image=Image(decode=False))).to_iterable_dataset()
    assert len(stream_batches._Reader(rows, 0, 0, 1, Source("", ("/",)), None).block()) == 10


# Training


FLAGS = ("--max_train_steps", 9, "--checkpointing_steps", 3, "--train_batch_size", 2, "--random_flip")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_training_ends_as_one_that_did_not_stop(train, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(stream_batches, "_BLOCK", 4)
    data = ("--dataset_name", tables(tmp_path / "tables"), "--dataloader_num_workers", workers)
    part = train(*STREAM, *data, *FLAGS, output="part")
    whole = shutil.copytree(part, part.with_name("whole"))
    shutil.rmtree(part / "checkpoint-9")
    shutil.rmtree(part / "unet")
    counters = json.loads((part / "checkpoint-6" / "counters_0.json").read_text())
    assert 8 <= counters["stream"]["row"] <= 12  # of 12 rows, in blocks of 4: the others are not read again
    train(*STREAM, *data, *FLAGS, "--resume", "auto", output="part")
    assert not differ(weights(whole), weights(part))
    assert metrics(whole) == metrics(part)


def test_a_stream_is_compared_conditioned_and_described(train, tmp_path, capsys):
    flags = ("--class_conditional", "--conditioning_image_column", "negative", "--image_column", "image", "--compare")
    out = train(*STREAM, "--dataset_name", tables(tmp_path / "t"), *flags, "--max_train_steps", 2, model=())
    assert (out / "comparison.png").is_file() and list((out / "samples").iterdir())
    assert "data       a stream of images of 1 x 8 x 8" in capsys.readouterr().out
    assert json.loads((out / "reg_config.json").read_text())["data"]["images"] is None


def test_epochs_are_counted_where_the_number_of_rows_is_known(train, tmp_path):
    table = tables(tmp_path / "t") / "train-3.parquet"
    out = train(*STREAM, "--dataset_name", table, "--num_epochs", 3, "--train_batch_size", 2)
    assert metrics(out)[-1]["step"] == 12


def test_an_unknown_number_of_rows_is_asked_for(train, capsys, tmp_path):
    folder = tables(tmp_path / "t")
    message = refusal(train, capsys, *STREAM, "--dataset_name", folder)
    assert f"--streaming: the number of images of {folder} is unknown: give --max_train" in message


def kill_when(process, condition):
    deadline = time.time() + 120
    while not condition() and time.time() < deadline and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "workers"), [(1, 2), (2, 2)])
def test_a_killed_training_ends_as_one_that_was_not(command_line, tmp_path, processes, workers):
    data = tables(tmp_path / "tables", sizes=(20, 16, 24))
    flags = [*QUICK, "--no-compare", "--streaming", "--dataset_name", data, "--max_train_steps", 24]
    flags += ["--checkpointing_steps", 5, "--train_batch_size", 2, "--dataloader_num_workers", workers]
    launcher = (*ACCELERATE, "--multi_gpu", "--num_processes", "2") if processes == 2 else (sys.executable,)
    env = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    # gloo may abort at exit, when all is written
    command_line(*flags, "--output_dir", "whole", launcher=launcher, env=env, check=processes == 1)
    process = subprocess.Popen(
        [*launcher, str(ROOT / "train_reg.py"), *map(str, flags), "--output_dir", "part"],
        cwd=tmp_path, env=env, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    kill_when(process, lambda: (tmp_path / "part" / "checkpoint-5").is_dir())
    assert not (tmp_path / "part" / "unet").exists()
    resume = ("--resume", "auto", "--output_dir", "part")
    command_line(*flags, *resume, launcher=launcher, env=env, check=processes == 1)
    assert not differ(weights(tmp_path / "whole"), weights(tmp_path / "part"))


@pytest.mark.slow
def test_private_data_sets_of_the_hub_are_streamed_or_read(tmp_path, image_folder):
    quick = [*QUICK, "--no-compare", "--class_conditional", "--train_batch_size", 4]
    with HubServer() as hub:
        client = Client(hub, tmp_path / "client")
        client.python(
            """
            from datasets import load_dataset
            from huggingface_hub import HfApi
            load_dataset(sys.argv[1], split="train").push_to_hub("tester/table", private=True)
            HfApi().create_repo("tester/folder", repo_type="dataset", private=True)
            HfApi().upload_folder(repo_id="tester/folder", folder_path=sys.argv[1], repo_type="dataset")
            tell()
            """,
            image_folder(number=8),
        )
        runs = {
            "table": ("--dataset_name", "tester/table", "--streaming", "--num_epochs", 2),
            "folder": ("--dataset_name", "tester/folder", "--streaming", "--max_train_steps", 2),
            "whole": ("--dataset_name", "tester/folder", "--max_train_steps", 2),
        }
        said = {
            name: client.run(sys.executable, TRAIN_REG, *quick, *flags, "--output_dir", name).stdout
            for name, flags in runs.items()
        }
        assert asked(hub, "GET", "/resolve/")
    assert "data       8 images of 3 x 8 x 8 from tester/table" in said["table"]
    assert metrics(tmp_path / "client" / "table")[-1]["step"] == 4
    assert "data       a stream of images of 3 x 8 x 8 from tester/folder" in said["folder"]
    assert "data       8 images of 3 x 8 x 8 from tester/folder" in said["whole"]
    assert all("classes    0 cats, 1 dogs" in told for told in said.values())


@pytest.mark.slow
@pytest.mark.hub
def test_a_table_of_the_hub_with_one_large_row_group_takes_little_memory(tmp_path):
    """`datasets` takes 430 MiB for these 96 MiB."""
    schema = pyarrow.schema({"image": pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})})
    generator = np.random.default_rng(0)
    rows = [{"image": {"bytes": generator.bytes(2**16), "path": None}} for _ in range(1536)]
    table = pyarrow.Table.from_pylist(rows, schema)
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet", row_group_size=len(rows), write_batch_size=16)
    content = (tmp_path / "t.parquet").read_bytes()
    del rows, table
    with HubServer() as hub:
        repository = hub.repositories["datasets/tester/wide"] = Repository("datasets/tester/wide", private=True)
        hub.objects[sha256(content)] = content
        repository.commit("main", "one row group", {"train.parquet": content})
        told = Client(hub, tmp_path / "client").python(
            """
            import re
            from pathlib import Path
            from reg_diffusers.data.source import source_of
            from reg_diffusers.data.tables import EMBEDDED, read_rows
            from reg_diffusers.settings.arguments import parse_args

            def peak():
                return int(re.search("VmHWM:(.*) kB", Path("/proc/self/status").read_text())[1])

            flags = "--streaming --dataset_name tester/wide --max_train_steps 1"
            settings = parse_args(flags.split()).data
            found, _ = read_rows(settings, source_of(settings, EMBEDDED), streaming=True)
            next(iter(found))  # what the libraries take
            before, sizes = peak(), [len(row["image"]["bytes"]) for row in found]
            tell(sizes=sizes, kibibytes=peak() - before, shards=found.num_shards)
            """
        )
        requests = asked(hub, "GET", "/large/")
    assert told["sizes"] == [2**16] * 1536 and told["shards"] == 1
    assert told["kibibytes"] < 2**16
    assert requests < 24  # each of 8 MiB


# What is bad


def encoded(image):
    stored = io.BytesIO()
    image.save(stored, "png")
    return stored.getvalue()


def half_bad(folder, bad=lambda value: value % 2):
    rows = [
        {"bytes": b"bad" if bad(value) else encoded(image), "path": None} for value, image in enumerate(pictures(8))
    ]
    features = Features(image=Image(decode=False))
    Dataset.from_dict({"image": rows}, features).cast_column("image", Image()).to_parquet(folder / "bad.parquet")
    return folder / "bad.parquet"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_ends_the_run_with_one_line(train, capsys, tmp_path, workers):
    table = half_bad(tmp_path, bad=lambda value: value == 5)
    flags = ("--dataset_name", table, "--dataloader_num_workers", workers, "--train_batch_size", 4)
    for regularizer in ("none", "sparsity"):  # which looks at images before the first step
        error = refusal(train, capsys, *STREAM, *flags, "--regularizer", regularizer, "--max_train_steps", 3)
        assert error.startswith("train_reg.py: error: image row 5 of piece 0 cannot be decoded: it is damaged")
        shutil.rmtree("out", ignore_errors=True)


@pytest.mark.slow
def test_bad_images_are_left_out_and_named(load, tmp_path, capsys):
    flags = (*STREAM, "--dataset_name", half_bad(tmp_path), "--skip_bad_images", "--train_batch_size", 8)
    settings, data = load(*flags)
    found = taken(batches_of(settings, data), 3)
    assert len(found) == 24 and set(found) == {0, 2, 4, 6}
    said = capsys.readouterr().err
    assert "--skip_bad_images: skipped image row 3 of piece 0 cannot be decoded" in said
    assert said.count("--skip_bad_images: skipped") == 10 and "further images are not listed" in said
    assert data.examples.__getitems__([0, 1, 7])["values"][:, 0, 0, 0].tolist() == [0, 2, 0]


@pytest.mark.slow
def test_nothing_but_bad_images_is_refused(load, tmp_path):
    _, data = load(*STREAM, "--dataset_name", half_bad(tmp_path, bad=bool), "--skip_bad_images")
    with pytest.raises(UsageError, match=r"bad\.parquet: none of 7 images can be decoded"):
        data.decoder.__getitems__([(id, row) for id, row in enumerate(data.rows)][1:])
    _, data = load(*STREAM, "--dataset_name", half_bad(tmp_path, bad=lambda value: True), "--skip_bad_images")
    with pytest.raises(UsageError, match="none of the first 8 images can be decoded"):
        data.examples.__getitems__([3])


def test_a_file_that_ends_early_ends_the_run_with_one_line(train, capsys, tmp_path):
    folder = tables(tmp_path / "t")
    (folder / "train-2.parquet").write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    message = refusal(train, capsys, *STREAM, "--dataset_name", folder, "--max_train_steps", 20)
    assert "train-2.parquet" in message


def test_what_cannot_be_streamed_is_refused(load, tmp_path):
    np.save(tmp_path / "f.npy", np.zeros((2, 1, 8, 8)))
    with pytest.raises(UsageError, match="--streaming: fields are always read from the disk on demand"):
        load("--streaming", "--train_data_dir", tmp_path / "f.npy")
    rows = {"image": pictures(2), "label": ["b", "a"]}
    Dataset.from_dict(rows, Features(image=Image(), label=Value("string"))).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(UsageError, match=r"--label_column label: a stream needs a column with class names"):
        load(*STREAM, "--dataset_name", tmp_path / "t.parquet", "--class_conditional")
    with pytest.raises(UsageError, match="'photo' is not a column of images; the columns are: image"):
        load(*STREAM, "--dataset_name", tmp_path / "t.parquet", "--image_column", "photo")


def test_a_label_that_is_missing_is_refused(load, tmp_path):
    features = Features(image=Image(), label=ClassLabel(names=["a", "b"]))
    rows = {"image": pictures(2), "label": [1, None]}
    Dataset.from_dict(rows, features).to_parquet(tmp_path / "t.parquet")
    _, data = load(*STREAM, "--dataset_name", tmp_path / "t.parquet", "--class_conditional")
    with pytest.raises(UsageError, match="--label_column label: row 1 of piece 0 has no label"):
        data.examples.__getitems__([0, 1])


def test_a_stream_without_rows_is_refused(load, tmp_path):
    Dataset.from_dict({"image": []}, Features(image=Image())).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(UsageError, match="holds no images"):
        load(*STREAM, "--dataset_name", tmp_path / "t.parquet", "--max_train_steps", 1)
    with pytest.raises(UsageError, match="process 1 of 2 finds no images"):
        next(iter(row_batches(stream_of(1, 1), process=1, processes=2)))
