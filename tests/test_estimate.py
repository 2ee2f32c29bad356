"""What a run says before it starts: how long it takes, how much space it needs, how large its network is."""

import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from runs import differ, metrics, weights

from reg_diffusers.networks.build import GivenModel, build_unet, learning_rate_of, new_unet_config
from reg_diffusers.runtime.amounts import duration_text, size_text
from reg_diffusers.settings import MachineSettings, OptimizationSettings
from reg_diffusers.training.estimate import number_of_steps

pytestmark = pytest.mark.training

CACHE = ("--train_batch_size", 4, "--checkpointing_steps", 2, "--preview_steps", 4, "--num_threads", 1)


@pytest.mark.parametrize(
    "seconds, text",
    [(0.2, "1 s"), (40, "40 s"), (89.9, "90 s"), (725, "12 min"), (33000, "9 h 10 min"), (268000, "3.1 days")],
)
def test_durations_are_said_as_people_say_them(seconds, text):
    assert duration_text(seconds) == text


@pytest.mark.parametrize(
    "number, text", [(900, "1 kB"), (1.74e9, "1.7 GB"), (35.4e6, "35 MB"), (9.96e8, "996 MB"), (2.3e12, "2.3 TB")]
)
def test_sizes_are_said_as_people_say_them(number, text):
    assert size_text(number) == text


def lines_of(printed):
    return dict(line.split(maxsplit=1) for line in printed.splitlines()[:5])


def test_the_first_five_lines_are_data_model_objective_time_and_disk(train, image_folder, capsys):
    train("--train_data_dir", image_folder(), *CACHE, "--max_train_steps", 2)
    lines = lines_of(capsys.readouterr().out)
    assert list(lines) == ["data", "model", "objective", "time", "disk"]
    assert lines["data"].startswith("8 images of 1 x 8 x 8 from ")
    assert re.match(r"UNet2DModel, 0\.\d+M parameters", lines["model"])
    assert re.fullmatch(r"about \S+ (s|min): 2 steps of \S+ m?s, a preview", lines["time"])
    assert re.fullmatch(r"about .+: 1 checkpoint of \S+ [kM]B, a pipeline of \S+ [kM]B; .+ free", lines["disk"])


@pytest.mark.parametrize("flags", [("--num_epochs", 3), ("--num_epochs", 5, "--gradient_accumulation_steps", 3)])
def test_the_number_of_steps_is_that_of_the_training(train, image_folder, capsys, flags):
    out = train("--train_data_dir", image_folder(9), *CACHE, *flags)
    steps = metrics(out)[-1]["step"]
    assert f": {steps} steps of " in lines_of(capsys.readouterr().out)["time"]


@pytest.mark.slow
def test_a_resumed_run_says_what_is_left(train, image_folder, capsys):
    flags = ("--train_data_dir", image_folder(), *CACHE, "--max_train_steps", 9)
    train(*flags, "--compare", output="both")
    shutil.rmtree("both/plain/checkpoint-8")
    train(*flags, output="one")
    capsys.readouterr()

    def time(*flags, **kwargs):
        train(*flags, "--resume", "auto", **kwargs)
        return re.search("^time +(.+)", capsys.readouterr().out, re.MULTILINE)[1]

    left = r"about \d+ s: 0 and 3 of 2 x 9 steps left, \S+ m?s each, 3 previews, 4 samples to measure"
    assert re.fullmatch(left, time(*flags, "--compare", output="both"))
    assert re.fullmatch(r"about \d+ s: 1 of 9 steps left, \S+ m?s each, a preview", time(*flags, output="one"))
    more = (*flags, "--max_train_steps", 13)
    assert re.fullmatch(r"about \d+ s: 5 of 13 steps left, \S+ m?s each, 2 previews", time(*more, output="one"))


def test_a_stream_of_unknown_length_has_the_steps_that_are_asked_for():
    assert number_of_steps(OptimizationSettings(max_train_steps=7), SimpleNamespace(number=None), 2)[0] == 7


def test_the_space_that_is_named_is_the_space_that_is_used(train, image_folder, capsys):
    out = train("--train_data_dir", image_folder(), *CACHE, "--max_train_steps", 9, "--compare")
    line = lines_of(capsys.readouterr().out)["disk"]
    number, unit = re.match(r"about (\S+) (\w+): 2 x \(3 checkpoints of ", line).groups()
    named = float(number) * {"kB": 1e3, "MB": 1e6}[unit]
    used = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
    used += sum(path.stat().st_size for path in out.rglob("checkpoint-*/*") if path.suffix != ".safetensors")
    assert len(list(out.glob("checkpoint-*"))) == len(list(out.glob("plain/checkpoint-*"))) == 3
    assert used == pytest.approx(named, rel=0.25)  # names and shapes weigh much in a network of 20,000 parameters


def test_a_disk_that_is_too_small_is_reported(train, image_folder, monkeypatch, capsys):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    train("--train_data_dir", image_folder(), *CACHE, "--max_train_steps", 2)
    assert "are needed, 1 kB are free: name another disk" in capsys.readouterr().err


