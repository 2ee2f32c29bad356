"""The benchmark for a GPU runs from end to end at tiny sizes, without the packages that a bare machine lacks."""

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from runs import ROOT

pytestmark = pytest.mark.training

SECTIONS = ["training", "decoding", "perceptual", "fp16", "sampling", "toy"]  # compilation takes minutes on a CPU
FOLDER = ROOT / "docs" / "benchmarks" / "gpu"
BARE = f"""
import sys
names = "datasets pyarrow pandas torchvision scipy sklearn matplotlib peft gradio kornia skimage pytorch_msssim psutil"
names += " accelerate jinja2"
sys.modules.update(dict.fromkeys(names.split()))
sys.path.insert(0, {str(FOLDER)!r})
import gpu
gpu.main()
"""


@pytest.mark.slow
def test_a_dry_run_measures_every_section_on_a_bare_machine(tmp_path):
    command = [sys.executable, "-c", BARE, "--dry_run", "--output", str(tmp_path), "--sections", *SECTIONS]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["left_out"] == [] and found["dry_run"]
    sections = {row["section"].split()[0] for row in found["rows"]}
    assert sections == {"training", "decoding", "perceptual", "sampling", "points"}
    assert all(row["ms"] > 0 for row in found["rows"] if "ms" in row)
    losses = [row["value"] for row in found["rows"] if row["what"].endswith(": loss")]
    assert len(losses) == 2 and all(0 < loss < 10 for loss in losses)
    text = (tmp_path / "gpu.txt").read_text()
    assert text.startswith(found["machine"]) and "times mean nothing" in text


def test_a_section_that_fails_or_hangs_leaves_the_numbers_of_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(FOLDER)
    import gpu

    def good(*_):
        yield {"section": "good", "what": "loss", "value": 1.0}

    def broken(*_):
        yield {"section": "broken", "what": "loss", "value": 2.0}
        raise TypeError("of another version")

    def endless(*_):
        time.sleep(30)
        yield {}

    sections = {"broken": broken, "endless": endless, "good": good}
    monkeypatch.setattr(gpu, "SECTIONS", sections)
    monkeypatch.setattr(gpu, "SECONDS", {"broken": 9, "endless": 0.05, "good": 9})
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry_run", "--output", str(tmp_path)])
    gpu.main()
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["value"] for row in found["rows"]] == [2.0, 1.0]
    assert found["left_out"] == ["broken: TypeError: of another version", "endless: TimeoutError: longer than 0 s"]
    assert "left out: broken: TypeError" in capsys.readouterr().out


def test_a_comparison_that_runs_out_of_time_keeps_its_complete_turns(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import sections

    calls = iter(range(9))

    def step():
        if next(calls) == 7:  # in the fourth turn, of which the first warms up
            raise TimeoutError("longer than 60 s")
        return torch.ones(())

    found, sizes = [], SimpleNamespace(rounds=5, steps=1)
    loops = {"usual loop": lambda: step, "ours": lambda: step}
    with pytest.raises(TimeoutError, match="longer than 60 s"):
        found.extend(iter(sections._compare("toy", loops, sizes, torch.device("cpu"), 4)))
    assert [(row["what"], row["turns"]) for row in found] == [("usual loop", 2), ("ours", 2)]
    assert found[0]["times_as_fast"] == 1


def test_without_a_gpu_it_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(FOLDER)
    import gpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"^2$"):
        gpu.main()
    assert "--dry_run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
