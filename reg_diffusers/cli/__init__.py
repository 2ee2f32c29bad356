"""The command line `reg-diffusers`, with one module per subcommand."""

from __future__ import annotations

import argparse
import sys

from .. import __version__
from ..runtime.errors import exit_on_usage_error
from ..runtime.messages import show_messages
from ..settings.parser import Parser
from . import demo, diagnose, environment, evaluate, sample, sweep, train

__all__ = ["build_parser", "main"]


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of all subcommands; a subcommand imports its dependencies only when it runs."""
    parser = Parser(
        prog="reg-diffusers",
        description="Train diffusion models with a loss on the image, and use them.",
        epilog="reg-diffusers COMMAND --help lists the flags of a command.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"reg-diffusers {__version__}")
    subparsers = parser.add_subparsers(title="subcommands", metavar="COMMAND", required=True)
    train.add_parser(subparsers)
    for command in (diagnose, evaluate, sweep, sample):
        command.add_parser(subparsers).add_argument(
            "--quiet", action="store_true", help="hide progress bars and messages, not results, warnings and errors"
        )
    for command in (demo, environment):
        command.add_parser(subparsers).set_defaults(quiet=False)
    return parser


@exit_on_usage_error
def main(argv: list[str] | None = None) -> None:
    """Runs the subcommand of the command line; exits with status 2 and a one-line message on a usage error."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        build_parser().print_help()
    elif argv[0] == "train":  # has a parser of its own, which train_reg.py uses, too
        train.run(argv[1:])
    else:
        args = build_parser().parse_args(argv)
        args.argv = argv  # for the records of a command
        show_messages(quiet=args.quiet)
        args.run(args)
