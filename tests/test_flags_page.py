"""The pages of flags are what --help prints."""

from pathlib import Path

import pytest

from reg_diffusers.cli import main
from reg_diffusers.settings.arguments import build_parser

pytestmark = pytest.mark.training

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(autouse=True)
def width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")


def test_the_page_is_the_help_text():
    expected = build_parser().format_help()
    renewal = "renew it: COLUMNS=110 python train_reg.py --help > docs/flags.txt"
    assert (DOCS / "flags.txt").read_text() == expected, renewal


def test_the_flags_of_sampling_are_its_help_text(capsys):
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    renewal = "renew it: COLUMNS=110 reg-diffusers sample --help > docs/sample_flags.txt"
    assert (DOCS / "sample_flags.txt").read_text() == capsys.readouterr().out, renewal
