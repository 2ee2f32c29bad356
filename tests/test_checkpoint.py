"""Checkpoints: whole or not there, verified, refused for other mathematics; resumed runs end as undisturbed ones."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import FLAGS, QUICK, ROOT, checkpoints, cut, differ, finished, flip_a_bit, metrics, refusal, resumed, weights
from safetensors.torch import load_file

from reg_diffusers.runs import lineage, manifest

pytestmark = pytest.mark.reliability


@pytest.fixture
def undisturbed(train):
    return finished(train, "undisturbed")


# What a checkpoint is


def test_a_checkpoint_lists_its_files_and_settings(undisturbed):
    folder = undisturbed / "checkpoint-3"
    found = json.loads((folder / "manifest.json").read_text())
    on_disk = {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert found["step"] == 3 and set(found["files"]) == on_disk
    assert all(found["files"][name]["size"] == (folder / name).stat().st_size for name in on_disk)
    assert found["settings"]["--reg_weight"] == [0.2] and found["settings"]["processes"] == 1
    assert "hub_token" not in json.dumps(found)


def test_where_it_is_and_how_to_go_on_is_told(train, capsys):
    train("--max_train_steps", 3, "--checkpointing_steps", 2, "--hub_token", "hf_secret")
    told = capsys.readouterr().out
    assert "saved out/checkpoint-2; continue with: accelerate launch train_reg.py" in told
    assert "--max_train_steps 3" in told and told.count("--resume auto") == 1 and "hf_secret" not in told


def test_the_oldest_are_deleted_beyond_the_limit(train):
    assert checkpoints(train(*FLAGS, "--checkpoints_total_limit", 2)) == ["checkpoint-6", "checkpoint-9"]


# Resuming


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--gradient_accumulation_steps 2 --random_flip",
        "--dataloader_num_workers 2",
        "--prediction_type flow_prediction --no-use_ema --snr_gamma 5",
        "--reg_weighting constant --reg_estimator monte_carlo(2)",
        "--reg_weighting constant --reg_estimator ddim(1)",
        "--reg_weighting constant --reg_weight auto:0.1 --reg_schedule warmup(5)*every(2)",
    ],
)
def test_a_resumed_run_leaves_what_an_undisturbed_one_leaves(train, flags):
    part = train(*FLAGS, *flags.split(), output="part")
    whole = shutil.copytree(part, part.with_name("whole"))
    shutil.rmtree(part / "checkpoint-9")
    shutil.rmtree(part / "unet")
    resumed(train, *flags.split(), output="part")
    assert not differ(weights(whole), weights(part)) and metrics(whole) == metrics(part)
    for name in json.loads((whole / "checkpoint-9" / "manifest.json").read_text())["files"]:
        assert (whole / "checkpoint-9" / name).read_bytes() == (part / "checkpoint-9" / name).read_bytes(), name


def test_sums_of_metrics_survive_between_two_lines_of_the_log(train):
    flags = ("--max_train_steps", 20, "--checkpoints_total_limit", 0, "--checkpointing_steps", 4)
    part = train(*flags, output="part")
    whole = shutil.copytree(part, part.with_name("whole"))
    for step in (8, 12, 16, 20):
        shutil.rmtree(part / f"checkpoint-{step}")
    train(*flags, "--resume_from_checkpoint", "latest", output="part")
    assert [line["step"] for line in metrics(part)] == [10, 20] and metrics(part) == metrics(whole)


def test_auto_starts_a_run_and_goes_on_with_it(train, capsys):
    first = resumed(train)
    before = weights(first)
    assert "continuing from" not in capsys.readouterr().err
    resumed(train)
    assert "continuing from out/checkpoint-9" in capsys.readouterr().err
    assert not differ(before, weights(first))


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda folder: os.truncate(folder / "optimizer.bin", 100), "optimizer.bin has 100 bytes instead of"),
        (lambda folder: flip_a_bit(folder / "model.safetensors"), "the content of model.safetensors has changed"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json cannot be read (FileNotFoundError)"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text('{"files": {"../x": {}}}'), "names a file outside"),
    ],
)
def test_a_damaged_one_is_named_and_left_out(train, undisturbed, capsys, damage, said):
    folder = cut(train)
    damage(folder / "checkpoint-6")
    resumed(train)
    told = capsys.readouterr().err
    assert "skipping out/checkpoint-6, which is damaged: " in told and said in told
    assert "continuing from out/checkpoint-3: 3 steps are lost" in told
    assert not differ(weights(undisturbed), weights(folder)) and metrics(undisturbed) == metrics(folder)
    assert checkpoints(folder) == ["checkpoint-3", "checkpoint-6", "checkpoint-9"]
    wanted, found = (manifest.read_manifest(out / "checkpoint-6") for out in (undisturbed, folder))
    assert {**found, "run": wanted["run"], "resumed_from": []} == wanted
    assert [(entry["step"], entry["checkpoint"]) for entry in found["resumed_from"]] == [(3, "checkpoint-3")]


def test_a_half_written_one_is_told_and_written_anew(train, undisturbed, capsys):
    folder = cut(train)
    shutil.copytree(folder / "checkpoint-6", folder / ".checkpoint-9")
    (folder / ".checkpoint-9" / "left_over.bin").write_bytes(b"0")
    resumed(train)
    assert "skipping checkpoint-9: it was incomplete when the run ended" in capsys.readouterr().err
    assert checkpoints(folder) == ["checkpoint-3", "checkpoint-6", "checkpoint-9"]
    assert not (folder / "checkpoint-9" / "left_over.bin").exists()
    assert not differ(weights(undisturbed), weights(folder))


def test_a_damaged_one_that_is_named_or_the_only_one_is_refused(train, capsys):
    folder = cut(train)
    os.truncate(folder / "checkpoint-3" / "model.safetensors", 8)
    flags = (*FLAGS, "--resume_from_checkpoint", "checkpoint-3")
    assert "out/checkpoint-3: model.safetensors has 8 bytes" in refusal(train, capsys, *flags)
    shutil.rmtree(folder / "checkpoint-6")
    assert "no checkpoint in out is intact" in refusal(train, capsys, *FLAGS, "--resume", "auto")
    assert not (folder / "unet").exists()


# Other settings


def test_other_mathematics_is_refused_with_its_differences(train, capsys, tmp_path):
    folder = cut(train)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    changed = ("--reg_weight", 0.3, "--train_batch_size", 4, "--seed", 1, "--learning_rate", 1e-4)
    error = refusal(train, capsys, *FLAGS, "--resume", "auto", *changed)
    assert (
        "--reg_weight 0.2 -> 0.3, --seed 0 -> 1, --train_batch_size 8 -> 4, --learning_rate 0.002 -> 0.0001" in error
    )
    assert "--allow_changed_settings" in error
    error = refusal(train, capsys, "--resume_from_checkpoint", "latest", "--max_train_steps", 12, "--seed", 1)
    assert "--max_train_steps 9 -> 12" in error and "--resume_from_checkpoint latest: out/checkpoint-" in error
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_flag_that_an_earlier_version_did_not_have_changes_nothing_while_it_is_off(train):
    folder = cut(train) / "checkpoint-6"
    settings = manifest.read_manifest(folder)["settings"]
    assert lineage.changed_settings(folder, settings | {"--new": False, "--newer": None}) == []
    assert lineage.changed_settings(folder, settings | {"--new": 3}) == ["--new None -> 3"]
    assert lineage.changed_settings(folder, settings | {"--new": ["a", "b"]}) == ["--new None -> a b"]
    settings["--regularizer"] = []
    assert lineage.changed_settings(folder, settings) == ["--regularizer near_background -> none"]


def test_what_is_no_mathematics_may_change(train, undisturbed, tmp_path):
    folder = cut(train)
    flags = ("--preview_steps", 2, "--eval_batch_size", 2, "--dataloader_num_workers", 1, "--checkpointing_steps", 4)
    resumed(train, *flags)
    assert not differ(weights(undisturbed), weights(folder))


def test_a_run_may_be_made_longer_and_says_where_its_learning_rate_decays(train, capsys):
    cosine = ("--checkpointing_steps", 3)
    part = train(*cosine, "--max_train_steps", 6, output="part")
    capsys.readouterr()
    train(*cosine, "--max_train_steps", 9, "--resume", "auto", output="part")
    told = capsys.readouterr().err
    assert "--max_train_steps 6 -> 9: from here on the learning rate follows --lr_scheduler cosine" in told
    assert (part / "checkpoint-9").is_dir()


def test_with_constant_learning_rate_a_run_may_be_made_longer(train):
    constant = ("--lr_scheduler", "constant", "--checkpointing_steps", 3)
    whole = train(*constant, "--max_train_steps", 9, output="whole")
    part = train(*constant, "--max_train_steps", 6, output="part")
    train(*constant, "--max_train_steps", 9, "--resume", "auto", output="part")
    assert not differ(weights(whole), weights(part))


def test_changed_settings_that_are_allowed_take_effect(train):
    folder = cut(train)
    resumed(train, "--allow_changed_settings", "--learning_rate", 1e-30, "--adam_weight_decay", 0, "--no-use_ema")
    before = load_file(folder / "checkpoint-6" / "model.safetensors")
    assert not differ(before, load_file(folder / "checkpoint-9" / "model.safetensors"))
    assert metrics(folder)[-1]["lr"] < 1e-29


# Faults while saving


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of its own, with so many bytes."""
    mounted = []

    def build(size):
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("file systems cannot be mounted here")
        mounted.append(folder)
        return folder

    yield build
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(train, small_disk, capsys, tmp_path):
    disk = small_disk("2m")
    flags = ("--max_train_steps", 9, "--checkpointing_steps", 1, "--preview_steps", 100)
    error = refusal(train, capsys, *flags, output="disk/out")
    assert "cannot be saved" in error and "free disk space" in error and "MiB free" in error
    kept = checkpoints(disk / "out")
    assert kept and f"continue from disk/out/{kept[-1]} by --resume auto" in error
    shutil.copytree(disk / "out", tmp_path / "out")
    train(*flags, "--resume", "auto")
    whole = train(*flags, output="whole")
    assert not differ(weights(whole), weights(tmp_path / "out"))


