"""--random_crop: random windows of images that are decoded once, the same for any batch, process and start."""

import shutil

import numpy as np
import PIL.Image
import pytest
import torch
from runs import differ, evaluation_result, metrics, refusal, weights

from reg_diffusers.data.crops import central, drawn, larger

pytestmark = pytest.mark.training

CROP = ("--random_crop", "--random_flip", "--train_batch_size", 4)


@pytest.fixture
def photos(tmp_path):
    """Ramps, so that the place of a window is seen in its first pixel."""
    for number in range(40):
        path = tmp_path / "photos" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        rows, columns = np.mgrid[:10, :10]
        PIL.Image.fromarray((20 * rows + 2 * columns + number).astype(np.uint8)).save(path)
    return tmp_path / "photos"


def batch(ids, side=10):
    ramp = torch.arange(side * side).reshape(1, 1, side, side).expand(len(ids), 1, side, side)
    mask = {"mask": ramp.float(), "number": torch.ones(len(ids))}
    return {"values": ramp, "condition": ramp, "columns": mask, "ids": torch.tensor(ids)}


def test_the_stored_size_is_a_seventh_larger():
    assert larger((224, 112)) == (256, 128) and larger((8, 8)) == (10, 10) and larger((1, 64)) == (2, 74)


def test_a_window_depends_on_the_seed_the_epoch_and_the_image_alone():
    together = drawn(batch([3, 1, 2]), (8, 8), seed=0, epoch=5)
    alone = drawn(batch([1]), (8, 8), seed=0, epoch=5)
    assert torch.equal(together["values"][1:2], alone["values"])
    for found in (together["condition"], together["columns"]["mask"].long()):
        assert torch.equal(found, together["values"])
    assert together["columns"]["number"].shape == (3,)
    first = {drawn(batch([7]), (8, 8), 0, epoch)["values"][0, 0, 0, 0].item() for epoch in range(200)}
    assert first == {10 * top + left for top in range(3) for left in range(3)}  # every window is drawn
    assert central(batch([1]), (8, 8))["values"][0, 0, 0, 0] == 11


def seen_by(train, monkeypatch, *flags, **kwargs):
    """The images of a training, by epoch and id."""
    seen = {}
    original = train.script.batches_of

    def recorded(training, *args, **given):
        for found in original(training, *args, **given):
            for id, image in zip(found.ids.tolist(), found.original_samples, strict=True):
                seen[training.progress.epoch, training.progress.batch, id] = image.clone()
            yield found

    monkeypatch.setattr(train.script, "batches_of", recorded)
    out = train(*flags, **kwargs)
    monkeypatch.setattr(train.script, "batches_of", original)
    return out, seen


def test_the_network_sees_windows_and_a_resumed_run_the_same(train, photos, monkeypatch):
    flags = ("--train_data_dir", photos, *CROP, "--max_train_steps", 5, "--checkpointing_steps", 3)
    out, seen = seen_by(train, monkeypatch, *flags)
    assert len(seen) == 20
    before = weights(out)
    shutil.rmtree(out / "unet")
    _, again = seen_by(train, monkeypatch, *flags, "--resume", "auto")
    assert len(again) == 8 and all(torch.equal(seen[key], image) for key, image in again.items())
    assert not differ(before, weights(out))


def test_streams_crop_too(train, photos, monkeypatch):
    flags = ("--train_data_dir", photos, "--random_crop", "--train_batch_size", 4, "--max_train_steps", 4)
    _, seen = seen_by(train, monkeypatch, *flags)
    _, stream = seen_by(train, monkeypatch, *flags, "--streaming", output="stream")
    assert {image.shape for image in (*seen.values(), *stream.values())} == {(1, 8, 8)}
    assert len({image[0, 0, 0].item() for image in stream.values()}) > 4


def test_held_out_images_and_measurements_see_the_central_window(train, load, photos, capsys):
    data = load("--train_data_dir", photos, "--random_crop")
    values = data.__getitems__([0, 1])["values"]
    assert values.shape == (2, 1, 8, 8) and values[0, 0, 0, 0] == 22 and data.shape == (1, 8, 8)
    assert data.uncropped.__getitems__([0])["values"].shape == (1, 1, 10, 10)
    stream = load("--train_data_dir", photos, "--random_crop", "--streaming")
    assert torch.equal(stream.examples.__getitems__([0, 1])["values"], values)
    flags = ("--train_data_dir", photos, *CROP, "--max_train_steps", 2, "--validation_split", 0.3, "--compare")
    out = train(*flags, "--regularizer", "total_variation")
    assert "images of 1 x 8 x 8" in capsys.readouterr().out and "validation/denoising" in metrics(out)[-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--center_crop",), "--random_crop and --center_crop are mutually exclusive"),
        (("--buckets", 8), "--random_crop: --buckets keeps what a crop would cut off"),
        (("--train_data_dir", "fields.npy"), "--random_crop crops images, but fields keep their size; drop the flag"),
    ],
)
def test_what_cannot_be_cropped_is_refused(train, photos, capsys, tmp_path, flags, message):
    np.save(tmp_path / "fields.npy", np.zeros((3, 1, 8, 8), np.float32))
    assert message in refusal(train, capsys, "--train_data_dir", photos, "--random_crop", *flags)


def test_an_evaluation_compares_with_the_central_windows(train, photos, evaluate, capsys):
    out = train("--train_data_dir", photos, *CROP, "--max_train_steps", 1)
    capsys.readouterr()
    flags = ("--model", out, "--num_images", 20, "--num_inference_steps", 1, "--features", "pixels")
    for name, more in (
        ("recorded", ()),
        ("named", ("--data", photos, "--random_crop")),
        ("whole", ("--data", photos)),
    ):
        evaluate(*flags, *more, "--output", name)
    recorded, named, whole = (evaluation_result(name)["rows"] for name in ("recorded", "named", "whole"))
    assert recorded == named and recorded["data"] != whole["data"]
