"""The command line of a run, to be pasted: as it was given, or to go on with it."""

from __future__ import annotations

import os
import shlex
import sys

from accelerate import PartialState

__all__ = ["launch_command", "resume_command"]

_RESUME_FLAGS = ("--resume", "--resume_from_checkpoint")


def launch_command(argv: list[str] | None, state: PartialState) -> str:
    """How to start train_reg.py with these arguments on as many processes.

    A token among the arguments is left out.

    Args:
        argv: arguments of the script; None: those of this process.
        state: of the launch.
    """
    argv = sys.argv[1:] if argv is None else argv
    return shlex.join([*_launcher(state), "train_reg.py", *_without(argv, with_value=("--hub_token",))])


def resume_command(argv: list[str] | None, state: PartialState) -> str:
    """How to go on with a run from its newest checkpoint: the same command with --resume auto."""
    argv = sys.argv[1:] if argv is None else argv
    argv = _without(argv, with_value=_RESUME_FLAGS, alone=("--overwrite_output_dir",))
    return launch_command([*argv, "--resume", "auto"], state)


def _launcher(state: PartialState) -> list[str]:
    if state.num_processes == 1:
        return ["accelerate", "launch"]
    machines = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    # The launcher takes several processes on CPUs only this way (accelerate 1.15).
    several = ["accelerate", "launch", "--multi_gpu", "--num_processes", str(state.num_processes)]
    on_cpu = ["env", "ACCELERATE_USE_CPU=true"] if state.device.type == "cpu" else []
    return [*on_cpu, *several, *(["--num_machines", str(machines)] if machines > 1 else [])]


def _without(argv: list[str], with_value: tuple[str, ...], alone: tuple[str, ...] = ()) -> list[str]:
    """The arguments without some flags, given as `--flag value` or as `--flag=value`."""
    kept, skip = [], False
    for word in argv:
        name = word.split("=")[0]
        if not skip and name not in (*with_value, *alone):
            kept.append(word)
        skip = word in with_value
    return kept
