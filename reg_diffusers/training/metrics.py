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

from .errors import UsageError
from .output import write_whole

__all__ = ["MetricsLog", "check_finite", "check_logger"]


class MetricsLog:
    """Means of scalars over the steps since the last writing.

    Values are summed on their device and read only when written, so that no step waits for them.

    Args:
        accelerator: joins the means of all processes.
        path: a file to which the main process appends one JSON object per writing.
        step: where the run begins; what the file says of later steps was lost with an interrupted run.
    """

    def __init__(self, accelerator: Accelerator, path: Path, step: int):
        self._accelerator = accelerator
        self._path = path
        if path.is_file() and accelerator.is_main_process:
            # A line that was cut off by a kill is later than the checkpoint, too.
            kept = [
                line
                for line in path.read_text().splitlines()
                if line.endswith("}") and json.loads(line)["step"] <= step
            ]
            write_whole(path, lambda temporary: temporary.write_text("".join(f"{line}\n" for line in kept)))
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


def check_finite(means: dict[str, float], step: int, bar) -> None:
    """Stops a run whose denoising loss is no longer a number, before it overwrites what was good.

    Raises:
        UsageError: with what to try.
    """
    if not math.isfinite(means["denoising"]):
        bar.close()  # so that the message has a line of its own
        raise UsageError(
            f"the denoising loss is {means['denoising']} at step {step}: try a smaller --learning_rate or"
            " --max_grad_norm, or a longer --lr_warmup_steps; checkpoints and pipeline are those from before"
        )


def check_logger(args: argparse.Namespace) -> None:
    """Raises `UsageError` if the package of --logger is not installed; accelerate would go on without it."""
    if args.logger is not None and find_spec(args.logger) is None:
        raise UsageError(f"--logger {args.logger} is not installed: pip install {args.logger}")