def test_a_full_disk_at_the_end_leaves_the_pipeline_before(train, small_disk, capsys, tmp_path):
    whole = train("--max_train_steps", 2, "--no-use_ema")
    disk = small_disk("1m")
    shutil.copytree(whole, disk / "out")
    filler = disk / "filler"
    free = shutil.disk_usage(disk).free
    filler.write_bytes(bytes(free - 20_000))
    flags = ("--max_train_steps", 3, "--no-use_ema", "--overwrite_output_dir", "--resume_from_checkpoint", "latest")
    error = refusal(train, capsys, *flags, output="disk/out")
    assert "space left on device" in error.lower()
    assert not differ(weights(whole), weights(disk / "out"))


# Killed


def start(tmp_path, *flags):
    flags = [*QUICK, "--no-compare", "--model_config_name_or_path", "tiny", "--output_dir", "out", *map(str, flags)]
    log = (tmp_path / "log.txt").open("w")
    command = [sys.executable, str(ROOT / "train_reg.py"), *flags]
    return subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True)


@pytest.mark.slow
def test_killed_while_it_saves_and_started_again_it_ends_the_same(train, tmp_path):
    flags = ("--max_train_steps", 12, "--checkpointing_steps", 2, "--mixed_precision", "no", "--resume", "auto")
    whole = train(*flags, output="whole")
    process = start(tmp_path, *flags, "--max_train_steps", 12)
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / ".checkpoint-4").exists() and time.monotonic() < deadline:
        assert process.poll() is None, (tmp_path / "log.txt").read_text()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert checkpoints(tmp_path / "out")[-1] != "checkpoint-12"
    train(*flags)
    assert not differ(weights(whole), weights(tmp_path / "out"))
    assert metrics(whole) == metrics(tmp_path / "out")


@pytest.mark.slow
def test_runs_that_are_killed_at_random_end_as_undisturbed_ones():
    """The short form of what docs/reliability shows."""
    script = ROOT / "docs" / "benchmarks" / "random_kills.py"
    done = subprocess.run([sys.executable, script, "--kills", "3", "--keep"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# Safety


class Malice:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl", "progress.bin", "ema.bin"])
def test_code_in_a_checkpoint_is_never_run(train, tmp_path, name):
    folder = cut(train) / "checkpoint-6"
    torch.save(Malice(), folder / name)
    listed = json.loads((folder / "manifest.json").read_text())
    content = (folder / name).read_bytes()
    listed["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    del listed["sha256"]  # as an older version wrote it
    (folder / "manifest.json").write_text(json.dumps(listed))
    with contextlib.suppress(SystemExit, Exception):
        resumed(train)
    assert not (tmp_path / "executed").exists()
