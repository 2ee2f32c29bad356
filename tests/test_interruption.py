"""Signals and time: all processes end at the same step, saved, with status 0; a second signal ends at once."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from accelerate import debug_launcher
from accelerate.state import AcceleratorState, GradientState, PartialState
from runs import QUICK, ROOT, metrics

from reg_diffusers.runtime.interruption import Interruption
from reg_diffusers.settings.arguments import parse_args

pytestmark = pytest.mark.reliability

ENDLESS = [
    *QUICK,
    *"--no-compare --max_train_steps 100000 --output_dir out --preview_steps 100000 --lr_scheduler constant".split(),
    *"--mixed_precision no --model_config_name_or_path tiny".split(),
]


@pytest.fixture(autouse=True)
def no_launch_before():
    """What accelerate remembers of an earlier test would be taken for the launch."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


@pytest.fixture
def start(tmp_path, tiny_unet):
    """Starts an endless run in a process of its own and waits until it trains."""
    tiny_unet().save_config(tmp_path / "tiny")
    running = []

    def run(*flags):
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "train_reg.py"), *ENDLESS, *flags],
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        running.append(process)
        deadline = time.monotonic() + 120
        while not (tmp_path / "out" / "metrics.jsonl").is_file():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        return process

    yield run
    for process in running:
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_ends_with_status_0(start, tmp_path, number):
    process = start()
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert re.search(rf"stopped by {number.name}; continue with: \S+ {ROOT / 'train_reg.py'} --resolution", output)
    check_ended_by(number, tmp_path / "out", output)


def check_ended_by(number, out, output):
    assert f"{number.name}: ending after this step; a second signal" in output
    (checkpoint,) = out.glob("checkpoint-*")
    assert f"saved out/{checkpoint.name}" in output and (checkpoint / "manifest.json").is_file()
    assert (out / "model_index.json").is_file()
    return checkpoint


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_fifth_step_saves_that_step(train, capsys, number):
    class Interrupted(train.script.RegularizedLoss):
        calls = 0

        def forward(self, *args, **kwargs):
            Interrupted.calls += 1
            if Interrupted.calls == 5:
                os.kill(os.getpid(), number)
            return super().forward(*args, **kwargs)

    train.script.RegularizedLoss = Interrupted
    out = train("--max_train_steps", 100, "--lr_scheduler", "constant")
    printed = capsys.readouterr()
    assert check_ended_by(number, out, printed.out + printed.err).name == "checkpoint-5"
    assert re.search(rf"stopped by {number.name}; continue with: accelerate launch train_reg.py --", printed.out)


@pytest.mark.slow
def test_a_second_signal_ends_at_once(start, tmp_path):
    process = start("--train_batch_size", "2000")  # steps that take long
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == -signal.SIGTERM
    assert not list((tmp_path / "out").glob("checkpoint-*"))


@pytest.mark.slow
def test_the_time_limit_does_the_same(command_line, tmp_path, tiny_unet):
    tiny_unet().save_config(tmp_path / "tiny")
    done = command_line(*ENDLESS, "--max_train_time", "2s")
    command = re.search(r"stopped by the time limit; continue with: \S+ \S+train_reg.py (.*)", done.stdout)
    assert command and command.group(1).endswith("--resume auto")
    assert len(list((tmp_path / "out").glob("checkpoint-*"))) == 1


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90m", 5400), ("3h30m", 12600), ("45", 45), ("03:30:00", 12600), ("1-12:00:00", 129600), ("2d", 172800)],
)
def test_times_are_read_as_people_and_slurm_write_them(text, seconds):
    assert parse_args(["--max_train_time", text]).output.max_train_time == seconds


@pytest.mark.parametrize("text", ["", "0", "soon", "1:30", "-5", "3.5h"])
def test_other_times_are_refused(text, capsys):
    with pytest.raises(SystemExit):
        parse_args([f"--max_train_time={text}"])
    assert "is not a duration such as 90m, 3h30m or 03:30:00" in capsys.readouterr().err


def two_processes(folder):
    state = PartialState(cpu=True)
    with Interruption(state) as interruption:
        for step in range(20):
            if interruption.agreed():
                break
            if step == 7 and state.process_index == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
        (folder / f"{state.process_index}").write_text(f"{step} {bool(interruption)} {interruption.name}")


def test_a_signal_to_one_process_ends_both_at_the_same_step(tmp_path):
    debug_launcher(two_processes, (tmp_path,), num_processes=2)
    step, agreed, name = (tmp_path / "0").read_text().split(maxsplit=2)
    assert (int(step), agreed, name) == (9, "True", "a signal to another process")
    assert (tmp_path / "1").read_text() == "9 True SIGUSR1"


def test_the_handlers_before_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with Interruption(PartialState(cpu=True)):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
def test_two_processes_save_and_resume_as_one_run_that_nobody_stopped(command_line, tmp_path, tiny_unet):
    tiny_unet().save_config(tmp_path / "tiny")
    launcher = (sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu")
    launcher += ("--num_processes", "2")
    env = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    flags = [*ENDLESS, "--checkpointing_steps", "5", "--max_train_steps", "20"]
    command_line(*flags, "--output_dir", "whole", launcher=launcher, env=env)
    command_line(*flags, "--max_train_steps", "10", launcher=launcher, env=env)
    done = command_line(*flags, "--resume", "auto", launcher=launcher, env=env)
    assert "continuing from out/checkpoint-10" in done.stderr
    files = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole" / "checkpoint-20").iterdir()]
    for name in [*files, "unet/diffusion_pytorch_model.safetensors"]:
        if getattr(name, "name", name) != "manifest.json":
            assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "out")
