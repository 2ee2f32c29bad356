"""Numbers of a running training: to metrics.jsonl, to a logger, to the progress bar."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

__all__ = ["MetricsLog"]


class MetricsLog:
    """Means of scalars over the steps since the last writing.

    Values are summed on their device and read only when written, so that no step waits for them.

    Args:
        accelerator: joins the means of all processes.
        path: a file to which the main process appends one JSON object per writing.
    """

    def __init__(self, accelerator: Accelerator, path: Path):
        self._accelerator = accelerator
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._sums: dict[str, Tensor] = {}
        self._steps = 0

    def add(self, values: dict[str, Tensor]) -> None:
        """Adds the scalars of one step."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach()
        self._steps += 1

    def write(self, step: int, **more: float) -> dict[str, float]:
        """The means since the last call over all processes, which are also appended to the file."""
        names = list(self._sums)
        sums = self._accelerator.reduce(torch.stack([self._sums[name].float() for name in names]), "mean")
        means = {name: value / self._steps for name, value in zip(names, sums.tolist(), strict=True)} | more
        self._sums, self._steps = {}, 0
        if self._accelerator.is_main_process:
            with self._path.open("a") as file:
                file.write(json.dumps({"step": step, **means}) + "\n")
        return means
