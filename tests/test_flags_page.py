"""The page of flags is what --help prints."""

from pathlib import Path

from reg_diffusers.training.arguments import build_parser

PAGE = Path(__file__).parents[1] / "docs" / "flags.txt"


def test_the_page_is_the_help_text(monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    expected = build_parser().format_help()
    assert PAGE.read_text() == expected, "renew it: COLUMNS=110 python train_reg.py --help > docs/flags.txt"
