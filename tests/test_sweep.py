"""`reg-diffusers sweep`: one training for each weight, measured, and the front that no run beats."""

import contextlib
import json
import math
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from reg_diffusers.cli import main
from reg_diffusers.cli.sweep import _runs
from reg_diffusers.evaluation.pareto import draw_pareto, pareto_front
from reg_diffusers.evaluation.trade_off import Point

pytestmark = pytest.mark.training

ROOT = Path(__file__).parents[1]
TRAINING = (
    "--train_data_dir fields.npy --max_train_steps 2 --train_batch_size 4 --eval_batch_size 2 --mixed_precision no"
    " --ddpm_num_inference_steps 2 --model_config_name_or_path tiny --num_threads 1 --lr_warmup_steps 0"
    " --regularizer total_variation"
).split()


@pytest.fixture
def folder(tmp_path, monkeypatch, tiny_unet):
    monkeypatch.chdir(tmp_path)
    np.save("fields.npy", np.random.default_rng(0).normal(size=(48, 1, 8, 8)).astype(np.float32))
    tiny_unet().save_config("tiny")
    return tmp_path


@pytest.fixture
def sweep(capsys):
    """Runs the command in this process, the trainings in processes of their own."""

    def run(*flags, training=TRAINING, refused=False):
        threads = torch.get_num_threads()
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()
        common = ["--script", ROOT / "train_reg.py", "--num_images", 20, "--num_inference_steps", 2]
        common += ["--features", "pixels", "--num_threads", 1]
        with pytest.raises(SystemExit, match=r"^2$") if refused else contextlib.nullcontext():
            main(["sweep", *map(str, (*common, *flags)), "--", *training])
        torch.set_num_threads(threads)
        printed = capsys.readouterr()
        return printed.err.splitlines()[-1] if refused else printed.out

    return run


def test_the_front_is_what_no_other_beats():
    generator = np.random.default_rng(0)
    for _ in range(50):
        points = [tuple(map(int, point)) for point in generator.integers(0, 8, (12, 2))]

        def beaten(point, points=points):
            return any(a <= point[0] and b <= point[1] and (a, b) != point for a, b in points)

        expected = [index for index, point in enumerate(points) if not beaten(point)]
        assert sorted(pareto_front(points)) == expected
    front = pareto_front([(3, 1), (1, 3), (2, 2), (math.nan, 0), (0, math.inf), (3, 3)])
    assert front == [1, 2, 0]  # in order of the distance
    assert pareto_front([]) == []


