"""What the wheel installs, used outside the repository as a new user would: commands, sweep, Ctrl-C."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import venv
import zipfile

import numpy as np
import pytest
from runs import QUICK, ROOT, metrics

import reg_diffusers

pytestmark = [pytest.mark.training, pytest.mark.slow]

RUN = [*QUICK, *"--no-compare --max_train_steps 100000 --preview_steps 100000 --lr_scheduler constant".split()]
RUN += [*"--mixed_precision no --output_dir out --num_threads 1".split()]
DATA = [*"--train_data_dir fields.npy --model_config_name_or_path tiny".split()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source, made = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "reg_diffusers", source / "reg_diffusers", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "train_reg.py"):
        shutil.copy(ROOT / name, source)
    isolation = ["--no-build-isolation"] if has_setuptools() else []
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", *isolation, "-w", made, source]
    subprocess.run(list(map(str, build)), check=True, capture_output=True, text=True)
    (file,) = made.glob("*.whl")
    return file


def has_setuptools():
    try:
        import setuptools
    except ImportError:
        return False
    return int(setuptools.__version__.split(".")[0]) >= 77


@pytest.fixture(scope="module")
def programs(wheel, tmp_path_factory):
    """The folder of the programs of a fresh environment with the wheel; other packages are those of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", wheel]
    subprocess.run(list(map(str, pip)), check=True, capture_output=True, text=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    others = [place for place in sys.path if place.endswith("-packages")]
    (packages / "others.pth").write_text("\n".join(others) + "\n")
    return folder / "bin"


@pytest.fixture
def environment(programs, tmp_path, tiny_unet):
    """An empty home, the programs on the PATH, small data and a tiny network, and nothing of the checkout."""
    np.save(tmp_path / "fields.npy", np.random.default_rng(0).normal(size=(48, 1, 8, 8)).astype(np.float32))
    tiny_unet().save_config(tmp_path / "tiny")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "ACCELERATE"))}
    home = {"HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "home" / "hf"), "PYTHONUNBUFFERED": "1"}
    return kept | home | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}


def test_the_wheel_has_the_training_script_and_the_marker_of_its_types(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {"train_reg.py", "reg_diffusers/py.typed", "reg_diffusers/data/LICENSE.fashion-mnist"} <= set(names)
    assert not [name for name in names if name.startswith("tests")]


def test_ctrl_c_with_tee_saves_and_the_printed_command_continues_when_pasted(programs, environment, tmp_path):
    out = tmp_path / "out"
    training = subprocess.Popen(
        ["reg-diffusers", "train", *DATA, *RUN], executable=programs / "reg-diffusers",
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    tee = subprocess.Popen(
        ["tee", "log.txt"], cwd=tmp_path, env=environment, stdin=training.stdout, stdout=subprocess.DEVNULL
    )
    training.stdout.close()
    deadline = time.monotonic() + 200
    while not (out / "metrics.jsonl").is_file():
        assert training.poll() is None and time.monotonic() < deadline, training.stderr.read()
        time.sleep(0.1)
    for process in (tee, training):  # as a terminal does, to all of a pipeline
        process.send_signal(signal.SIGINT)
    error = training.stderr.read()
    assert training.wait(timeout=60) == 0, error
    tee.wait(timeout=60)
    log = (tmp_path / "log.txt").read_text()
    assert log.startswith("data  ") and "The following values were not passed" not in error
    (checkpoint,) = out.glob("checkpoint-*")
    command = re.search(r"stopped by SIGINT; continue with: (.*)", error).group(1)
    assert command.startswith("reg-diffusers train --train_data_dir fields.npy") and command.endswith("--resume auto")
    step = int(checkpoint.name.split("-")[1])
    again = subprocess.run(
        f"{command} --max_train_steps {step + 2}",
        shell=True,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert again.returncode == 0, again.stderr
    assert f"continuing from out/{checkpoint.name}" in again.stderr
    assert metrics(out)[-1]["step"] == step + 2


def test_a_sweep_needs_no_checkout_and_finds_losses_in_the_current_folder(environment, tmp_path):
    (tmp_path / "my_losses.py").write_text("def mean(x, /):\n    return x.flatten(1).mean(1) ** 2\n")
    flags = "--reg_weights 0.1 --reg_weightings matched --num_images 20 --num_inference_steps 2 --features pixels"
    training = "--max_train_steps 2 --preview_steps 100 --regularizer my_losses:mean --mixed_precision no"
    done = subprocess.run(
        ["reg-diffusers", "sweep", *flags.split(), "--", *DATA, *QUICK, *training.split()],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "sweep" / "sweep.png").is_file()
    assert "mean" in metrics(next((tmp_path / "sweep" / "runs").iterdir()))[-1]


def test_the_commands_answer_from_the_wheel(environment, tmp_path):
    def printed(*words):
        run = subprocess.run(
            ["reg-diffusers", *words], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
        )
        return run.stdout

    assert printed("--version").split()[-1] == reg_diffusers.__version__
    assert "usage: reg-diffusers train [config.yaml] [flags]" in printed("train", "--help")
    assert re.search(r"^torch +\d", printed("env"), re.MULTILINE)
