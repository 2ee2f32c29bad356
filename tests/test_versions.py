"""The versions that setup.cfg promises are those that constraints-lowest.txt tries."""

import configparser
import re
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