def test_the_figure_tells_weightings_by_shape_and_names_weights(tmp_path):
    points = [Point("data", 0.1, 0.3), Point("0", 1, 1, 0.1, 0.1), Point("0.1", 1, 0.6), Point("1", 2, 0.7)]
    drawn = []

    def keep(axes, *_, **__):
        drawn.append(axes)

    from matplotlib.figure import Figure

    save = Figure.savefig
    try:
        Figure.savefig = lambda figure, path, **kwargs: (keep(figure.axes[0]), save(figure, path, **kwargs))
        draw_pareto(
            [tmp_path / "a.png"],
            {"a": points},
            {"a": [points[2]]},
            ["", "", "matched", "constant"],
            "distance",
            "loss",
        )
    finally:
        Figure.savefig = save
    (axes,) = drawn
    assert [text.get_text() for text in axes.texts] == ["data", "0", "0.1", "1"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["Pareto front", "matched", "constant"]
    markers = {tuple(line.get_xydata()[0]): line.get_marker() for line in axes.lines if len(line.get_xydata()) == 1}
    assert len({markers[point.x, point.y] for point in points}) == 4
    (front,) = [line for line in axes.lines if line.get_label() == "Pareto front"]
    assert front.get_xydata().tolist() == [[1, 0.6]]
    assert PIL.Image.open(tmp_path / "a.png").size[0] > 400


def test_weight_0_is_trained_once():
    class Args:
        reg_weights, reg_weightings = [0.0, 1.0, 0.1, 1.0], ["matched", "constant"]

    titles = [title for title, *_ in _runs(Args)]
    assert titles == ["weight 0", "matched 1", "matched 0.1", "constant 1", "constant 0.1"]


@pytest.mark.slow
def test_trained_measured_and_gone_on_with(folder, sweep):
    """Also by a loss that compares images with their originals, which samples lack."""
    both = {"training": [*TRAINING, "spectrum"]}
    sweep("--reg_weights", 0, "--reg_weightings", "matched", **both)
    runs = Path("sweep/runs")
    before = (runs / "weight-0" / "model_index.json").stat().st_mtime_ns
    flags = ("--reg_weights", 0, 1, "--reg_weightings", "matched")
    told = sweep(*flags, **both)  # with one more weight
    assert "spectrum needs original_samples, which samples lack: measured on x0_hat of images of the data" in told
    assert "weight 0: complete already" in told and "matched 1: complete already" not in told
    assert (runs / "weight-0" / "model_index.json").stat().st_mtime_ns == before
    assert sorted(path.name for path in runs.iterdir()) == ["matched-1", "weight-0"]
    record = json.loads((runs / "matched-1" / "reg_config.json").read_text())
    term, _ = record["objective"]["terms"]
    assert (term["weight"], term["weighting"]) == (1, "matched")
    found = json.loads(Path("sweep/sweep.json").read_text())
    assert list(found["rows"]) == ["data", "weight 0", "matched 1"]
    for title in ("weight 0", "matched 1"):
        row = found["rows"][title]
        assert row["denoising_loss"] > 0 and row["terms"]["total_variation"]["value"] > 0
    points = {
        title: (row["distances"]["sliced Wasserstein"]["value"], row["terms"]["total_variation"]["value"])
        for title, row in found["rows"].items()
    }
    front = found["pareto"]["total_variation"]
    predicted = {title: row["terms"]["spectrum of x0_hat"]["value"] for title, row in found["rows"].items()}
    assert predicted.pop("data") < 1e-6 < min(predicted.values())
    weight = min(found["pareto"]["spectrum of x0_hat"], key=predicted.get)
    assert weight == min(predicted, key=predicted.get)
    assert front == [list(points)[1:][index] for index in pareto_front(list(points.values())[1:])]
    marked = [line for line in told.splitlines() if line.startswith("*  ")]
    assert len(marked) == len({title for one in found["pareto"].values() for title in one}) and all(
        title in "".join(marked) for title in front
    )
    assert all(Path("sweep", f"sweep.{suffix}").stat().st_size > 1000 for suffix in ("png", "svg"))
    refusal = sweep(*flags, training=[*TRAINING, "--seed", "3"], refused=True)
    assert "--output sweep holds a sweep with other settings" in refusal


def test_what_cannot_work_is_one_line(folder, sweep, monkeypatch):
    assert "--reg_weight after --: the sweep decides it" in sweep(
        training=[*TRAINING, "--reg_weight", "1"], refused=True
    )
    assert "--output_dir after --" in sweep(training=[*TRAINING, "--output_dir=x"], refused=True)
    assert "--num_images 19: confidence intervals need" in sweep("--num_images", 19, refused=True)  # before training
    assert "--regularizer none leaves nothing" in sweep(training=[*TRAINING, "--regularizer", "none"], refused=True)
    assert "--script nowhere.py: no such file" in sweep("--script", "nowhere.py", refused=True)
    assert "--reg_weightings: unknown weighting 'no'" in sweep("--reg_weightings", "no", refused=True)
    assert "'-1' is not a number of at least 0" in sweep("--reg_weights=-1", refused=True)
    assert not Path("sweep").exists()
    for text, name in (
        ("reg_target: [total_variation=0.5]", "reg_target"),
        ("push_to_hub: true", "push_to_hub"),
        ("overwrite_output_dir: true", "overwrite_output_dir"),
    ):
        Path("training.yaml").write_text(f"{text}\n")
        refusal = sweep(training=["training.yaml", *TRAINING], refused=True)
        assert f"--{name} after --: the sweep decides it" in refusal and "YAML" in refusal
    assert not Path("sweep").exists()
    for number, text in enumerate(("{", "[]")):
        Path(f"broken{number}").mkdir()
        Path(f"broken{number}/sweep_settings.json").write_text(text)
        refusal = sweep("--output", f"broken{number}", refused=True)
        assert f"--output broken{number}: sweep_settings.json cannot be read: name another folder" in refusal
    Path("fails.py").write_text("import sys\nsys.exit(7)\n")
    refusal = sweep("--script", "fails.py", refused=True)
    assert "the training in sweep/runs/weight-0 failed with exit status 7" in refusal
