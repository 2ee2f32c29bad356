"""The folder of a run: --overwrite_output_dir deletes what a run leaves and nothing else; no path leads out of it."""

import os
import shutil
from fnmatch import fnmatch

import pytest
import yaml
from runs import refusal

from reg_diffusers.runs.run_folder import TABLE, evidence_patterns, files_left, obstacle, private_patterns

pytestmark = pytest.mark.reliability

SHORT = ("--max_train_steps", 2, "--checkpointing_steps", 1)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("kept") / "out"


@pytest.fixture
def run(train, kept):
    """A run that left one of everything: a copy of one and the same."""
    if not kept.is_dir():
        held_out = ("--validation_split", 0.002, "--validation_steps", 2, "--keep_best")
        out = train(*SHORT, *held_out, "--compare", "--logger", "tensorboard", "--logging_dir", "a/b", "--profile", 1)
        (out / "bad_steps.jsonl").write_text('{"step": 1}\n')
        shutil.copytree(out, kept)
    return shutil.copytree(kept, train.folder / "out", dirs_exist_ok=True)


def test_the_table_knows_every_file_of_a_run(run):
    known = set(files_left(run, lambda left: True, "a/b"))
    assert known == {path for path in run.rglob("*") if path.is_file()}
    assert {left.name for left in TABLE} - {""} >= {"pipeline", "samples", "metrics", "settings", "plain model"}


def test_overwriting_deletes_what_the_run_left_and_nothing_else(run, train, capsys):
    made = set(contents(run))
    own = "notes.txt samples/notes.txt samples/best.png samples/step-2-mine.png unet/notes.txt unet/config.json.bak"
    own += " plain/notes.txt plain/unet/notes.txt profile/notes.txt a/notes.txt a/b/notes.txt a/b/train_reg/notes.txt"
    own += " checkpoint-1/notes.txt checkpoint-2-good/model.safetensors scheduler/mine/scheduler_config.json"
    own += " model.safetensors logs/events.out.tfevents.1"
    for name in own.split():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)
    (run / "README.md").write_text("Mine.\n")
    (run / "samples" / ".step-000009.77.png").write_text("half written")
    (run / ".checkpoint-3").mkdir()
    (run / ".checkpoint-3" / "model.safetensors").write_text("half written")
    (run / "samples" / "linked.png").symlink_to(run / "notes.txt")
    train("--max_train_steps", 1, "--checkpointing_steps", 5, "--overwrite_output_dir")
    left = contents(run)
    assert {name: left.pop(name).decode() for name in own.split()} == {name: name for name in own.split()}
    assert os.readlink(run / "samples" / "linked.png") == str(run / "notes.txt")
    del left["samples/linked.png"]
    assert left.pop("README.md").decode().startswith("---") and "Mine." in (run / "README.md").read_text()
    rewritten = {"model_index.json", "pipeline.py", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"}
    rewritten |= {"scheduler/scheduler_config.json", "samples/step-000001.png", "metrics.jsonl"}
    assert set(left) == rewritten | {"reg_config.json", "reg_settings.yaml"} and made - set(left)
    said = next(line for line in capsys.readouterr().err.splitlines() if "deletes the files of a run only" in line)
    assert "out keeps a, checkpoint-1, checkpoint-2-good, logs, model.safetensors, notes.txt, plain" in said


@pytest.mark.parametrize("name", ["/elsewhere", "..", "a/../..", "logs/.."])
def test_a_logging_folder_elsewhere_is_refused_and_nothing_deleted(train, capsys, tmp_path, name):
    out = train("--max_train_steps", 1)
    before = contents(tmp_path)
    for flags in (("--logging_dir", name), (f"--logging_dir={name}", "--overwrite_output_dir")):
        error = refusal(train, capsys, "--max_train_steps", 1, *flags)
        assert f"--logging_dir: {name!r} leaves --output_dir: name a folder in it" in error
    settings = yaml.safe_load((out / "reg_settings.yaml").read_text()) | {"logging_dir": name}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit) as stopped:
        train.script.main([str(tmp_path / "mine.yaml"), "--overwrite_output_dir"])
    assert stopped.value.code == 2 and "--logging_dir" in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "mine.yaml").unlink()
    assert contents(tmp_path) == before


