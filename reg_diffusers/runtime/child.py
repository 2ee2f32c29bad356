"""Runs another command to its end, and hands signals on to the training in it."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
from collections.abc import Mapping

import psutil

from .interruption import SIGNALS

__all__ = ["run_to_its_end"]


def run_to_its_end(command: list[str], environment: Mapping[str, str] | None = None, program: str = "") -> int:
    """Runs a command and waits for it; returns its exit status, or 128 and the number of the signal that ended it.

    A launcher that receives a signal abandons or kills its processes. So the command runs in a session of its own,
    where Ctrl-C in the terminal does not reach it, and signals are handed on to those of its processes that train:
    they save, end, and the launcher ends with them.

    Args:
        command: the words of the command.
        environment: its environment; None for that of this process.
        program: a word in the command line of the processes that get the signals; without it, or if there are none
            yet, the command itself gets them.
    """
    process = subprocess.Popen(command, env=environment, start_new_session=True)

    def hand_on(number: int, _frame) -> None:
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            for receiver in _trainings(process.pid, program) or [process]:
                with contextlib.suppress(ProcessLookupError, psutil.Error):
                    receiver.send_signal(number)

    received = [number for number in SIGNALS if _is_received(number)]
    before = {number: signal.signal(number, hand_on) for number in received}
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status


def _is_received(number: signal.Signals) -> bool:
    """Whether this process may handle a signal: only in the main thread, and no SIGHUP under nohup."""
    is_ignored = number.name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN
    return threading.current_thread() is threading.main_thread() and not is_ignored


def _trainings(launcher: int, program: str) -> list[psutil.Process]:
    if not program:
        return []
    return [child for child in psutil.Process(launcher).children() if program in child.cmdline()]
