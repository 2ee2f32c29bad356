"""The processes of one launch: how they join, take turns, fail together, and leave."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object

from .errors import UsageError
from .hardware import cpu_is_wanted

__all__ = ["PROCESS_TIMEOUT", "in_turn", "join_processes", "leave_processes", "on_main_process", "together"]

# How long a process waits for another before it gives up. Some work is done by the main process alone, while the
# others wait for it: to decode a large data set takes an hour, a grid of samples of a large network minutes.
# PyTorch's own limits, half an hour, and 10 minutes with NCCL, would end such a run in the midst of its work. A long
# limit costs little: a process that dies closes its connections and is noticed by its launcher, at once; what is
# noticed later is a machine that vanishes without a word, or processes that wait for each other by a mistake in the
# program. The long work after the training, comparison and upload, is not waited for at all: see `leave_processes`.
PROCESS_TIMEOUT = timedelta(hours=3)

Result = TypeVar("Result")


def join_processes() -> PartialState:
    """Joins the processes of one launch.

    Raises:
        UsageError: they do not know of each other, and would train side by side into one folder.
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
    """Calls `work` in all processes; if it fails in one, all fail, so that none waits for one that has left.

    `work` must not wait for other processes.

    Raises:
        UsageError: in the processes where `work` did not fail, if it failed in another.
    """
    result = error = None
    try:
        result = work()
    except Exception as raised:
        error = raised
    problem = None if error is None else str(error) if isinstance(error, UsageError) else repr(error)
    problems = gather_object([problem]) if state.num_processes > 1 else []
    if error is not None:
        raise error
    for process, problem in enumerate(problems):
        if problem is not None:
            raise UsageError(f"process {process}: {problem}")
    return result


def on_main_process(state: PartialState, work: Callable[[], Result]) -> Result | None:
    """Calls `work` in the main process alone, as `together` does; the others wait, and get None."""
    return together(state, work if state.is_main_process else lambda: None)


def in_turn(state: PartialState, work: Callable[[], Result]) -> Result:
    """Calls `work`, which fills caches: in the main process, then in one of each further machine, then in all others.

    So the work is done once where all machines see the same files, and once on each machine where they do not. A
    failure is everybody's, as in `together`.
    """
    turn = 0 if state.is_main_process else 1 if state.is_local_main_process else 2
    results = [together(state, work if turn == now else lambda: None) for now in range(3)]
    return results[turn]


def leave_processes(state: PartialState) -> None:
    """Ends what `join_processes` began, when all have come here; from then on each process is alone.

    So the others need not wait for what the main process still does. And processes that just exit may abort while
    others still talk to them.
    """
    state.wait_for_everyone()
    state.destroy_process_group()
