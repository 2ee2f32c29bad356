"""The subcommand `train`: the training script, from the installed package."""

from __future__ import annotations

import os
import shlex
import sys

__all__ = ["add_parser", "run"]

PROGRAM = "reg-diffusers train"
_OF_A_LAUNCH = ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION")  # set by accelerate launch and torchrun


def add_parser(subparsers) -> None:
    """Adds the subcommand to the list of `reg-diffusers`; its flags are parsed by `run`."""
    subparsers.add_parser("train", help="train a diffusion model with a loss on the image", add_help=False)


def run(argv: list[str]) -> None:
    """Trains in this process, or in the processes that the default configuration of accelerate asks for.

    Ctrl-C before the training starts ends with status 130.

    Args:
        argv: the flags of the training.

    Raises:
        UsageError: if the training cannot work with these flags.
        SystemExit: with the status of the launcher.
    """
    try:
        _run(argv)
    except KeyboardInterrupt:
        print(f"\n{PROGRAM}: stopped before the training started; nothing is written", file=sys.stderr)
        sys.exit(130)


def _run(argv: list[str]) -> None:
    from ..settings.arguments import parse_args

    settings = parse_args(argv, PROGRAM)  # reports wrong flags before any process is started
    if _is_launched():
        return _train(settings, argv)
    from accelerate.commands.config.config_args import default_config_file

    if os.path.isfile(default_config_file):
        sys.exit(_launch(argv))
    return _train(settings, argv)


def _train(settings, argv: list[str]) -> None:
    import train_reg

    _report_idle_gpus()
    train_reg.train(settings, argv)


def _is_launched() -> bool:
    from ..runtime.launch import STARTED_AS

    return any(os.environ.get(name) for name in (STARTED_AS, *_OF_A_LAUNCH))


def _launch(argv: list[str]) -> int:
    """Trains in the processes of `accelerate launch`, which reads its configuration; returns the exit status."""
    from ..runtime.child import run_to_its_end
    from ..runtime.launch import STARTED_AS, command_before

    command = [sys.executable, "-m", "accelerate.commands.launch", "-m", "reg_diffusers", "train", *argv]
    started_as = shlex.join(command_before(argv) or PROGRAM.split())
    # accelerate warns where it has to choose the number of threads; the training replaces 1 by all cores.
    environment = {"OMP_NUM_THREADS": "1", **os.environ, STARTED_AS: started_as}
    return run_to_its_end(command, environment, program="reg_diffusers")


def _report_idle_gpus() -> None:
    import torch

    from ..runtime.errors import warn

    number = torch.cuda.device_count()
    if number > 1 and not _is_launched():
        warn(f"one of {number} GPUs is used: run `accelerate config` once, or see docs/scaling.md, to use all")
