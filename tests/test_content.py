"""A run is not continued on other data of the same names and number."""

import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from datasets import Dataset, Features, Image
from runs import differ, refusal, weights

from reg_diffusers.data.content import array_digest
from reg_diffusers.runs.lineage import CONTENT, changed_settings
from reg_diffusers.runs.manifest import write_manifest

pytestmark = pytest.mark.training

REFUSED = "content of the data (other images or columns under the same name)"


@pytest.fixture
def run(train):
    """Trains for 4 steps, with checkpoints after 2 and 4."""
    quick = "--cache_dir cache --max_train_steps 4 --checkpointing_steps 2 --train_batch_size 4 --num_threads 1"
    return lambda *flags, **kwargs: train(*quick.split(), *flags, **kwargs)


def repaint(path):
    """Changes one pixel."""
    pixels = np.asarray(PIL.Image.open(path)).copy()
    pixels[0, 0] ^= 128
    PIL.Image.fromarray(pixels).save(path)


def without_last(out):
    shutil.rmtree(out / "checkpoint-4")
    shutil.rmtree(out / "unet")


@pytest.mark.parametrize("streaming", [(), ("--streaming",)])
def test_a_changed_image_is_noticed_and_can_be_allowed(run, capsys, image_folder, streaming):
    folder = image_folder(size=(8, 8))
    flags = ("--train_data_dir", "images", *streaming)
    without_last(run(*flags))
    repaint(folder / "cats" / "1.png")
    error = refusal(run, capsys, *flags, "--resume", "auto")
    assert error.count("->") == 0 and f"was trained with other settings: {REFUSED}. Use those" in error
    run(*flags, "--resume", "auto", "--allow_changed_settings")


def test_a_copied_and_touched_folder_is_the_same(run, image_folder, tmp_path):
    folder = image_folder(size=(8, 8))
    out = run("--train_data_dir", "images")
    whole = weights(out)
    without_last(out)
    shutil.copytree(folder, tmp_path / "node" / "images", copy_function=shutil.copyfile)
    shutil.rmtree(folder)
    run("--train_data_dir", "node/images", "--resume", "auto")
    assert not differ(whole, weights(out))
    assert len(json.loads((out / "reg_config.json").read_text())["data"]["sha256"]) == 64


def test_a_table_with_another_image_is_noticed(run, capsys, image_folder):
    files = sorted(map(str, image_folder(size=(8, 8)).rglob("*.png")))

    def write():
        Dataset.from_dict({"image": files}, features=Features(image=Image())).to_parquet("table.parquet")

    write()
    run("--dataset_name", "table.parquet")
    repaint(Path(files[5]))
    write()
    assert REFUSED in refusal(run, capsys, "--dataset_name", "table.parquet", "--resume", "auto")


def test_changed_fields_are_noticed(run, capsys):
    fields = np.random.default_rng(0).random((16, 1, 8, 8), dtype=np.float32)
    np.save("fields.npy", fields)
    flags = ("--train_data_dir", "fields.npy", "--regularizer", "total_variation")
    run(*flags)
    fields[3, 0, 4, 4] = fields[3, 0, 4, 5]
    np.save("fields.npy", fields)
    assert REFUSED in refusal(run, capsys, *flags, "--resume", "auto")


def test_the_hash_of_an_array_sees_order_type_and_every_value():
    array = np.arange(5000, dtype=np.float32).reshape(2500, 2)
    others = [array[::-1], array.astype(np.float64), array.reshape(1250, 4), np.where(array == 4321, 0, array)]
    assert len({array_digest(one) for one in (array, *others)}) == 5
    assert array_digest(array.copy()) == array_digest(array)


def test_a_checkpoint_that_does_not_record_the_content_can_be_continued(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    write_manifest(tmp_path, 1, {"--seed": 0}, "run", [])
    assert changed_settings(tmp_path, {"--seed": 0, CONTENT: "new"}) == []
    assert changed_settings(tmp_path, {"--seed": 1, CONTENT: "new"}) == ["--seed 0 -> 1"]
