"""Held-out images: chosen by the seed, measured with the same noise each time, logged, reported, the best kept."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from in_processes import run_script
from runs import checkpoints, differ, metrics, refusal, weights

from reg_diffusers import RegDDPMPipeline, Term, noise_level
from reg_diffusers.data.held_out import split_rows
from reg_diffusers.data.training_data import FieldData
from reg_diffusers.regularizers import total_variation
from reg_diffusers.runs.measurement import read_comparison
from reg_diffusers.runtime.errors import UsageError
from reg_diffusers.settings import LossSettings
from reg_diffusers.training.validation import Validation

pytestmark = pytest.mark.training

SPLIT = ("--validation_split", 0.25, "--validation_steps", 2, "--max_train_steps", 5)
STILL = ("--learning_rate", 1e-30)  # below the resolution of the weights
DENOISING, TV = "validation/denoising", "validation/raw/total_variation"


@pytest.fixture
def photos(tmp_path):
    """Writes grey pictures, a different one for each number; returns the folder."""

    def build(numbers=range(16), name="photos", size=8):
        for number in numbers:
            path = tmp_path / name / f"{number:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(number).integers(0, 256, (size, size), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(path)
        return tmp_path / name

    return build


def data(folder):
    return "--train_data_dir", folder, "--regularizer", "total_variation"


def measured(folder):
    return [line for line in metrics(folder) if DENOISING in line]


def result(folder):
    return json.loads((folder / "validation.json").read_text())


def test_a_split_is_a_partition_that_the_seed_decides():
    train, held_out = split_rows(1000, 0.05, 3)
    assert len(held_out) == 50 and sorted(train + held_out) == list(range(1000))
    assert split_rows(1000, 0.05, 3) == (train, held_out) and split_rows(1000, 0.05, 4)[1] != held_out
    for share, number in ((0.01, 40), (0.9, 2)):
        with pytest.raises(
            UsageError, match=rf"--validation_split {share}: (holds out|leaves) none of {number} images"
        ):
            split_rows(number, share, 0)


def test_the_losses_have_a_closed_form_for_a_network_that_predicts_0(tmp_path):
    """Then the denoising loss is the mean square of the noise, and x0_hat is x_t / alpha."""
    fields = np.random.default_rng(0).uniform(-1, 1, (5, 1, 8, 8)).astype(np.float32)
    held_out, scheduler = FieldData(fields), DDPMScheduler()
    training = SimpleNamespace(
        accelerator=Accelerator(cpu=True),
        noise_scheduler=scheduler,
        trackers=SimpleNamespace(log=lambda values, step: None),
        max_train_steps=9,
        ema=None,
        as_called=lambda network: network,
    )
    terms, ending = (Term(total_variation, 0.0),), SimpleNamespace(attempt=lambda what, fix, work: work())
    settings = {"seed": 3, "interval": 4, "keeps_best": False, "output_dir": tmp_path, "ending": ending}
    validation = Validation(training, held_out, "a test", terms, LossSettings(), **settings)
    assert [step for step in range(1, 11) if validation.is_due(step)] == [4, 8, 9]
    network = torch.nn.Module()
    network.forward = lambda sample, timesteps, return_dict: (torch.zeros_like(sample),)
    before = torch.get_rng_state()
    validation._measure(4, SimpleNamespace(unet=network))
    assert torch.equal(before, torch.get_rng_state())
    squares, values, seen = [], [], set()
    for rows, timesteps, noise in validation._batches():
        level = noise_level(scheduler, timesteps)
        images = held_out.normalization.normalize(torch.from_numpy(fields[rows]))
        alpha, sigma = (number.reshape(-1, 1, 1, 1) for number in (level.alpha, level.sigma))
        x0_hat = (alpha * images + sigma * noise) / alpha
        active = terms[0].weighting(level) != 0
        squares.append(noise.square().flatten(1).mean(1))
        values.append(total_variation(x0_hat[active]))
        seen |= set(zip(rows, timesteps.tolist(), strict=True))
    assert validation.last[DENOISING] == pytest.approx(torch.cat(squares).mean().item(), rel=1e-5)
    assert validation.last[TV] == pytest.approx(torch.cat(values).mean().item(), rel=1e-4)
    assert len(seen) == 260  # 5 images at 52 noise levels each


def test_every_measurement_has_the_same_noise_also_without_the_losses(train, photos):
    out = train(*data(photos()), *SPLIT, *STILL, "--compare", "--seed", 3)
    lines = [*measured(out), *measured(out / "plain")]
    assert [line.pop("step") for line in lines] == [2, 4, 5, 2, 4, 5]
    assert lines == [lines[0]] * 6 and set(lines[0]) == {DENOISING, TV}
    rows = read_comparison(out / "comparison.json")
    assert [row.held_out_loss for row in rows.values()] == [None, *[lines[0][DENOISING]] * 2]


def test_measuring_changes_nothing(train, photos):
    trained, others = photos(), photos(range(20, 24), "others")
    flags = (*data(trained), "--max_train_steps", 4)
    plain = train(*flags, output="plainly")
    held = train(*flags, "--validation_data_dir", others, "--validation_steps", 1, output="measured")
    assert not differ(weights(plain), weights(held))
    strip = [line for line in metrics(held) if DENOISING not in line]
    assert strip == metrics(plain) and len(measured(held)) == 4


def test_held_out_images_are_not_trained_on(train, photos, monkeypatch):
    ids = []
    original = train.script.batches_of

    def recorded(*args, **kwargs):
        for batch in original(*args, **kwargs):
            ids.extend(batch.ids.tolist())
            yield batch

    monkeypatch.setattr(train.script, "batches_of", recorded)
    train(*data(photos()), *SPLIT, "--train_batch_size", 4, "--seed", 3)
    assert set(ids) == set(split_rows(16, 0.25, 3)[0])


@pytest.mark.slow
def test_a_resumed_run_measures_what_one_that_was_not_interrupted_does(train, photos):
    flags = (*data(photos()), *SPLIT, "--checkpointing_steps", 3, "--keep_best", "--learning_rate", 0.01)
    out = train(*flags)
    assert checkpoints(out) == ["checkpoint-3"]
    before = weights(out), weights(out / "best"), measured(out), result(out)
    shutil.rmtree(out / "unet")
    if before[-1]["best"]["step"] > 3:
        shutil.rmtree(out / "best")
    train(*flags, "--resume", "auto")
    assert before[2:] == (measured(out), result(out))
    assert not differ(before[0], weights(out)) and not differ(before[1], weights(out / "best"))


def test_other_held_out_images_are_not_continued(train, photos, capsys):
    others = photos(range(20, 24), "others")
    flags = (*data(photos()), "--max_train_steps", 3, "--checkpointing_steps", 2, "--validation_data_dir", others)
    out = train(*flags)
    shutil.copy(others / "020.png", others / "021.png")
    assert "other settings: held-out images" in refusal(train, capsys, *flags, "--resume", "auto")
    assert "--validation_split None" in refusal(train, capsys, *data("photos"), *SPLIT, "--resume", "auto")
    assert (out / "checkpoint-2").is_dir()


def test_the_best_model_is_that_of_its_step(train, photos):
    flags = (*data(photos(range(40))), "--learning_rate", 0.02, "--lr_scheduler", "constant", "--ema_max_decay", 0)
    out = train(*flags, "--validation_split", 0.2, "--validation_steps", 1, "--max_train_steps", 12, "--keep_best")
    values = [line[DENOISING] for line in measured(out)]
    best = result(out)["best"]
    assert best[DENOISING] == min(values) and best["step"] == 1 + values.index(min(values))
    assert best["step"] < 12  # otherwise this shows nothing: choose another learning rate
    until = train(*flags, "--validation_split", 0.2, "--max_train_steps", best["step"], output="until")
    assert not differ(weights(out / "best"), weights(until)) and differ(weights(out), weights(until))
    assert RegDDPMPipeline.from_pretrained(out / "best").unet.config.sample_size == 8


def test_the_report_and_the_card_name_the_losses(train, photos, capsys):
    out = train(*data(photos()), *SPLIT, "--keep_best", "--compare", "--seed", 3)
    told, found = capsys.readouterr().out, result(out)
    assert "data       12 images of 1 x 8 x 8" in told and "held out   4 images by --validation_split 0.25" in told
    last = found["last"]
    assert f"held out    denoising {last[DENOISING]:.5g}, total_variation {last[TV]:.4g} at step 5; the lowest" in told
    assert "on held-out images" in told and found["weights"] == "averaged"
    card = (out / "README.md").read_text()
    assert (
        "On 4 images held out from the training (`--validation_split 0.25`), the denoising loss at step 5 is" in card
    )
    assert "(validation.png)" in card and "| on held-out images |" in card
    record = json.loads((out / "reg_config.json").read_text())["data"]
    assert record["images"] == 12 and record["held_out"]["images"] == 4
    assert PIL.Image.open(out / "validation.png").size[0] > 400


def test_images_that_are_also_trained_on_are_not_measured(train, photos, capsys):
    trained, others = photos(), photos(range(14, 20), "others")
    out = train(*data(trained), "--validation_data_dir", others, "--max_train_steps", 1)
    warning = (
        f"--validation_data_dir {others}: 2 of 6 held-out images are among the training images, too: not measured"
    )
    assert warning in capsys.readouterr().err and result(out)["images"] == 4
    error = refusal(train, capsys, *data(trained), "--validation_data_dir", trained, output="other")
    assert "all 16 held-out images are among the training images, too: hold out others" in error
    for number in range(16):
        shutil.copy(others / "014.png", trained / f"{number:03}.png")
    error = refusal(train, capsys, *data(trained), "--validation_split", 0.25, output="other")
    assert "--validation_split 0.25: all 4 held-out images are among the training images, too" in error


def test_a_stream_is_measured_on_other_images_only(train, photos, capsys):
    flags = (*data(photos()), "--streaming", "--max_train_steps", 1)
    error = refusal(train, capsys, *flags, "--validation_split", 0.25)
    assert "--validation_split 0.25: a stream is not split" in error and "--validation_data_dir" in error
    out = train(*flags, "--validation_data_dir", photos(range(20, 24), "others"))
    assert len(measured(out)) == 1 and "these are streamed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--keep_best",), "--keep_best needs held-out images: pass --validation_split 0.05"),
        (("--validation_steps", 3), "--validation_steps needs held-out images"),
        (("--validation_split", 0.1, "--validation_data_dir", "x"), "--validation_data_dir are mutually exclusive"),
        (("--validation_split", 0), "'0' is not a number above 0 and below 1"),
        (("--validation_split", 0.01), "--validation_split 0.01: holds out none of 16 images: use at least 0.031"),
        (("--validation_data_dir", "missing"), "--validation_data_dir missing: no such folder"),
        (("--validation_data_dir", "empty"), "--validation_data_dir empty: holds no images"),
        (("--validation_data_dir", "fields.npy"), "--validation_data_dir fields.npy: "),
    ],
)
def test_what_cannot_work_is_one_line(train, photos, capsys, flags, message, tmp_path):
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "fields.npy", np.zeros((3, 1, 8, 8), np.float32))
    assert message in refusal(train, capsys, *data(photos()), *flags)
    assert not (tmp_path / "out" / "reg_settings.yaml").exists()


def test_classes_have_the_numbers_of_the_training(train, photos, capsys, tmp_path):
    for first, name in (
        (0, "photos/bee"),
        (8, "photos/ant"),
        (16, "photos/cow"),
        (24, "others/cow"),
        (32, "others/ant"),
    ):
        photos(range(first, first + 8), name)
    flags = ("--train_data_dir", "photos", "--class_conditional", "--max_train_steps", 1)
    out = train(*flags, "--validation_data_dir", "others")
    assert "classes    0 ant, 1 bee, 2 cow" in capsys.readouterr().out and len(measured(out)) == 1
    photos(range(40, 42), "others/dog")
    error = refusal(train, capsys, *flags, "--validation_data_dir", "others", output="other")
    assert "--validation_data_dir others: dog is not one of the classes ant, bee, cow" in error


def test_fields_are_measured_in_the_units_of_the_training(train, capsys, tmp_path):
    fields = np.random.default_rng(0).normal(5, 2, (30, 1, 8, 8)).astype(np.float32)
    np.save(tmp_path / "all.npy", fields)
    np.save(tmp_path / "train.npy", fields[:20])
    np.save(tmp_path / "others.npy", fields[20:])
    np.save(tmp_path / "small.npy", fields[20:, :, :4, :4])
    flags = ("--max_train_steps", 1, "--regularizer", "total_variation")
    out = train("--train_data_dir", "train.npy", "--validation_data_dir", "others.npy", *flags)
    assert result(out)["images"] == 10
    split = train("--train_data_dir", "all.npy", "--validation_split", 0.5, *flags, output="split")
    assert (
        "held out   15 fields by --validation_split 0.5" in capsys.readouterr().out and result(split)["images"] == 15
    )
    flags = ("--train_data_dir", "train.npy", "--validation_data_dir", "small.npy", *flags)
    assert "small.npy: 1 x 4 x 4, but the training data are 1 x 8 x 8" in refusal(train, capsys, *flags, output="x")


@pytest.mark.slow
def test_two_processes_measure_the_same(train, folder, monkeypatch):
    monkeypatch.chdir(folder)
    flags = ("--validation_split", 0.25, "--validation_steps", 2, "--max_train_steps", 3, "--keep_best", *STILL)
    fields = ("--train_data_dir", "fields.npy", "--num_threads", 1)
    one = train(*fields, *flags, output=str(folder / "one"))
    assert run_script(folder, *flags, "--output_dir", "two") == [0, 0]
    assert measured(one) == measured(folder / "two") and len(measured(one)) == 2
    assert result(one) == result(folder / "two") and (folder / "two" / "best" / "model_index.json").is_file()
