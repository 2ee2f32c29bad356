"""The command line `reg-diffusers`, with one module per subcommand."""

from __future__ import annotations

import argparse

from ..runtime.errors import exit_on_usage_error
from . import demo, diagnose, evaluate, sample, sweep

__all__ = ["build_parser", "main"]


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of all subcommands; a subcommand imports its dependencies only when it runs."""
    parser = argparse.ArgumentParser(
        prog="reg-diffusers",
        description="Use diffusion models that were trained with a loss on the image. For the training itself, see:"
        " accelerate launch train_reg.py --help",
    )
    subparsers = parser.add_subparsers(title="subcommands", metavar="COMMAND", required=True)
    for command in (demo, diagnose, evaluate, sample, sweep):
        command.add_parser(subparsers)
    return parser


@exit_on_usage_error
def main(argv: list[str] | None = None) -> None:
    """Runs the subcommand of the command line; exits with status 2 and a one-line message on a usage error."""
    args = build_parser().parse_args(argv)
    args.run(args)