def test_measuring_the_speed_changes_no_random_number(train, image_folder, monkeypatch):
    whole = train("--train_data_dir", image_folder(), *CACHE, "--max_train_steps", 2, output="whole")
    monkeypatch.setattr("reg_diffusers.training.estimate.measure_speed", lambda *_, **__: "not wanted")
    part = train("--train_data_dir", image_folder(), *CACHE, "--max_train_steps", 2, output="part")
    assert not differ(weights(whole), weights(part))


def test_a_step_that_fails_is_no_estimate_but_the_training_decides(train, image_folder, monkeypatch, capsys):
    from reg_diffusers.training import estimate

    monkeypatch.setattr(estimate, "draw_timesteps", lambda *_: 1 / 0)
    train("--train_data_dir", image_folder(), *CACHE, "--max_train_steps", 1)
    assert lines_of(capsys.readouterr().out)["time"] == "1 step; not estimated: a step failed: division by zero"


class Data:
    classes, condition_channels = None, 0

    def __init__(self, size):
        self.shape = (3, size, size)


@pytest.mark.parametrize("size, millions", [(16, 0.70), (32, 2.59), (64, 10.14), (128, 113.67)])
def test_the_default_network_is_small_up_to_64_pixels(size, millions):
    with torch.device("meta"):
        unet = build_unet(MachineSettings(), GivenModel(), Data(size))
    assert unet.num_parameters() / 1e6 == pytest.approx(millions, abs=0.01)


def test_the_large_network_is_that_of_diffusers_at_64_pixels_and_can_be_named(train, capsys, monkeypatch):
    assert new_unet_config(64, is_large=True) == new_unet_config(128)
    with torch.device("meta"):
        assert build_unet(MachineSettings(), GivenModel(is_large=True), Data(64)).num_parameters() > 113e6
    named = {}

    def build(size, is_large):
        named[size] = is_large
        return new_unet_config(16)

    monkeypatch.setattr("reg_diffusers.networks.build.new_unet_config", build)
    train("--max_train_steps", 1, "--no-use_ema", model=("--model_config_name_or_path", "large"))
    assert named == {8: True}


def test_the_default_rate_is_that_of_diffusers_but_for_small_new_networks():
    assert [learning_rate_of(GivenModel(), Data(size)) for size in (16, 64, 65)] == [1e-3, 1e-3, 1e-4]
    for given in (GivenModel(is_large=True), GivenModel(config={}), GivenModel(unet=object())):
        assert learning_rate_of(given, Data(16)) == 1e-4


def test_the_default_rate_is_said_recorded_and_used(train, image_folder, capsys):
    flags = ("--train_data_dir", image_folder(), *CACHE, "--max_train_steps", 1, "--lr_scheduler", "constant")
    for model, rate in (((), 1e-3), (("--model_config_name_or_path", "tiny"), 1e-4)):
        out = train(*flags, "--overwrite_output_dir", model=model)
        assert f"model      learning rate {rate:g} by default; --learning_rate sets it" in capsys.readouterr().out
        assert (
            metrics(out)[-1]["lr"] == yaml.safe_load((out / "reg_settings.yaml").read_text())["learning_rate"] == rate
        )
    train(*flags, "--overwrite_output_dir", "--learning_rate", 2e-3)
    assert metrics(out)[-1]["lr"] == 2e-3 and "learning rate" not in capsys.readouterr().out


def test_the_bar_shows_the_loss_beside_that_of_the_data_and_which_training_it_is(train, image_folder, capsys):
    out = train("--train_data_dir", image_folder(), *CACHE, "--max_train_steps", 10, "--compare")
    shown = capsys.readouterr().err
    last = metrics(out)[-1]
    data = last["raw/total_variation"] - last["gap/total_variation"]
    assert f"total_variation={last['raw/total_variation']:.3g} (data {data:.3g}), lr={last['lr']:.1e}" in shown
    assert "training 1 of 2, with total_variation: " in shown
    assert "training 2 of 2, without total_variation: " in shown


def test_previews_of_the_plain_model_have_the_same_captions(train, image_folder, monkeypatch):
    from reg_diffusers.training import preview

    titles, draw = [], preview.captioned_grid

    def record(samples, values, title, means_on_data):
        titles.append((title, list(values), means_on_data))
        return draw(samples, values, title, means_on_data)

    monkeypatch.setattr(preview, "captioned_grid", record)
    train("--train_data_dir", image_folder(), *CACHE, "--max_train_steps", 2, "--compare")
    first, second = titles
    assert first == second and first[1] == ["total_variation"]


def test_zero_keeps_all_checkpoints(train, image_folder):
    flags = ("--train_data_dir", image_folder(), *CACHE, "--max_train_steps", 10, "--checkpoints_total_limit", 0)
    assert len(list(train(*flags).glob("checkpoint-*"))) == 5


def test_a_batch_that_exceeds_the_data_is_estimated_as_all_images(train, image_folder, monkeypatch, capsys):
    from reg_diffusers.training import estimate

    monkeypatch.setattr(estimate, "measure_speed", lambda *_, **__: estimate.Speed(1.0, 0.0))
    train("--train_data_dir", image_folder(), *CACHE, "--max_train_steps", 1, "--train_batch_size", 10**9)
    assert lines_of(capsys.readouterr().out)["time"] == "about 8 s: 1 step of 8 s, a preview"
