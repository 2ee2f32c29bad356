"""Which checkpoint a run goes on from: the newest of its own branch, whatever else lies there."""

import hashlib
import json
import os
import random
import shutil
from dataclasses import replace

import pytest
import torch
from runs import FLAGS, checkpoints, cut, finished, flip_a_bit, metrics, refusal, resumed

from reg_diffusers.runs import manifest
from reg_diffusers.runs.lineage import find_checkpoint
from reg_diffusers.runtime.errors import UsageError
from reg_diffusers.settings import OptimizationSettings, OutputSettings
from reg_diffusers.training.settings import check_settings

pytestmark = pytest.mark.reliability

CONSTANT = ("--lr_scheduler", "constant", "--checkpointing_steps", 4)


def steps_and_runs(folder):
    content = manifest.read_manifest(folder)
    return content["step"], content["run"], [(entry["step"], entry["run"]) for entry in content["resumed_from"]]


def test_a_branch_that_is_left_is_set_aside_and_auto_goes_on_with_the_other(train, capsys):
    out = train(*CONSTANT, "--max_train_steps", 12, "--preview_steps", 4)
    first = steps_and_runs(out / "checkpoint-12")[1]
    changed, limit = ("--learning_rate", 1e-3, "--allow_changed_settings"), ("--checkpoints_total_limit", 1)
    last, log = (out / "checkpoint-12" / "model.safetensors").read_bytes(), metrics(out)
    start = ("--resume_from_checkpoint", "checkpoint-4")
    train(*CONSTANT, "--max_train_steps", 8, *start, *changed, *limit)
    told = capsys.readouterr().err
    for step in (8, 12):
        line = f"out/checkpoint-{step} is not on the branch of checkpoint-4: renamed to"
        assert told.count(f"{line} abandoned-checkpoint-{step}") == 1
    # The limit of 1 keeps what was just saved, and touches nothing of the other branch.
    assert checkpoints(out) == ["abandoned-checkpoint-12", "abandoned-checkpoint-8", "checkpoint-8"]
    assert (out / "abandoned-checkpoint-12" / "model.safetensors").read_bytes() == last
    shown = sorted(path.name for path in (out / "samples").iterdir())
    assert shown == ["abandoned-step-000008.png", "abandoned-step-000012.png", "step-000004.png", "step-000008.png"]

    train(*CONSTANT, "--max_train_steps", 12, "--resume", "auto", *changed, *limit)
    assert "continuing from out/checkpoint-8" in capsys.readouterr().err
    step, run, before = steps_and_runs(out / "checkpoint-12")
    second = before[1][1]
    assert step == 12 and before == [(4, first), (8, second)] and len({run, first, second}) == 3
    assert checkpoints(out) == ["abandoned-checkpoint-12", "abandoned-checkpoint-8", "checkpoint-12"]
    names = [entry["checkpoint"] for entry in manifest.read_manifest(out / "checkpoint-12")["resumed_from"]]
    assert names == ["checkpoint-4", "checkpoint-8"] and metrics(out) != log

    # And back: the branch that was set aside has its name and its log again.
    train(*CONSTANT, "--max_train_steps", 12, "--resume_from_checkpoint", "abandoned-checkpoint-12", *limit)
    assert checkpoints(out) == ["abandoned-checkpoint-12-2", "abandoned-checkpoint-8", "checkpoint-12"]
    assert (out / "checkpoint-12" / "model.safetensors").read_bytes() == last and metrics(out) == log
    assert manifest.damage(out / "checkpoint-12") is None and manifest.damage(out / "abandoned-checkpoint-8") is None


def test_the_plain_model_of_a_comparison_goes_back_as_far(train):
    flags = ("--lr_scheduler", "constant", "--checkpointing_steps", 2, "--compare")
    out = train(*flags, "--max_train_steps", 6)
    before = {path.name for path in (out / "plain").glob("checkpoint-*")}
    assert before == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}
    changed = ("--learning_rate", 1e-30, "--allow_changed_settings")
    train(*flags, "--max_train_steps", 5, "--resume_from_checkpoint", "checkpoint-4", *changed)
    assert checkpoints(out / "plain") == ["abandoned-checkpoint-6", "checkpoint-2", "checkpoint-4"]
    assert metrics(out / "plain")[-1]["lr"] < 1e-29 and metrics(out / "plain")[-1]["step"] == 5


def test_a_limit_never_deletes_what_was_just_saved(train):
    out = cut(train)
    os.truncate(out / "checkpoint-6" / "optimizer.bin", 9)  # so that checkpoint-3 is gone on from
    train(
        *("--max_train_steps", 9, "--checkpointing_steps", 5, "--checkpoints_total_limit", 1, "--resume", "auto"),
        *("--max_train_time", "1d"),
    )
    assert checkpoints(out) == ["checkpoint-5", "checkpoint-6"]


