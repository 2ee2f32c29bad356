"""bf16 on a CPU is chosen by timing, printed with the times, and kept for the run."""

import re

import pytest
import torch
from runs import differ, weights

from reg_diffusers.networks import computation
from reg_diffusers.networks.timing import PAIRS, Timing, time_precision
from reg_diffusers.runtime import hardware

pytestmark = pytest.mark.training

CHOSEN = ("--mixed_precision", None)  # the last one counts: None takes the flag of the fixture back
FAST, SLOW = Timing(0.4, 0.2, gain=2.0, images=8), Timing(0.2, 0.25, gain=0.8, images=8)


@pytest.fixture
def slow_in(monkeypatch):
    """Makes a call whose clock advances by 0.02 s per image in one precision, and by 0.01 s in the other."""
    now = 0.0
    monkeypatch.setattr("reg_diffusers.networks.timing.time.perf_counter", lambda: now)

    def make(dtype):
        def call(network, images):
            nonlocal now
            precision = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
            now += (0.02 if precision == dtype else 0.01) * images
            return network(torch.randn(images, 1, 8, 8), torch.zeros(images), return_dict=False)[0]

        return call

    return make


@pytest.mark.parametrize("dtype, gain", [(torch.float32, 2.0), (torch.bfloat16, 0.5)])
def test_the_faster_precision_is_found_and_nothing_else_changes(tiny_unet, slow_in, dtype, gain):
    unet = tiny_unet()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    state = torch.get_rng_state()
    timing = time_precision(unet, slow_in(dtype), dtype=torch.bfloat16, attention="explicit", batch_size=4)
    assert timing.gain == pytest.approx(gain) and timing.is_worth_it == (gain > 1) and timing.images == 4
    assert timing.float32 / timing.other == pytest.approx(gain)
    assert torch.equal(torch.get_rng_state(), state)
    assert not differ(unet.state_dict(), before)
    assert all(parameter.grad is None for parameter in unet.parameters())


def test_a_measurement_fits_its_limit_with_fewer_images_or_does_not_happen(tiny_unet, slow_in):
    arguments = {"dtype": torch.bfloat16, "attention": "sdpa", "batch_size": 64}
    timing = time_precision(tiny_unet(), slow_in(torch.float32), limit=2.0, **arguments)
    assert timing.images == int((2.0 - 0.03) / ((PAIRS + 1) * 0.03))
    assert time_precision(tiny_unet(), slow_in(torch.float32), limit=0.1, **arguments) is None


@pytest.fixture
def timed(monkeypatch):
    """Makes every run long enough, on a processor that names bf16; what a measurement finds is given."""
    monkeypatch.setattr(hardware, "_has_bf16", lambda on_cpu: True)
    monkeypatch.setattr(computation, "LEAST_BATCHES", 1)
    calls = []

    def give(timing):
        monkeypatch.setattr(computation, "time_precision", lambda *args, **kwargs: calls.append(kwargs) or timing)
        return calls

    return give


def machine_lines(capsys):
    return "\n".join(re.findall("^machine +(.*)$", capsys.readouterr().out, re.MULTILINE))


@pytest.fixture
def choosing(train, monkeypatch):
    """Runs the script without --mixed_precision."""
    parse = train.script.parse_args

    def unpinned(argv):
        place = argv.index("--mixed_precision")
        return parse(argv[:place] + argv[place + 2 :])

    monkeypatch.setattr(train.script, "parse_args", unpinned)
    return train


def test_what_is_faster_is_used_and_a_resumed_run_repeats_it(choosing, timed, capsys):
    calls = timed(FAST)
    flags = ("--checkpointing_steps", 1, "--max_train_steps", 2)
    choosing(*flags, "--max_train_steps", 1)
    assert "mixed precision bf16 (2.00 x as fast as float32 in 5 interleaved pairs, 0.2 against 0.4 s for 8" in (
        said := machine_lines(capsys)
    )
    assert "pinned by --mixed_precision bf16" in said and "explicit attention" in said
    assert [call["batch_size"] for call in calls] == [8]
    timed(SLOW)
    choosing(*flags, "--resume", "auto")
    assert "mixed precision bf16 (as at the start of this run)" in machine_lines(capsys)
    assert len(calls) == 1
    choosing(*flags, output="slow")
    assert "no (bf16 is only 0.80 x as fast as float32" in (said := machine_lines(capsys)) and "sdpa attention" in said
    assert "pinned by --mixed_precision no" in said


def test_short_runs_and_slow_measurements_use_float32(choosing, timed, capsys, monkeypatch):
    timed(None)
    choosing("--max_train_steps", 1)
    assert "mixed precision no (timing bf16 would take too long; --mixed_precision bf16 uses it)" in machine_lines(
        capsys
    )
    monkeypatch.setattr(computation, "LEAST_BATCHES", 600)
    calls = timed(FAST)
    calls.clear()
    choosing("--max_train_steps", 1, output="short")
    assert "mixed precision no (bf16 is timed from 600 batches on" in machine_lines(capsys) and not calls


def test_two_equal_commands_end_in_equal_weights_or_print_their_choices(choosing, monkeypatch, capsys):
    """With real times, which may differ between the two."""
    monkeypatch.setattr(hardware, "_has_bf16", lambda on_cpu: True)
    monkeypatch.setattr(computation, "LEAST_BATCHES", 1)
    found = []
    for output in ("one", "two"):
        folder = choosing("--max_train_steps", 3, "--num_threads", 1, output=output)
        (choice,) = re.findall(r"mixed precision (no|bf16) \(.* x as fast.*--mixed_precision", machine_lines(capsys))
        found.append((choice, weights(folder)))
    (first, one), (second, two) = found
    assert differ(one, two) == (first != second)
