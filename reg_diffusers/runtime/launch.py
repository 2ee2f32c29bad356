"""Builds the command line of a run to copy and paste: to repeat the run, or to continue it."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping

import psutil
from accelerate import PartialState

__all__ = ["launch_command", "resume_command"]

_RESUME_FLAGS = ("--resume", "--resume_from_checkpoint")


def launch_command(argv: list[str] | None, state: PartialState, decided: Mapping[str, str] | None = None) -> str:
    """Returns the command that starts train_reg.py with these arguments on as many processes.

    Omits a token among the arguments.

    Args:
        argv: the arguments of the script; None for those of this process.
        state: the state of the launch.
        decided: flags and values to add to the arguments.
    """
    argv = sys.argv[1:] if argv is None else argv
    return _joined(_launcher(state), [*argv, *(word for flag in (decided or {}).items() for word in flag)])


def resume_command(argv: list[str] | None, state: PartialState) -> str:
    """Returns the command that continues a run from its newest checkpoint: the same one with --resume auto.

    Includes the flags of the launcher of this process, such as its configuration, if they can be read.
    """
    argv = sys.argv[1:] if argv is None else argv
    argv = _without(argv, with_value=_RESUME_FLAGS, alone=("--overwrite_output_dir",))
    return _joined(_own_launcher(state) or _launcher(state), [*argv, "--resume", "auto"])


def _joined(launcher: list[str], argv: list[str] | None) -> str:
    argv = sys.argv[1:] if argv is None else argv
    return shlex.join([*launcher, "train_reg.py", *_without(argv, with_value=("--hub_token",))])


def _own_launcher(state: PartialState) -> list[str] | None:
    """Returns the command of the parent process up to the script, if the parent is accelerate or torchrun."""
    try:
        words = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return None
    names = [os.path.basename(word) for word in words]
    script = os.path.basename(sys.argv[0])
    if script not in names or not re.search("accelerate|torchrun|torch.distributed.run", " ".join(names)):
        return None
    end = names.index(script)
    if names[1] in ("accelerate", "accelerate-launch", "torchrun"):  # else python -m ...
        return [*_on_cpu(state), names[1], *words[2:end]]
    return [*_on_cpu(state), "python", *words[1:end]]


def _on_cpu(state: PartialState) -> list[str]:
    is_wanted = state.num_processes > 1 and state.device.type == "cpu"
    return ["env", "ACCELERATE_USE_CPU=true"] if is_wanted else []


def _launcher(state: PartialState) -> list[str]:
    if state.num_processes == 1:
        return ["accelerate", "launch"]
    machines = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    # The only way to launch several processes on CPUs (accelerate 1.15).
    several = ["accelerate", "launch", "--multi_gpu", "--num_processes", str(state.num_processes)]
    return [*_on_cpu(state), *several, *(["--num_machines", str(machines)] if machines > 1 else [])]


def _without(argv: list[str], with_value: tuple[str, ...], alone: tuple[str, ...] = ()) -> list[str]:
    """Removes flags from the arguments, written as `--flag value` or `--flag=value`."""
    kept, skip = [], False
    for word in argv:
        name = word.split("=")[0]
        if not skip and name not in (*with_value, *alone):
            kept.append(word)
        skip = word in with_value
    return kept