def test_checkpoints_of_an_older_version_go_by_their_steps(train):
    out = finished(train)
    for folder in out.glob("checkpoint-*"):
        content = json.loads((folder / "manifest.json").read_text())
        for name in ("run", "resumed_from", "sha256"):
            del content[name]
        (folder / "manifest.json").write_text(json.dumps(content))
    train(*FLAGS, "--resume_from_checkpoint", "checkpoint-6")
    assert checkpoints(out) == ["abandoned-checkpoint-9", "checkpoint-3", "checkpoint-6", "checkpoint-9"]


def test_what_was_set_aside_is_never_replaced(train, tmp_path):
    out = finished(train)
    content = (out / "checkpoint-9" / "model.safetensors").read_bytes()
    for _ in range(2):
        train(*FLAGS, "--resume_from_checkpoint", "checkpoint-6")
    assert checkpoints(out) == [
        *("abandoned-checkpoint-9", "abandoned-checkpoint-9-2", "checkpoint-3", "checkpoint-6", "checkpoint-9")
    ]
    assert (out / "abandoned-checkpoint-9" / "model.safetensors").read_bytes() == content


# The manifest


def test_no_flipped_bit_of_a_manifest_stops_a_run(train, tmp_path, capsys):
    """Each leaves the checkpoint as it was, or makes it a damaged one: then the one before is taken."""
    out = cut(train)
    settings = OutputSettings(output_dir=str(out), resume_from_checkpoint="auto")
    path = out / "checkpoint-6" / "manifest.json"
    content, generator, found = path.read_bytes(), random.Random(0), []
    wanted = manifest.read_manifest(out / "checkpoint-6")
    for _ in range(400):
        changed = bytearray(content)
        changed[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(changed)
        found.append(find_checkpoint(settings, out).name)
        if found[-1] == "checkpoint-6":
            read = manifest.read_manifest(out / "checkpoint-6")
            assert {name: read[name] for name in wanted} == wanted
    assert found.count("checkpoint-3") > 380 and set(found) <= {"checkpoint-3", "checkpoint-6"}
    # A setting that reads as another one stopped the run, as if the user had changed it.
    path.write_bytes(content.replace(b'"--train_batch_size": 8', b'"--train_batch_size": 9'))
    capsys.readouterr()
    resumed(train)
    assert "checkpoint-6, which is damaged: the content of its manifest.json has changed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        *("[]", "null", "1", "{}", "[" * 100_000, '{"step": 6, "files": {}, "settings": {}}'),
        '{"step": "6", "files": {"a": {"size": 1}}, "settings": {}}',
        '{"step": 6, "files": {"a": 1}, "settings": {}}',
        '{"step": 6, "files": [], "settings": {}}',
        '{"step": 6, "files": {"model.safetensors": null}}',
    ],
)
def test_a_manifest_of_another_form_is_a_damaged_one(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    (tmp_path / "model.safetensors").write_text("x")
    assert "manifest.json cannot be read" in manifest.damage(tmp_path)


def test_folders_that_are_no_checkpoints_are_passed_over(train, capsys):
    out = cut(train)
    for name in ("checkpoint-", "checkpoint-²", "checkpoint-x", "checkpoint-10.bak", "checkpoint-11", "checkpoint--1"):
        (out / name).mkdir()
    (out / "checkpoint-12").write_text("a file")
    resumed(train, "--checkpoints_total_limit", 1)
    assert "continuing from out/checkpoint-6" in capsys.readouterr().err
    assert {path.name for path in out.glob("checkpoint-?")} == {"checkpoint-9", "checkpoint-²", "checkpoint-x"}


def change(folder, name, content):
    """Replaces a file of a checkpoint, and writes its sum, so that only its content is wrong."""
    (folder / name).write_bytes(content)
    listed = json.loads((folder / "manifest.json").read_text())
    listed["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    del listed["sha256"]
    (folder / "manifest.json").write_text(json.dumps(listed))


def test_random_states_that_cannot_be_read_and_strange_files_are_damage(train, tmp_path):
    folder = cut(train) / "checkpoint-6"
    whole = tmp_path / "whole"
    shutil.copytree(folder, whole)

    def said(name, content):
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)
        change(folder, name, content)
        return manifest.damage(folder)

    assert manifest.damage(folder) is None
    assert said("random_states_0.pkl", b"nonsense") == "random_states_0.pkl cannot be read (UnpicklingError)"
    torch.save({"step": 6}, tmp_path / "states")
    states = (tmp_path / "states").read_bytes()
    assert said("random_states_0.pkl", states) == "random_states_0.pkl lacks random states"
    shutil.rmtree(folder)
    shutil.copytree(whole, folder)
    (folder / "notes.txt").write_text("mine")
    assert manifest.damage(folder) is None
    (folder / "custom_checkpoint_0.pkl").write_text("not of it")  # accelerate would count it, and stop
    assert manifest.damage(folder) == "custom_checkpoint_0.pkl does not belong to it: move that file away"
    resumed(train)  # from checkpoint-3
    assert (folder / "manifest.json").is_file() and not (folder / "custom_checkpoint_0.pkl").exists()
    assert (folder.with_name("abandoned-checkpoint-6") / "notes.txt").read_text() == "mine"


def test_settings_are_compared_with_those_of_the_checkpoint_that_is_taken(train, capsys):
    """The newest is damaged: the one before counts, of other settings."""
    out = train(*CONSTANT, "--max_train_steps", 4)
    changed = ("--learning_rate", 1e-3)
    train(*CONSTANT, "--max_train_steps", 8, *changed, "--resume", "auto", "--allow_changed_settings")
    flip_a_bit(out / "checkpoint-8" / "optimizer.bin")
    error = refusal(train, capsys, *CONSTANT, "--max_train_steps", 8, *changed, "--resume", "auto")
    assert "out/checkpoint-4 was trained with other settings: --learning_rate 0.002 -> 0.001" in error


def saved_by_two_processes(folder, **more):
    """Makes a checkpoint that of 2 processes with the half of the batch each, and of more settings."""
    listed = json.loads((folder / "manifest.json").read_text())
    listed["settings"] |= {"processes": 2, **more}
    del listed["sha256"]
    (folder / "manifest.json").write_text(json.dumps(listed))


def test_another_number_of_processes_continues_with_a_line(train, capsys):
    saved_by_two_processes(cut(train) / "checkpoint-6")
    resumed(train)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "2 -> 1 processes" in line]
    assert "--resume auto: 2 -> 1 processes, 16 -> 8 images in a step: the noise from here on is new" in line


