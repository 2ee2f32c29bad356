"""Ends a run: reports what failed beside the training, and sets the exit status and the command that continues."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from accelerate import PartialState
from tqdm.auto import tqdm

from ..runtime.errors import UsageError
from ..runtime.interruption import Stopped, stopped_at_once
from ..runtime.launch import start_command
from ..runtime.output_streams import lasting_output
from ..trial.tracing import line_of_error

__all__ = ["Ending", "ended_well"]


class Ending:
    """Keeps failures beside the training, such as a preview, from costing a trained model.

    Args:
        command: command that starts the run again while nothing is saved.

    Attributes:
        command: command that continues the run; replaced as soon as there is something to resume from.
        failures: descriptions of what failed.
        is_stopped: whether a signal or the time limit ended the run.
    """

    def __init__(self, command: str):
        self.command = command
        self.failures: list[str] = []
        self.is_stopped = False

    def attempt(self, what: str, fix: str, work: Callable[[], object]) -> bool:
        """Calls `work`; a failure prints one line on stderr and makes the exit status 1.

        Args:
            what: what `work` does, such as "the preview of step 5".
            fix: what the user can do about a failure.
            work: function to call. It must not wait for other processes.

        Returns:
            Whether `work` succeeded.
        """
        try:
            work()
        except Exception as error:
            self.failures.append(what)
            reason = " ".join(str(error).split())
            kind = "" if isinstance(error, UsageError) else f"{type(error).__name__}: "
            tqdm.write(f"error: {what} failed: {kind}{reason} ({line_of_error(error)}); {fix}", file=sys.stderr)
            return False
        return True


@contextlib.contextmanager
def ended_well(argv: list[str] | None, state: PartialState) -> Iterator[Ending]:
    """Wraps a whole run: lost output and failures beside the training end it with status 1, a signal with 0.

    Ctrl-C also ends the programs after a `|`, such as `tee`: after a signal, lost output is no failure.

    Args:
        argv: arguments of the script; None: those of this process.
        state: processes of the launch.
    """
    ending = Ending(start_command(argv, state))
    with lasting_output() as streams:
        try:
            with stopped_at_once():
                yield ending
        except Stopped as stopped:
            ending.is_stopped = True
            if state.is_local_main_process:
                print(f"\nstopped by {stopped}; continue with: {ending.command}")
        if ending.failures:
            print(f"failed      {', '.join(dict.fromkeys(ending.failures))}; the rest is saved: see the lines above")
    if ending.failures or (any(stream.is_lost for stream in streams) and not ending.is_stopped):
        sys.exit(1)
