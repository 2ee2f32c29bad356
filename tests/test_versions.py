"""The versions that setup.cfg promises are those that constraints-lowest.txt tries."""

import configparser
import re
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.project

ROOT = Path(__file__).parents[1]


def test_the_lowest_versions_are_those_that_are_promised():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = (setup["options"]["install_requires"] + setup["options.extras_require"]["test"]).split()
    promised = dict(line.split(">=") for line in lines)
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    tried = dict(re.fullmatch(r"([\w-]+)==([\d.]+)", line).groups() for line in lines if not line.startswith("#"))
    assert {name for name in promised if name not in tried} == {"ruff", "selenium"}  # which no test of them needs
    page = (ROOT / "docs" / "index.md").read_text()
    for name in ("torch", "diffusers", "transformers", "huggingface_hub"):
        assert f"{name} {promised[name]}" in page
    for name, version in tried.items():
        assert re.fullmatch(rf"{re.escape(promised[name])}(\.\d+)*", version), f"{name}: {promised[name]} promised"


def test_every_extra_is_found_by_every_pip():
    """pip below 24 passes over an extra whose name has an underscore, with a warning that `-q` does not hide."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = set(setup["options.extras_require"])
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) for name in extras)
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    texts = [(ROOT / name).read_text() for name in files if name.endswith((".py", ".md", ".ipynb", "run", "file"))]
    named = {name for text in texts for names in re.findall(r"-e \W*\.\[([^]]+)\]", text) for name in names.split(",")}
    assert named and named <= extras