def test_another_number_of_processes_needs_a_length_in_steps_and_a_table(train):
    folder = cut(train) / "checkpoint-6"
    now = json.loads((folder / "manifest.json").read_text())["settings"]
    saved_by_two_processes(folder)
    output = OutputSettings(output_dir="out", resume_from_checkpoint="auto")
    epochs = OptimizationSettings(num_epochs=3, train_batch_size=8)
    # 6 steps of 2 x 8 images are 12 batches of 8; in 3 epochs of 20 there are 48 more
    wanted = "the steps of an epoch change: give the length by --max_train_steps, 54 for --num_epochs 3"
    with pytest.raises(UsageError, match=wanted):
        check_settings(output, epochs, now, 20)
    stream = "2 -> 1 processes: out/checkpoint-6 has the place of each process in the stream, .*: launch 2"
    with pytest.raises(UsageError, match=stream):
        check_settings(output, replace(epochs, max_train_steps=9), {**now, "--streaming": True}, 20)


def test_sharded_and_whole_weights_are_not_mixed(train, capsys):
    folder = cut(train) / "checkpoint-6"
    (folder / "part.distcp").write_bytes(b"")
    listed = json.loads((folder / "manifest.json").read_text())
    del listed["sha256"]
    listed["files"]["part.distcp"] = {"size": 0, "sha256": hashlib.sha256().hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(listed))
    error = refusal(train, capsys, *FLAGS, "--resume", "auto")
    assert "out/checkpoint-6 holds sharded weights, which these processes do not: launch at least 2" in error


# Links


def test_a_checkpoint_that_is_a_link_is_read_and_what_it_leads_to_stays(train, tmp_path):
    out = cut(train)
    (out / "checkpoint-6").rename(tmp_path / "elsewhere")
    (out / "checkpoint-6").symlink_to(tmp_path / "elsewhere")
    whole = sorted(path.name for path in (tmp_path / "elsewhere").iterdir())
    resumed(train, "--checkpoints_total_limit", 1)
    assert checkpoints(out) == ["checkpoint-9"]
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == whole
    (out / "checkpoint-12").symlink_to(tmp_path / "elsewhere")
    train("--max_train_steps", 1, "--overwrite_output_dir")
    assert checkpoints(out) == [] and sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == whole


def test_lines_of_a_log_that_cannot_be_read_are_left_out_and_counted(train, capsys):
    out = cut(train)
    path = out / "metrics.jsonl"
    lines = [b'{"step": 2, "loss": 1.0}', b'{"step": 3, "lo', b"\xff\xfe\x00", b"[]", b'{"loss": 1}', b'{"step": "4"}']
    path.write_bytes(b"\n".join([*lines, b'{"step": 5, "loss": 1']))
    capsys.readouterr()
    resumed(train)
    assert "out/metrics.jsonl: 5 lines cannot be read and are removed" in capsys.readouterr().err
    assert [line["step"] for line in metrics(out)] == [2, 9]
