"""Builds the command line of a run to copy and paste: to repeat the run, or to continue it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil
from accelerate import PartialState

__all__ = ["STARTED_AS", "command_before", "launch_command", "resume_command", "start_command"]

# The environment variable by which `reg-diffusers train` passes its own command to the processes that it launches.
STARTED_AS = "REG_DIFFUSERS_STARTED_AS"
_RESUME_FLAGS = ("--resume", "--resume_from_checkpoint")


def launch_command(argv: list[str] | None, state: PartialState, decided: Mapping[str, str] | None = None) -> str:
    """Returns a command for any machine that starts the training with these arguments on as many processes.

    Omits a token among the arguments.

    Args:
        argv: the arguments of the training; None for those of this process.
        state: the state of the launch.
        decided: flags and values to add to the arguments.
    """
    argv = sys.argv[1:] if argv is None else argv
    return _joined(_portable(state), [*argv, *(word for flag in (decided or {}).items() for word in flag)])


def start_command(argv: list[str] | None, state: PartialState) -> str:
    """Returns the command that starts this run again: the one that was typed, without a token.

    A training that was called from Python gets the command of `launch_command`.
    """
    argv = sys.argv[1:] if argv is None else argv
    return _joined(_as_started(argv, state) or _portable(state), argv)


def resume_command(argv: list[str] | None, state: PartialState) -> str:
    """Returns the command that continues a run from its newest checkpoint: the same one with --resume auto."""
    argv = sys.argv[1:] if argv is None else argv
    kept = _without(argv, with_value=_RESUME_FLAGS, alone=("--overwrite_output_dir",))
    return _joined(_as_started(argv, state) or _portable(state), [*kept, "--resume", "auto"])


def command_before(argv: list[str]) -> list[str] | None:
    """Returns the words of this process's own command line before these arguments, as they were typed.

    None if the arguments are not those of the command line, as in a call from Python.
    """
    if sys.argv[1:] not in (argv, ["train", *argv]):
        return None
    before = _before(sys.orig_argv, argv)
    return None if before is None else _as_typed(before)


def _joined(words: list[str], argv: list[str]) -> str:
    return shlex.join([*words, *_without(argv, with_value=("--hub_token",))])


def _as_started(argv: list[str], state: PartialState) -> list[str] | None:
    """Returns the words before the arguments: of `reg-diffusers train`, a launcher, or python with the script."""
    if given := os.environ.get(STARTED_AS):
        return [*_on_cpu(state), *shlex.split(given)]
    own = command_before(argv)
    if own is None:
        return None
    return [*_on_cpu(state), *(_of_launcher(argv) or own)]


def _of_launcher(argv: list[str]) -> list[str] | None:
    """Returns the words of the parent process before the arguments, if the parent is accelerate or torchrun."""
    try:
        words = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return None
    names = " ".join(os.path.basename(word) for word in words[:3])
    if not re.search("accelerate|torchrun|torch.distributed.run", names):
        return None
    before = _before(words, argv)
    return None if before is None else _as_typed(before)


def _before(words: list[str], argv: list[str]) -> list[str] | None:
    place = len(words) - len(argv)
    return list(words[:place]) if words[place:] == argv else None


def _as_typed(words: list[str]) -> list[str]:
    """Returns the words of a command that a shell in the same folder understands; names on the PATH stay short.

    A script with a first line that names its interpreter, such as `reg-diffusers`, is a command by itself.
    """
    python, *rest = words
    if rest and not rest[0].endswith(".py") and Path(rest[0]).is_file() and os.access(rest[0], os.X_OK):
        return [_name(rest[0]), *rest[1:]]
    return [_name(python), *rest]


def _name(program: str) -> str:
    """Returns the short name of a program if a shell finds this program by it."""
    name = os.path.basename(program)
    found = shutil.which(name)
    return name if found and os.path.abspath(found) == os.path.abspath(program) else program


def _on_cpu(state: PartialState) -> list[str]:
    is_wanted = state.num_processes > 1 and state.device.type == "cpu"
    return ["env", "ACCELERATE_USE_CPU=true"] if is_wanted else []


def _portable(state: PartialState) -> list[str]:
    is_script = os.path.basename(sys.argv[0]) == "train_reg.py"
    if state.num_processes == 1:
        return ["accelerate", "launch", "train_reg.py"] if is_script else ["reg-diffusers", "train"]
    machines = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    # The only way to launch several processes on CPUs (accelerate 1.15).
    several = ["accelerate", "launch", "--multi_gpu", "--num_processes", str(state.num_processes)]
    several += ["--num_machines", str(machines)] if machines > 1 else []
    return [*_on_cpu(state), *several, *(["train_reg.py"] if is_script else ["-m", "reg_diffusers", "train"])]


def _without(argv: list[str], with_value: tuple[str, ...], alone: tuple[str, ...] = ()) -> list[str]:
    """Removes flags from the arguments, written as `--flag value` or `--flag=value`."""
    kept, skip = [], False
    for word in argv:
        name = word.split("=")[0]
        if not skip and name not in (*with_value, *alone):
            kept.append(word)
        skip = word in with_value
    return kept
