"""What fails beside the training costs no model: all is saved, one line says what failed, and the status is 1."""

import io
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from accelerate.state import PartialState
from accelerate.tracking import TensorBoardTracker
from runs import QUICK, ROOT, metrics

from reg_diffusers import RegDDPMPipeline
from reg_diffusers.runtime.interruption import Interruption, Stopped, stopped_at_once
from reg_diffusers.runtime.output_streams import lasting_output

pytestmark = pytest.mark.reliability

# Once the run has begun, what is scored is a sample.
FAILS_ON_SAMPLES = """
import inspect, os

def loss(x):
    if os.path.exists("out/reg_config.json") and "score" in [frame.function for frame in inspect.stack()]:
        open("out/README.md", "w").write("---\\na: [\\n---\\n")
        raise RuntimeError("no samples, please")
    return x.square().mean(dim=(1, 2, 3))
"""


@pytest.mark.slow
def test_nothing_beside_the_training_costs_a_trained_model(train, tmp_path, monkeypatch, capsys):
    """A preview, a logger, the comparison and the card fail, in one run; the next one makes up for them."""
    (tmp_path / "losses_of_images.py").write_text(FAILS_ON_SAMPLES)

    def no_connection(*_, **__):
        raise ConnectionError("no route to the logger")

    monkeypatch.setattr(TensorBoardTracker, "log", no_connection)
    flags = ("--regularizer", "losses_of_images:loss", "--compare", "--max_train_steps", 20, "--preview_steps", 10)
    flags += ("--checkpointing_steps", 8)
    with pytest.raises(SystemExit) as stopped:
        train(*flags, "--logger", "tensorboard")
    assert stopped.value.code == 1
    out = tmp_path / "out"
    printed = capsys.readouterr()
    place = r"RuntimeError: no samples, please \(losses_of_images.py, line 7: raise RuntimeError.*\)"
    assert re.findall(r"error: (.*) failed: " + place, printed.err) == [
        *(f"the preview of step {step}" for step in (10, 20)),
        *(f"the preview of step {step}" for step in (10, 20)),  # of the plain model, with the same captions
        "the comparison",
    ]
    assert "error: out/README.md failed: ValueError: the metadata of its README.md" in printed.err
    assert "--resume auto writes it again" in printed.err
    lines = [line for line in printed.err.splitlines() if "no route to the logger" in line]
    assert len(lines) == 2 and all("--logger tensorboard at step 10 failed: ConnectionError" in line for line in lines)
    assert "failed      --logger tensorboard at step 10, the preview of step 10, the preview of step 20" in printed.out
    assert (out / "checkpoint-20" / "manifest.json").is_file()
    for folder in (out, out / "plain"):
        assert len(metrics(folder)) == 2
        RegDDPMPipeline.from_pretrained(str(folder))(num_inference_steps=1)
    assert not (out / "comparison.json").exists()

    (tmp_path / "losses_of_images.py").write_text("def loss(x):\n    return x.square().mean(dim=(1, 2, 3))\n")
    sys.modules.pop("losses_of_images")
    (out / "README.md").unlink()
    train(*flags, "--resume", "auto")
    assert (out / "comparison.json").is_file() and (out / "README.md").is_file()
    assert (out / "samples" / "step-000020.png").is_file()


@pytest.fixture
def shell(tmp_path, tiny_unet):
    """Starts train_reg.py in a shell, in a process group of its own; returns the process."""
    tiny_unet().save_config(tmp_path / "tiny")
    flags = [*QUICK, *"--no-compare --output_dir out --mixed_precision no --model_config_name_or_path tiny".split()]
    command = " ".join([sys.executable, str(ROOT / "train_reg.py"), *flags])

    def run(more):
        return subprocess.Popen(
            ["bash", "-o", "pipefail", "-c", more.format(command)],
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    return run


SHORT = "{} --max_train_steps 4 --checkpointing_steps 2"


@pytest.mark.parametrize(
    "command, status, told",
    [
        pytest.param(
            SHORT + " | head -1",
            1,
            "stdout was closed; the run continues, and its output follows here",
            marks=pytest.mark.slow,
        ),
        pytest.param(SHORT + " 2>&1 | head -1", 1, "", marks=pytest.mark.slow),
        pytest.param(SHORT + " 2>&-", 0, "", marks=pytest.mark.slow),
        pytest.param(SHORT + " >&- 2>&-", 0, "", marks=pytest.mark.slow),
        pytest.param("PYTHONIOENCODING=ascii " + SHORT + " --compare", 0, "", marks=pytest.mark.slow),
    ],
)
def test_a_closed_pipe_costs_nothing_but_what_was_written_to_it(shell, tmp_path, command, status, told):
    process = shell(command)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == status, output + errors
    assert told in errors and "Traceback" not in errors
    if told:
        assert "load it     from reg_diffusers import RegDDPMPipeline" in errors
    assert (tmp_path / "out" / "checkpoint-4").is_dir() and (tmp_path / "out" / "README.md").is_file()
    RegDDPMPipeline.from_pretrained(str(tmp_path / "out"))


@pytest.mark.slow
def test_ctrl_c_that_ends_tee_as_well_saves_the_run(shell, tmp_path):
    process = shell("{} --max_train_steps 100000 --preview_steps 100000 2>&1 | tee log")
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "metrics.jsonl").is_file():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / "model_index.json").is_file():  # the shell does not wait for it
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert (checkpoint / "manifest.json").is_file()


def test_a_signal_is_heard_where_stderr_has_no_number(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Interruption(PartialState(cpu=True)) as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.agreed()
    assert "SIGTERM: ending after this step" in sys.stderr.getvalue()


def test_a_signal_cuts_short_what_the_training_can_do_without():
    done, before = [], signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup would have it ignored

    def draw():
        done.append("begun")
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(5)
        done.append("finished")

    with Interruption(PartialState(cpu=True)) as interruption:
        interruption.cut_short(lambda: done.append("before"))
        interruption.cut_short(draw)
        interruption.cut_short(lambda: done.append("after"))
        assert interruption and interruption.name == "SIGHUP"
    signal.signal(signal.SIGHUP, before)
    assert done == ["before", "begun"]


def test_a_signal_before_the_training_ends_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="SIGTERM"), stopped_at_once():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_at_the_start_ends_with_the_command_that_starts_again(train, tmp_path, capsys):
    (tmp_path / "impatient_losses.py").write_text(
        "import os, signal, time\n\ndef loss(x):\n    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(5)\n"
    )
    train("--regularizer", "impatient_losses:loss")
    printed = capsys.readouterr()
    assert "stopped by SIGTERM; continue with: accelerate launch train_reg.py --resolution 8" in printed.out
    assert "--resume" not in printed.out and "Traceback" not in printed.err
    assert not (tmp_path / "out").exists()


def test_what_a_closed_stream_would_have_got_goes_to_the_other():
    class Closed(io.StringIO):
        def flush(self):
            raise BrokenPipeError

    out, err = Closed(), io.StringIO()
    before = sys.stdout, sys.stderr
    try:
        sys.stdout, sys.stderr = out, err
        with lasting_output() as streams:
            print("a line")
            print("another")
        assert (sys.stdout, sys.stderr) == (out, err)
    finally:
        sys.stdout, sys.stderr = before
    assert [stream.is_lost for stream in streams] == [True, False]
    assert err.getvalue().splitlines()[1:] == ["a line", "another"]
