"""The processes of one launch: how they join, take turns, fail together, and leave."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object

from .errors import UsageError
from .hardware import cpu_is_wanted

__all__ = [
    "PROCESS_TIMEOUT",
    "FailedElsewhere",
    "Failure",
    "in_turn",
    "join_processes",
    "leave_processes",
    "on_main_process",
    "together",
]

# How long a process waits for another before it gives up. Some work runs in the main process only, while the others
# wait: decoding a large data set takes an hour, a grid of samples from a large network takes minutes. The limits of
# PyTorch, 30 minutes, or 10 with NCCL, would end such a run in the middle of its work. A long limit costs little: a
# process that dies closes its connections, and its launcher notices at once. Only a machine that vanishes silently, or
# a deadlock through a program error, is noticed later. No process waits for the long work after the training,
# comparison and upload: see `leave_processes`.
PROCESS_TIMEOUT = timedelta(hours=3)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Failure:
    """A failure in one process, in a form that can be sent to every process.

    Attributes:
        process: index of the process.
        reason: the message of a `UsageError`, or the representation of any other error.
    """

    process: int
    reason: str

    @classmethod
    def of(cls, error: Exception, process: int) -> Failure:
        return cls(process, str(error) if isinstance(error, UsageError) else repr(error))


class FailedElsewhere(UsageError):
    """Raised in a process because another one failed.

    Attributes:
        failure: the failure of that process.
    """

    def __init__(self, failure: Failure):
        super().__init__(f"process {failure.process}: {failure.reason}")
        self.failure = failure


def join_processes() -> PartialState:
    """Joins the processes of one launch.

    Raises:
        UsageError: if the processes did not join, so that each would train on its own into the same folder.
    """
    state = PartialState(cpu=cpu_is_wanted(), timeout=PROCESS_TIMEOUT)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != state.num_processes:
        raise UsageError(
            f"{launched} processes were launched, but accelerate joined {state.num_processes}: without GPUs, launch"
            " with ACCELERATE_USE_CPU=true in the environment"
        )
    return state


def together(state: PartialState, work: Callable[[], Result]) -> Result:
    """Calls `work` in all processes; if it fails in one, all fail, so no process waits for one that has left.

    `work` must not wait for other processes.

    Raises:
        FailedElsewhere: in the processes where `work` did not fail, if it failed in another.
    """
    result = error = None
    try:
        result = work()
    except Exception as raised:
        error = raised
    own = [] if error is None else [Failure.of(error, state.process_index)]
    failures = gather_object(own) if state.num_processes > 1 else []
    if error is not None:
        raise error
    if failures:
        raise FailedElsewhere(failures[0])
    return result


def on_main_process(state: PartialState, work: Callable[[], Result]) -> Result | None:
    """Calls `work` in the main process only, like `together`; the other processes wait and get None."""
    return together(state, work if state.is_main_process else lambda: None)


def in_turn(state: PartialState, work: Callable[[], Result]) -> Result:
    """Calls `work`, which fills caches, first in the main process, then in one process per machine, then in the rest.

    So the work runs once if all machines share their files, else once per machine. If it fails in one process, all
    fail, as in `together`.
    """
    turn = 0 if state.is_main_process else 1 if state.is_local_main_process else 2
    results = [together(state, work if turn == now else lambda: None) for now in range(3)]
    return results[turn]


def leave_processes(state: PartialState) -> None:
    """Waits for all processes and ends the process group; from then on, each process is on its own.

    So the others do not wait for the remaining work of the main process. Without it, processes that exit could abort
    while others still communicate with them.
    """
    state.wait_for_everyone()
    state.destroy_process_group()
