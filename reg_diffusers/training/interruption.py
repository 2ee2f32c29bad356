"""Signals that ask a run to end: it finishes its step and saves."""

from __future__ import annotations

import signal

import torch
from accelerate import Accelerator

__all__ = ["Interruption"]


class Interruption:
    """Remembers that SIGINT (Ctrl-C), SIGTERM or SIGUSR1 arrived; a second one acts as usual, at once.

    Use as a context manager around the training; the handlers before it are put back.
    """

    def __init__(self):
        self.name: str | None = None
        self._before: dict = {}

    def __bool__(self) -> bool:
        return self.name is not None

    def seen_by_any(self, accelerator: Accelerator, step: int, interval: int = 10) -> bool:
        """Whether a signal reached any process, the same answer on all; several processes ask every `interval` steps,
        because asking waits for all of them.
        """
        if accelerator.num_processes == 1:
            return bool(self)
        if step % interval:
            return False
        seen = accelerator.reduce(torch.tensor(float(bool(self)), device=accelerator.device))
        if seen and not self:
            self.name = "a signal to another process"
        return bool(self)

    def __enter__(self) -> Interruption:
        names = [name for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
        self._before = {
            number: signal.signal(number, self._remember) for number in map(signal.Signals.__getitem__, names)
        }
        return self

    def __exit__(self, *_) -> None:
        self._restore()

    def _remember(self, number: int, _frame) -> None:
        self.name = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
