"""Logs the numbers of a training: means over steps, in metrics.jsonl."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from ..runtime.errors import UsageError, warn
from ..runtime.files import write_whole

__all__ = ["LOG_NAMES", "JsonLines", "MetricsLog", "check_logger"]

_COUNT = "batches"  # among the sums: the number of batches
LOG_NAMES = ("step", "loss", "denoising", "lr", "bad_steps", _COUNT)  # names that a term cannot have


class JsonLines:
    """Writes a file with one JSON object per line, each with its step; the first line creates the file.

    Args:
        path: path of the file.
    """

    def __init__(self, path: Path):
        self.path = path

    def append(self, line: dict) -> None:
        """Appends a line; non-finite numbers become null, because JSON cannot represent them."""
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in line.items()
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(finite) + "\n")

    def drop_later_than(self, step: int) -> None:
        """Removes the lines of later steps, which an interrupted run lost; reports lines that cannot be read."""
        if not self.path.is_file():
            return
        lines = self.path.read_bytes().split(b"\n")
        steps = [_step(line) for line in lines]
        kept = [line for line, found in zip(lines, steps, strict=True) if found is not None and found <= step]
        # An incomplete last line was cut off when the process was killed, and is later than the checkpoint.
        if unread := sum(found is None and bool(line.strip()) for line, found in zip(lines[:-1], steps, strict=False)):
            warn(f"{self.path}: {unread} lines cannot be read and are removed")
        write_whole(self.path, lambda temporary: temporary.write_bytes(b"".join(line + b"\n" for line in kept)))


def _step(line: bytes) -> int | None:
    """Returns the step of a line; None for a line without one."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if isinstance(step, int) else None


class MetricsLog:
    """Writes means of scalars over the steps since the last `write`.

    Values are summed on their device and read only when written, so no step waits for them. A batch with a non-finite
    loss does not count.

    Args:
        accelerator: accelerator of the training, which reduces the means over all processes.
        path: file to which the main process appends one JSON object per `write`.
    """

    def __init__(self, accelerator: Accelerator, path: Path):
        self._accelerator = accelerator
        self._log = JsonLines(path)
        self._sums: dict[str, Tensor] = {}

    def update(self, values: dict[str, Tensor]) -> None:
        """Adds the scalars of one batch, including "loss"."""
        finite = values["loss"].detach().isfinite()
        for name, value in {_COUNT: finite.float(), **values}.items():
            self._sums[name] = self._sums.get(name, 0) + torch.where(finite, value.detach(), 0)

    def write(self, step: int, **more: float) -> dict[str, float]:
        """Returns the means since the last call over all processes, and appends them to the file."""
        names = list(self._sums)
        sums = self._accelerator.reduce(torch.stack([self._sums[name].float() for name in names]), "sum")
        sums = dict(zip(names, sums.tolist(), strict=True))
        count = sums.pop(_COUNT)
        means = {name: value / count if count else math.nan for name, value in sums.items()} | more
        self._sums = {}
        if self._accelerator.is_main_process:
            self._log.append({"step": step, **means})
        return means

    def state_dict(self) -> dict[str, float]:
        return {name: value.item() for name, value in self._sums.items()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._sums = {name: torch.tensor(value, device=self._accelerator.device) for name, value in state.items()}

    def forget_later_than(self, step: int) -> None:
        """Removes the lines of later steps, which an interrupted run wrote."""
        if self._accelerator.is_main_process:
            self._log.drop_later_than(step)


def check_logger(logger: str | None) -> None:
    """Raises `UsageError` if the package of --logger is not installed; Accelerate would continue without it."""
    if logger is not None and find_spec(logger) is None:
        raise UsageError(f"--logger {logger} is not installed: pip install {logger}")
