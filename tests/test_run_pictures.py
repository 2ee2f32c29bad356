"""A run in the folder of its data: the next run learns the user's images, not those that the first one drew."""

import PIL.Image
import pytest
import torch

from reg_diffusers.cli import main
from reg_diffusers.runs.run_folder import not_data

pytestmark = pytest.mark.training

SHORT = ("--max_train_steps", 1, "--preview_steps", 1)


@pytest.fixture
def photos(tmp_path):
    for index in range(40):
        path = tmp_path / "photos" / ("cats" if index % 2 else "dogs") / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("L", (8, 8), 6 * index).save(path)
    return tmp_path / "photos"


def test_the_next_run_trains_on_the_same_images(train, photos, monkeypatch, capsys, tmp_path):
    for name in ("run", "another/deep", "third"):
        flags = ("--train_data_dir", ".", "--class_conditional", *SHORT, "--compare")
        (photos / "tiny").exists() or (tmp_path / "tiny").rename(photos / "tiny")
        monkeypatch.chdir(photos)
        train(*flags, output=name)
        told = capsys.readouterr()
        assert "data       40 images of 1 x 8 x 8 from ." in told.out and "classes    0 cats, 1 dogs" in told.out
        if name == "run":
            assert "not used" not in told.err
    assert ".: 8 of 48 image files are not used, because they are in " in told.err
    assert all(f"are in {name}/, the folder of a training run: 4" in told.err for name in ("run", "another/deep"))
    train(*flags, "--streaming", "--overwrite_output_dir", output="third")
    told = capsys.readouterr()
    assert "data       40 images of 1 x 8 x 8 from ." in told.out and "12 of 52 image files are not used" in told.err


def test_evaluate_and_diagnose_leave_them_out_alike(train, photos, capsys, monkeypatch, tmp_path):
    run = train("--train_data_dir", photos, "--regularizer", "total_variation", *SHORT, output="photos/run")
    capsys.readouterr()
    threads = torch.get_num_threads()
    flags = ["--model", str(run), "--data", str(photos), "--num_images", "20", "--num_inference_steps", "1"]
    for output in ("a", "b"):
        main(["evaluate", *flags, "--features", "pixels", "--output", str(photos / output)])
    told = capsys.readouterr().err
    assert "are in run/, the folder of a training run" in told and "are in a/, the folder of an evaluation" in told
    data = ["--train_data_dir", str(photos), "--resolution", "8", "--regularizer", "total_variation"]
    main(["diagnose", *data, "--num_levels", "2", "--output", str(tmp_path / "diagnosis")])
    assert "are in run/, the folder of a training run" in capsys.readouterr().err
    torch.set_num_threads(threads)


def test_a_run_in_the_very_folder_leaves_its_own_pictures_out(photos):
    for name in ("reg_settings.yaml", "samples/step-000001.png", "samples/mine.png", "comparison.png", "plain/x.png"):
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).write_text("")
    reason = not_data(str(photos))
    own = [photos / "samples" / "step-000001.png", photos / "comparison.png"]
    assert {reason(str(path), False) for path in own} == {"are files of a training run"}
    others = [photos / "cats", photos / "cats" / "1.png", photos / "samples", photos / "samples" / "mine.png"]
    assert {reason(str(path), path.is_dir()) for path in others} == {None}
