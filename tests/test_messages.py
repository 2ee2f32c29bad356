"""Messages go through `logging`; --quiet and --verbose show less and more of them, never less of a result."""

import io
import logging
import re
import sys

import diffusers.utils.logging
import huggingface_hub.utils
import numpy as np
import pytest
from diffusers import DDPMScheduler
from tqdm import tqdm

from reg_diffusers import RegDDPMPipeline
from reg_diffusers.cli import main
from reg_diffusers.runtime.errors import exit_on_usage_error, warn
from reg_diffusers.runtime.messages import bars_are_hidden, detail, say, show_messages

pytestmark = pytest.mark.training

RUN = ("--max_train_steps", 20, "--checkpointing_steps", 10, "--preview_steps", 100, "--num_threads", 1)
RUN += ("--regularizer", "total_variation")
STEP = re.compile(r"^step (10|20): denoising \d\.\d+, total_variation \S+ \(data \S+\), lr \S+$", re.MULTILINE)


@pytest.fixture(autouse=True)
def logger():
    """The logger of the package and the bars, as they are before the first command, and again afterwards."""
    logger = logging.getLogger("reg_diffusers")
    before = logger.level, list(logger.handlers)
    logger.handlers, _ = [], logger.setLevel(logging.NOTSET)
    show_bars()  # a test of another module may have run a command with --quiet
    yield logger
    show_bars()
    logger.setLevel(before[0])
    logger.handlers = before[1]


def show_bars():
    diffusers.utils.logging.enable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()


def test_a_quiet_training_prints_its_result_and_warnings_only(train, capsys):
    train(*RUN, "--quiet", "--lr_warmup_steps", 30)
    printed = capsys.readouterr()
    assert printed.out.startswith("pipeline ") and "from_pretrained" in printed.out
    (warning,) = printed.err.strip().splitlines()
    assert warning.startswith("train_reg.py: warning: --lr_warmup_steps 30")
    train(*RUN, output="another")  # as usual again
    printed = capsys.readouterr()
    assert printed.out.startswith("data ") and "saved another/checkpoint-10" in printed.out and "it/s" in printed.err
    assert not STEP.search(printed.out)


def test_a_verbose_training_prints_the_numbers_of_the_log(train, capsys):
    train(*RUN, "--verbose")
    assert STEP.findall(capsys.readouterr().out) == ["10", "20"]


def test_skipped_steps_are_never_hidden(train, capsys):
    with pytest.raises(SystemExit):
        train(*RUN, "--quiet", "--learning_rate", 1e30, "--max_grad_norm", 1e30, "--lr_scheduler", "constant")
    printed = capsys.readouterr()
    assert "is skipped: its loss or gradient is not finite" in printed.out and "error: " in printed.err


@pytest.mark.slow
def test_a_quiet_diagnosis_prints_its_verdict(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("fields.npy", np.random.default_rng(0).normal(size=(60, 1, 8, 8)).astype(np.float32))
    ask = "diagnose --train_data_dir fields.npy --regularizer sparsity --num_levels 2".split()
    main([*ask, "--quiet"])
    printed = capsys.readouterr()
    assert printed.out.startswith("Verdict: sparsity ") and "timestep/s" not in printed.err
    main(ask)
    printed = capsys.readouterr()
    assert printed.out.startswith("data: 60 of 60 fields") and "timestep/s" in printed.err


def test_a_program_gets_the_messages_by_logging(logger, caplog, capsys):
    logger.setLevel(logging.DEBUG)
    say("begun")
    detail("a number")
    assert [record.getMessage() for record in caplog.records] == ["begun", "a number"]
    assert capsys.readouterr().out == ""  # nothing is shown that nobody asked for


def test_warnings_are_shown_without_a_command_too(logger, capsys):
    warn("look out")
    assert capsys.readouterr().err.endswith(": warning: look out\n")


@pytest.mark.parametrize(
    "flags, shown",
    [({"quiet": True}, []), ({}, ["say"]), ({"verbose": True}, ["say", "detail"])],
)
def test_the_flags_choose_what_is_shown(capsys, flags, shown):
    for _ in range(2):  # once only, however often it is called
        show_messages(**flags)
    say("say")
    detail("detail")
    assert capsys.readouterr().out.split() == shown
    assert bars_are_hidden() == (not shown)


def test_a_message_does_not_cut_a_progress_bar(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    show_messages()
    with tqdm(total=2, file=terminal, mininterval=0) as bar:
        bar.update()
        say("in between")
    assert "in between\n" in terminal.getvalue()
    assert all(line.strip() == "in between" for line in re.split(r"[\r\n]", terminal.getvalue()) if "between" in line)


def test_quiet_hides_the_bars_of_diffusers(tiny_unet, tmp_path, capsys):
    RegDDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(tmp_path)
    RegDDPMPipeline.from_pretrained(tmp_path)
    assert "Loading pipeline components" in capsys.readouterr().err
    show_messages(quiet=True)
    RegDDPMPipeline.from_pretrained(tmp_path)
    assert capsys.readouterr().err == ""


def test_full_memory_is_one_line_with_what_to_change(capsys):
    @exit_on_usage_error
    def run():
        np.empty(2**60, np.uint8)

    with pytest.raises(SystemExit, match="2"):
        run()
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "error: not enough memory (Unable to allocate" in error
    assert "use smaller or fewer images, or smaller batches" in error
