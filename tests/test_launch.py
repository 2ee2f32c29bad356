"""The commands that a run prints are the command as it was started."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState

from reg_diffusers.cli import main
from reg_diffusers.runtime.child import run_to_its_end
from reg_diffusers.runtime.launch import STARTED_AS, launch_command, resume_command, start_command

pytestmark = pytest.mark.reliability

FLAGS = ["--output_dir", "my run", "--hub_token", "hf_secret", "--resume_from_checkpoint", "latest"]
PYTHON = sys.executable


@pytest.fixture
def state():
    for known in (AcceleratorState, PartialState, GradientState):
        known._reset_state()
    return PartialState(cpu=True)


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Programs on the PATH, and one beside it."""
    for place in ("bin/reg-diffusers", "bin/accelerate", "bin/python", "elsewhere/reg-diffusers"):
        path = tmp_path / place
        path.parent.mkdir(exist_ok=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start_as(monkeypatch, *words, own=None):
    monkeypatch.setattr(sys, "orig_argv", [*map(str, words), *FLAGS])
    monkeypatch.setattr(sys, "argv", [str(word) for word in own or words[1:]] + FLAGS)


@pytest.mark.parametrize(
    "words, printed",
    [
        ((PYTHON, "{}/bin/reg-diffusers", "train"), "reg-diffusers train"),
        ((PYTHON, "elsewhere/reg-diffusers", "train"), "elsewhere/reg-diffusers train"),
        (("python", "train_reg.py"), "python train_reg.py"),
        (("{}/bin/python", "-u", "scripts/my_train.py"), "python -u scripts/my_train.py"),
        ((".venv/bin/python", "-m", "train_reg"), ".venv/bin/python -m train_reg"),
        (("python", "-m", "reg_diffusers", "train"), "python -m reg_diffusers train"),
    ],
)
def test_the_command_that_was_typed_is_printed(programs, monkeypatch, state, words, printed):
    words = [word.format(programs) for word in words]
    subcommand = words[-1:] if words[-1] == "train" else []
    start_as(monkeypatch, *words, own=["a program", *subcommand])
    assert start_command(FLAGS, state) == f"{printed} --output_dir 'my run' --resume_from_checkpoint latest"
    assert resume_command(FLAGS, state) == f"{printed} --output_dir 'my run' --resume auto"


def test_the_words_of_a_launcher_come_first(programs, monkeypatch, state):
    class Parent:
        def __init__(self, _):
            pass

        def cmdline(self):
            return [PYTHON, f"{programs}/bin/accelerate", "launch", "--num_processes", "1", "train_reg.py", *FLAGS]

    monkeypatch.setattr(psutil, "Process", Parent)
    start_as(monkeypatch, PYTHON, "train_reg.py")
    printed = "accelerate launch --num_processes 1 train_reg.py --output_dir 'my run' --resume auto"
    assert resume_command(FLAGS, state) == printed
    monkeypatch.setenv(STARTED_AS, "reg-diffusers train")  # which started the launcher
    assert resume_command(FLAGS, state) == "reg-diffusers train --output_dir 'my run' --resume auto"


def test_a_training_called_from_python_gets_a_command_that_runs_anywhere(monkeypatch, state):
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    monkeypatch.setattr(sys, "orig_argv", [PYTHON, "-m", "ipykernel_launcher", "-f", "kernel.json"])
    for flags in ([], FLAGS):
        assert resume_command(flags, state).startswith("reg-diffusers train ")
        assert launch_command(flags, state).startswith("reg-diffusers train")


def test_the_status_of_a_command_is_returned():
    assert run_to_its_end([PYTHON, "-c", "raise SystemExit(3)"]) == 3


def test_signals_go_to_the_training_once_and_not_to_its_launcher(tmp_path):
    """The launcher would abandon its process; the training saves, and the launcher ends with it."""
    training = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (open('received', 'a').write('x'), sys.exit(7)))\n"
        "pathlib.Path('ready').touch()\ntime.sleep(60)\n"
    )
    launcher = "import subprocess, sys\nsys.exit(subprocess.Popen([sys.executable, 'training.py']).wait())\n"
    waits = (
        "import sys\nfrom reg_diffusers.runtime.child import run_to_its_end\n"
        "sys.exit(run_to_its_end([sys.executable, 'launcher.py'], program='training.py'))\n"
    )
    for name, text in {"training": training, "launcher": launcher, "waits": waits}.items():
        (tmp_path / f"{name}.py").write_text(text)
    process = subprocess.Popen([PYTHON, "waits.py"], cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 7
    assert (tmp_path / "received").read_text() == "x"


@pytest.fixture
def configured(tmp_path, monkeypatch):
    """A configuration of accelerate for two processes in the place of the default one."""
    from accelerate.commands.config import config_args

    file = tmp_path / "default_config.yaml"
    file.write_text("distributed_type: MULTI_GPU\nnum_processes: 2\nuse_cpu: false\n")
    monkeypatch.setattr(config_args, "default_config_file", str(file))
    for name in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION", STARTED_AS):
        monkeypatch.delenv(name, raising=False)


def test_a_configuration_of_accelerate_is_followed(configured, monkeypatch):
    started = []

    def run(command, environment, program):
        started.append((command, environment, program))
        return 5

    monkeypatch.setattr("reg_diffusers.runtime.child.run_to_its_end", run)
    with pytest.raises(SystemExit, match=r"^5$"):
        main(["train", "--max_train_steps", "3"])
    ((command, environment, program),) = started
    assert command[2:] == ["accelerate.commands.launch", "-m", "reg_diffusers", "train", "--max_train_steps", "3"]
    assert environment[STARTED_AS] == "reg-diffusers train" and program in command
    with pytest.raises(SystemExit, match=r"^2$"):  # before anything is launched
        main(["train", "--max_train_steps", "none"])
    assert len(started) == 1


@pytest.mark.slow
def test_two_processes_start_from_the_configuration_and_end_by_one_signal(tmp_path, tiny_unet):
    tiny_unet().save_config(tmp_path / "tiny")
    (tmp_path / "hf" / "accelerate").mkdir(parents=True)
    (tmp_path / "hf" / "accelerate" / "default_config.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_machines: 1\nnum_processes: 2\n"
        "machine_rank: 0\nmain_process_port: 0\nmixed_precision: 'no'\nuse_cpu: false\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "ACCELERATE_USE_CPU": "true"}
    environment = {name: value for name, value in environment.items() if name != "ACCELERATE_MIXED_PRECISION"}
    flags = (
        "--resolution 8 --train_batch_size 8 --lr_warmup_steps 0 --no-compare --max_train_steps 100000 --lr_scheduler"
    )
    flags += " constant --model_config_name_or_path tiny --output_dir out --preview_steps 100000"
    process = subprocess.Popen(
        [PYTHON, "-m", "reg_diffusers", "train", *flags.split()],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not (tmp_path / "out" / "metrics.jsonl").is_file():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output
    assert "2 x cpu" in output and len(list((tmp_path / "out").glob("checkpoint-*"))) == 1
    assert "The following values were not passed" not in output
    assert "stopped by SIGINT; continue with: env ACCELERATE_USE_CPU=true" in output
    assert f"{Path(PYTHON)} -m reg_diffusers train" in output or "python -m reg_diffusers train" in output
