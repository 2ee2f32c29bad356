"""The command `reg-diffusers`, one module for each subcommand."""

from __future__ import annotations

import argparse

from ..training.errors import exit_on_usage_error
from . import demo, diagnose, evaluate, sample, sweep

__all__ = ["build_parser", "main"]


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands, which are imported in full only when they run."""
    parser = argparse.ArgumentParser(
        prog="reg-diffusers",
        description="Use diffusion models that were trained with a loss on the image. The training itself:"
        " accelerate launch train_reg.py --help",
    )
    subparsers = parser.add_subparsers(title="subcommands", metavar="COMMAND", required=True)
    for command in (demo, diagnose, evaluate, sample, sweep):
        command.add_parser(subparsers)
    return parser


@exit_on_usage_error
def main(argv: list[str] | None = None) -> None:
    """Runs the subcommand that the command line names; exits with status 2 and one line on what cannot work."""
    args = build_parser().parse_args(argv)
    args.run(args)
