"""What asks a run to end before its last step: a signal, or its time. It finishes its step and saves."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch
import torch.distributed as dist
from accelerate import PartialState

from . import processes

__all__ = ["Interruption"]


class Interruption:
    """Remembers that SIGINT (Ctrl-C), SIGTERM or SIGUSR1 arrived, or that the time is over.

    A second signal acts as usual, at once. Use as a context manager around the training; the handlers before it are
    put back. It is true when all processes have agreed to end, which `agreed` finds out.

    Args:
        state: the processes of the launch.
        max_seconds: from now on.
    """

    def __init__(self, state: PartialState, max_seconds: float | None = None):
        self.name: str | None = None
        self._state = state
        self._deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self._agreed = False
        self._before: dict = {}
        self._asked: tuple | None = None
        # Of its own and on CPUs, so that asking neither waits for an accelerator nor meets other messages.
        is_alone = state.num_processes == 1
        self._group = None if is_alone else dist.new_group(backend="gloo", timeout=processes.PROCESS_TIMEOUT)

    def __bool__(self) -> bool:
        return self._agreed

    def agreed(self) -> bool:
        """Whether all processes end here; to be asked by all of them before each step.

        Several processes get the answer to the question of the step before, which has travelled meanwhile: nobody
        waits, and they end one step later.
        """
        if self._deadline is not None and time.monotonic() > self._deadline:
            self.name = self.name or "the time limit"
        if self._group is None:
            self._agreed = self.name is not None
            return self._agreed
        self._hear()
        if not self._agreed:
            wanted = torch.tensor(int(self.name is not None))
            self._asked = dist.all_reduce(wanted, dist.ReduceOp.MAX, self._group, async_op=True), wanted
        return self._agreed

    def stop_asking(self) -> None:
        """Before the processes leave each other; to be called by all of them."""
        self._hear()
        self._group = None

    def __enter__(self) -> Interruption:
        names = [name for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
        self._before = {
            number: signal.signal(number, self._remember) for number in map(signal.Signals.__getitem__, names)
        }
        return self

    def __exit__(self, kind, *_) -> None:
        self._restore()
        if kind is None:  # after an error the others may never answer
            self._hear()

    def _hear(self) -> None:
        if self._asked is None:
            return
        work, wanted = self._asked
        self._asked = None
        work.wait()
        if wanted.item():
            self._agreed = True
            self.name = self.name or "a signal to another process"

    def _remember(self, number: int, _frame) -> None:
        self.name = signal.Signals(number).name
        self._restore()
        if self._state.is_local_main_process:
            # Not by print, which must not be entered twice.
            os.write(sys.stderr.fileno(), f"\n{self.name}: ending after this step; again ends at once\n".encode())

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
