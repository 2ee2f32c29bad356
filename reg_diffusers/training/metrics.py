"""Numbers of a running training: to metrics.jsonl, to a logger, to the progress bar."""

from __future__ import annotations

import argparse
import json
import math
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from ..files import write_whole
from .errors import UsageError

__all__ = ["JsonLines", "MetricsLog", "check_logger"]

_COUNT = "batches"  # among the sums: how many batches they are of


class JsonLines:
    """A file of one JSON object per line, each with the step that it is about; made by its first line.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path):
        self.path = path

    def append(self, line: dict) -> None:
        """Adds a line; what is no number becomes null, because JSON has no word for it."""
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in line.items()
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(finite) + "\n")

    def drop_later_than(self, step: int) -> None:
        """Leaves out the lines of later steps, which were lost with an interrupted run."""
        if not self.path.is_file():
            return
        # A line that was cut off by a kill is later than the checkpoint, too.
        lines = [line for line in self.path.read_text().splitlines() if line.endswith("}")]
        kept = [f"{line}\n" for line in lines if json.loads(line)["step"] <= step]
        write_whole(self.path, lambda temporary: temporary.write_text("".join(kept)))


class MetricsLog:
    """Means of scalars over the steps since the last writing.

    Values are summed on their device and read only when written, so that no step waits for them. A batch whose loss
    is not finite does not count.

    Args:
        accelerator: joins the means of all processes.
        path: a file to which the main process appends one JSON object per writing.
    """

    def __init__(self, accelerator: Accelerator, path: Path):
        self._accelerator = accelerator
        self._log = JsonLines(path)
        self._sums: dict[str, Tensor] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        """Adds the scalars of one batch, with its "loss" among them."""
        finite = values["loss"].detach().isfinite()
        for name, value in {_COUNT: finite.float(), **values}.items():
            self._sums[name] = self._sums.get(name, 0) + torch.where(finite, value.detach(), 0)

    def write(self, step: int, **more: float) -> dict[str, float]:
        """The means since the last call over all processes, which are also appended to the file."""
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
        """Drops from the file what a run that was cut off had written of later steps."""
        if self._accelerator.is_main_process:
            self._log.drop_later_than(step)


def check_logger(args: argparse.Namespace) -> None:
    """Raises `UsageError` if the package of --logger is not installed; accelerate would go on without it."""
    if args.logger is not None and find_spec(args.logger) is None:
        raise UsageError(f"--logger {args.logger} is not installed: pip install {args.logger}")
