"""The benchmark for a GPU runs from end to end at tiny sizes, without the packages that a bare machine lacks."""

import json
import subprocess
import sys
import time

import pytest
from runs import ROOT

pytestmark = pytest.mark.training

SECTIONS = ["training", "decoding", "perceptual", "fp16", "sampling", "toy"]  # compilation takes minutes on a CPU
FOLDER = ROOT / "docs" / "benchmarks" / "gpu"
BARE = f"""
import sys
names = "datasets pyarrow pandas torchvision scipy sklearn matplotlib peft gradio kornia skimage pytorch_msssim psutil"
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


def test_without_a_gpu_it_says_what_to_do(tmp_path):
    code = "import torch; torch.cuda.is_available = lambda: False\n" + BARE
    done = subprocess.run([sys.executable, "-c", code, "--output", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2 and "--dry_run" in done.stderr
    assert not list(tmp_path.iterdir())
