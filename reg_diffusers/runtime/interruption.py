"""Ends a run early on a signal or a time limit: it finishes the current step and saves."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from accelerate import PartialState

from . import processes
from .errors import warn

__all__ = ["SIGNALS", "Interruption", "Stopped", "stopped_at_once"]

# The signals that end a run; Windows has the first two only.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name))


class Stopped(KeyboardInterrupt):
    """Raised when a signal arrives where nothing needs to be finished; its text is the name of the signal."""


@contextlib.contextmanager
def stopped_at_once() -> Iterator[None]:
    """Context manager: the first signal raises `Stopped`, a second one has the system's default effect."""

    def stop(number: int, _frame) -> None:
        _act_as_usual(before)
        raise Stopped(signal.Signals(number).name)

    before = _handle(stop)
    try:
        yield
    finally:
        _put_back(before)


class Interruption:
    """Records that SIGINT (Ctrl-C), SIGTERM, SIGUSR1 or SIGHUP arrived, or that the time limit has passed.

    A second signal has its default effect at once. Use it as a context manager around the training; at the end, it
    restores the previous handlers. It is true once all processes have agreed to end, see `agreed`.

    Args:
        state: the processes of the launch.
        max_seconds: the time limit from now on; None for no limit.
    """

    def __init__(self, state: PartialState, max_seconds: float | None = None):
        self.name: str | None = None
        self._state = state
        self._deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self._agreed = False
        self._before: dict = {}
        self._is_cut_short = False
        self._asked: tuple | None = None
        # A separate group on CPUs: its messages neither wait for an accelerator nor mix with others.
        is_alone = state.num_processes == 1
        self._group = None if is_alone else dist.new_group(backend="gloo", timeout=processes.PROCESS_TIMEOUT)

    def __bool__(self) -> bool:
        return self._agreed

    def agreed(self) -> bool:
        """Whether all processes end here; call it in all of them before each step.

        With several processes, the answer is that of the previous call, exchanged during the step: no process waits,
        and they end one step later.
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
        """Ends the exchange; call it in all processes before they leave the group."""
        self._hear()
        self._group = None

    def cut_short(self, work: Callable[[], object]) -> None:
        """Calls `work`, which is optional for the training; a signal ends it at once and is recorded.

        `work` must not wait for other processes.
        """
        if self.name is not None:
            return
        try:
            self._is_cut_short = True
            work()
            self._is_cut_short = False
        except Stopped:
            self._agreed = self._group is None
        finally:
            self._is_cut_short = False

    def __enter__(self) -> Interruption:
        self._before = _handle(self._remember)
        if not self._before:
            warn("only the main thread of a process receives signals: this run ends by --max_train_time or itself")
        return self

    def __exit__(self, kind, *_) -> None:
        _put_back(self._before)
        if kind is None:  # after an error, the other processes may never answer
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
        _act_as_usual(self._before)
        is_cut_short, self._is_cut_short = self._is_cut_short, False
        if self._state.is_local_main_process:
            when = "now" if is_cut_short else "after this step"
            _write(f"\n{self.name}: ending {when}; a second signal, or kill {os.getpid()}, ends at once\n")
        if is_cut_short:
            raise Stopped(self.name)


def _handle(handler: Callable) -> dict:
    """Installs a handler for all signals; returns the previous handlers by number, or {} outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    before = {}
    for number in SIGNALS:
        if number.name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN:  # nohup
            continue
        before[number] = signal.signal(number, handler)
    return before


def _put_back(handlers: dict) -> None:
    for number, handler in handlers.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not installed from Python


def _act_as_usual(numbers: dict) -> None:
    for number in numbers:
        signal.signal(number, signal.SIG_DFL)


def _write(text: str) -> None:
    """Writes to stderr from a signal handler; print is not reentrant."""
    try:
        os.write(sys.stderr.fileno(), text.encode())
    except (OSError, ValueError, AttributeError):  # stderr of a notebook has no descriptor; a pipe may be closed
        with contextlib.suppress(Exception):
            sys.stderr.write(text)
