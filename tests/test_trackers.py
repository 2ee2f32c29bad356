"""What a logger gets: numbers, pictures, settings and names; each training of a comparison has a run of its own."""

import sys
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import yaml
from accelerate.state import PartialState

from reg_diffusers.runs.run_folder import files_left
from reg_diffusers.settings.arguments import parse_args
from reg_diffusers.training.ending import Ending
from reg_diffusers.training.trackers import Trackers

pytestmark = pytest.mark.training


def events_of(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    return accumulator.EventAccumulator(str(folder / "logs" / "train_reg")).Reload()


def test_tensorboard_gets_pictures_and_settings_of_both_trainings(train):
    flags = "--max_train_steps 2 --preview_steps 1 --compare --report_to tensorboard --hub_token hf_secret"
    out = train(*flags.split(), "--num_threads", 1)
    for folder in (out, out / "plain"):
        events = events_of(folder)
        pictures = events.Images("samples")
        assert [picture.step for picture in pictures] == [1, 2]
        with PIL.Image.open(folder / "samples" / "step-000002.png") as saved:
            assert (pictures[-1].width, pictures[-1].height) == saved.size
        assert [scalar.step for scalar in events.Scalars("denoising")] == [2]
        (settings,) = folder.glob("logs/train_reg/*/hparams.yml")
        text = settings.read_text()
        assert "hf_secret" not in text and yaml.safe_load(text)["regularizer"] == "near_background"
    (comparison,) = events_of(out).Images("comparison")
    with PIL.Image.open(out / "comparison.png") as saved:
        assert (comparison.width, comparison.height) == saved.size and comparison.step == 2
    assert events_of(out / "plain").Tags()["images"] == ["samples"]
    known = set(files_left(out, lambda left: True))
    assert known == {path for path in out.rglob("*") if path.is_file()}


class Tracker:
    """Records what it gets; `fails` makes it fail."""

    def __init__(self, name, fails=False):
        self.name, self.fails, self.got = name, fails, []
        self.init_kwargs, self.tracker, self.begun = {}, SimpleNamespace(id="x7"), []

    def start(self):
        self.begun.append(dict(self.init_kwargs))

    def finish(self):
        self.got.append("finished")

    def log(self, values, step):
        self.got.append((values, step))

    def log_images(self, values, step):
        if self.fails:
            raise ConnectionError("no route")
        self.log(values, step)


def trackers_of(tracker, tmp_path, folder="out", project="train_reg"):
    begun = []
    accelerator = SimpleNamespace(
        trackers=[tracker],
        init_trackers=lambda *given: begun.append(given),
        state=PartialState(),
        log=tracker.log,
    )
    settings = {"seed": 3, "reg_weight": (0.1, 0.2), "cache_dir": None}
    ending = Ending("a command")
    made = Trackers(
        accelerator, tracker.name, ending, output_dir=tmp_path / folder, project=project, hyperparameters=settings
    )
    return made, begun, ending


PICTURE = PIL.Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4))


@pytest.mark.parametrize("folder, name", [("out", "out"), ("out/plain", "out plain")])
def test_runs_have_the_names_of_their_folders_and_a_project(tmp_path, folder, name):
    _, begun, _ = trackers_of(Tracker("wandb"), tmp_path, folder, "faces")
    ((project, settings, names),) = begun
    assert project == "faces" and names["wandb"]["name"] == names["trackio"]["name"] == name
    assert settings == {"seed": 3, "reg_weight": "0.1, 0.2", "cache_dir": "None"}


def test_wandb_gets_pictures_as_accelerate_passes_them(tmp_path):
    tracker = Tracker("wandb")
    trackers, *_ = trackers_of(tracker, tmp_path)
    trackers.log_picture("samples", PICTURE, 7)
    ((values, step),) = tracker.got
    (pixels,) = values["samples"]
    assert step == 7 and pixels.shape == (3, 4, 3) and (pixels[..., 0] == np.asarray(PICTURE)).all()


def test_trackio_gets_pictures_of_its_own_kind(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(Image=lambda pixels: ("image", pixels.shape)))
    tracker = Tracker("trackio")
    trackers, *_ = trackers_of(tracker, tmp_path)
    trackers.log_picture("samples", PICTURE, 7)
    assert tracker.got == [({"samples": ("image", (3, 4, 3))}, 7)]


@pytest.mark.parametrize(
    "name, again", [("wandb", {"id": "x7", "resume": "allow"}), ("trackio", {"resume": "allow"}), ("tensorboard", {})]
)
def test_the_comparison_goes_to_the_finished_run(tmp_path, monkeypatch, name, again):
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(Image=lambda pixels: pixels))
    tracker = Tracker(name)
    tracker.log_images = lambda values, step, **_: tracker.log(values, step)
    trackers, *_ = trackers_of(tracker, tmp_path)
    trackers.log({"denoising": 1.0}, 9)
    trackers.finish()
    trackers.log_picture_afterwards("comparison", PICTURE)
    assert tracker.begun == [again]
    _, finished, (values, step), finished_again = tracker.got
    assert list(values) == ["comparison"] and step == 9 and finished == finished_again == "finished"


def test_a_logger_that_fails_at_a_picture_is_left_out(tmp_path, capsys):
    tracker = Tracker("wandb", fails=True)
    trackers, _, ending = trackers_of(tracker, tmp_path)
    for step in (7, 8):
        trackers.log_picture("samples", PICTURE, step)
    assert ending.failures == ["--logger wandb at step 7"] and tracker.got == []
    assert "the picture is in the output folder" in capsys.readouterr().err


def test_report_to_is_another_name_of_logger(capsys):
    assert parse_args(["--report_to", "wandb"]).output.logger == "wandb"
    assert parse_args([]).output.logger is None
    with pytest.raises(SystemExit):
        parse_args(["--report_to", "nothing"])
    assert "--report_to: invalid choice" in capsys.readouterr().err