def test_what_an_earlier_run_logged_elsewhere_stays(train, tmp_path):
    """Settings of an older version, which took such a folder."""
    out = train("--max_train_steps", 1, "--logging_dir", ".")
    events = tmp_path / "theirs" / "train_reg" / "events.out.tfevents.1"
    events.parent.mkdir(parents=True)
    events.write_text("theirs")
    for name in (str(tmp_path / "theirs"), "../theirs", 3, None):
        settings = yaml.safe_load((out / "reg_settings.yaml").read_text()) | {"logging_dir": name}
        (out / "reg_settings.yaml").write_text(yaml.safe_dump(settings))
        train("--max_train_steps", 1, "--overwrite_output_dir")
        assert events.read_text() == "theirs"


def test_the_output_folder_itself_as_logging_folder(train):
    out = train("--max_train_steps", 1, "--logger", "tensorboard", "--logging_dir", ".")
    (out / "notes.txt").write_text("mine")
    first = next((out / "train_reg").glob("events.out.tfevents.*"))
    train("--max_train_steps", 1, "--overwrite_output_dir")
    assert (out / "notes.txt").read_text() == "mine" and not first.exists() and not first.parent.exists()


@pytest.mark.parametrize("name", ["samples", "unet", "scheduler", "plain", "logs", "profile", "metrics.jsonl"])
def test_a_link_out_of_the_folder_or_a_file_in_the_way_is_one_line(train, capsys, tmp_path, name):
    out = tmp_path / "out"
    out.mkdir()
    (out / "reg_settings.yaml").write_text("{}")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "step-000001.png").write_text("theirs")
    (out / name).symlink_to(tmp_path / "theirs")
    before = contents(tmp_path)
    for flags in (("--overwrite_output_dir",), ("--resume", "auto")):
        error = refusal(train, capsys, "--max_train_steps", 1, *flags)
        assert (
            f"--output_dir out: out/{name} is a link out of the folder, and writing would follow it: remove" in error
        )
    (out / name).unlink()
    if "." in name:
        (out / name).mkdir()
        kind = "folder, but a run needs a file there"
    else:
        (out / name).write_text("mine")
        before[f"out/{name}"] = b"mine"
        kind = "file, but a run needs a folder there"
    error = refusal(train, capsys, "--max_train_steps", 1, "--overwrite_output_dir")
    assert f"--output_dir out: out/{name} is a {kind}: move it" in error
    assert contents(tmp_path) == before


def test_a_folder_that_is_a_link_itself_is_a_folder(train, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    train("--max_train_steps", 1)
    train("--max_train_steps", 1, "--overwrite_output_dir")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "model_index.json").is_file()
    assert obstacle(tmp_path / "out") is None


def test_a_refusal_of_the_hub_deletes_no_earlier_run(train, capsys, monkeypatch):
    from reg_diffusers.runtime.errors import UsageError

    out = train("--max_train_steps", 1)
    before = contents(out)

    def refuse(*_, **__):
        raise UsageError("the repository is public")

    monkeypatch.setattr("reg_diffusers.training.opening.check_upload", lambda *_: "me/mine")
    monkeypatch.setattr("reg_diffusers.training.opening.Uploads", refuse)
    refusal(train, capsys, "--max_train_steps", 1, "--overwrite_output_dir", "--push_to_hub")
    assert contents(out) == before


def test_the_folder_of_a_plain_model_belongs_to_one_run(train, capsys):
    out = train("--max_train_steps", 1)
    assert "holds the plain model of the run in" in refusal(train, capsys, "--max_train_steps", 1, output="out/plain")
    (out / "plain").mkdir()
    (out / "plain" / "reg_settings.yaml").write_text("{}")
    error = refusal(train, capsys, "--max_train_steps", 1, "--overwrite_output_dir", "--compare")
    assert "out/plain is the folder of another run" in error


def test_uploads_read_the_same_table(run):
    private = private_patterns("a/b")
    uploaded = {
        path
        for path in (file.relative_to(run).as_posix() for file in run.rglob("*") if file.is_file())
        if not any(fnmatch(path, pattern) for pattern in private)
    }
    assert uploaded == {file.relative_to(run).as_posix() for file in files_left(run, lambda left: left.uploaded)}
    assert all(any(fnmatch(path, pattern) for path in uploaded) for pattern in evidence_patterns())
    assert all(not fnmatch("train_reg/x", pattern) for pattern in private)
    assert any(fnmatch("train_reg/x", pattern) for pattern in private_patterns("."))
