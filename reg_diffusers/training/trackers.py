"""The logger of --logger; the training continues if it fails."""

from __future__ import annotations

from accelerate import Accelerator

from ..runtime.errors import UsageError
from ..runtime.processes import together
from .ending import Ending

__all__ = ["Trackers"]

_FIX = "metrics.jsonl has the same numbers: leave --logger out or repair it"


class Trackers:
    """Passes numbers to the logger until that fails; then the training continues without it.

    Args:
        accelerator: accelerator made with `log_with`.
        logger: name of the logger; None: no logger.
        ending: ending of the run.

    Raises:
        UsageError: the logger cannot be started.
    """

    def __init__(self, accelerator: Accelerator, logger: str | None, ending: Ending):
        self._accelerator = accelerator
        self._ending = ending
        self._name = f"--logger {logger}"
        self._is_available = logger is not None
        if self._is_available:
            together(accelerator.state, self._start)

    def log(self, values: dict[str, float], step: int) -> None:
        """Logs the numbers of a step."""
        if self._is_available:
            what = f"{self._name} at step {step}"
            self._is_available = self._ending.attempt(what, _FIX, lambda: self._accelerator.log(values, step=step))

    def finish(self) -> None:
        """Makes the logger write its remaining numbers."""
        for tracker in self._accelerator.trackers if self._is_available else ():
            self._ending.attempt(f"the end of {self._name}", _FIX, tracker.finish)

    def _start(self) -> None:
        try:
            self._accelerator.init_trackers("train_reg")
        except Exception as error:  # of any kind, because each logger is another package
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UsageError(f"{self._name} cannot be started: {reason}: leave it out or repair it") from error
