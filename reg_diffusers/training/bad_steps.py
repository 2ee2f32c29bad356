"""Optimizer steps whose loss or gradient is no number: left out by all processes together, counted, told."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor

from .metrics import JsonLines

__all__ = ["BadSteps"]


class BadSteps:
    """Keeps what is no number out of the weights, without a look at the device in the step.

    A loss that is not finite becomes a gradient that is not finite, which reaches every process with the gradients
    themselves; and a fused optimizer leaves out, on the device, a step that is marked by `found_inf`, as it does for
    gradient scaling. The marks are read at intervals, by `look`. An overflow that a gradient scaler or DeepSpeed meets
    is its own affair: then only the loss counts.

    Args:
        accelerator: of the training.
        path: a file to which the main process appends one JSON object per batch of a bad step.
        max_in_a_row: steps in a row after which `too_many` is true.

    Attributes:
        count: bad steps so far.
        in_a_row: bad steps at the end of those looked at.
    """

    def __init__(self, accelerator: Accelerator, path: Path, max_in_a_row: int):
        self.count = self.in_a_row = 0
        self.max_in_a_row = max_in_a_row
        self._accelerator = accelerator
        self._log = JsonLines(path)
        self._batches: list[tuple[Tensor, Tensor, Tensor]] = []  # of the step under way
        self._steps: list[tuple[int, Tensor, list]] = []  # since the last look

    @property
    def too_many(self) -> bool:
        return self.in_a_row >= self.max_in_a_row

    def spread(self, loss: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        """The loss of a batch; where it is not finite, neither is any gradient of it.

        Args:
            loss: scalar.
            timesteps: (B,) of the images.
            ids: (B,) their rows in the data set.
        """
        finite = loss.detach().isfinite()
        self._batches.append((finite, timesteps, ids))
        return loss * torch.where(finite, 1.0, math.nan)

    def mark(self, step: int, optimizer, gradient_norm: Tensor) -> None:
        """Makes the optimizer leave out its next step if the gradient is not finite.

        Args:
            step: number of the step.
            optimizer: a fused one, as prepared by accelerate.
            gradient_norm: scalar, the same on all processes.
        """
        skips_by_itself = self._accelerator.distributed_type == DistributedType.DEEPSPEED  # and has done so already
        if self._accelerator.scaler is None and not skips_by_itself:
            bad = ~gradient_norm.isfinite()
            optimizer.optimizer.found_inf = bad.float()
        else:
            bad = ~torch.stack([finite for finite, *_ in self._batches]).all()
        self._steps.append((step, bad, self._batches))
        self._batches = []

    def look(self) -> list[str]:
        """Reads the marks since the last look, on all processes; returns what to tell of them, on the main process."""
        if not self._steps:
            return []
        steps, self._steps = self._steps, []
        marks = self._accelerator.reduce(torch.stack([bad.float() for _, bad, _ in steps]), "sum").tolist()
        bad_steps = []
        for (step, _, batches), mark in zip(steps, marks, strict=True):
            self.in_a_row = self.in_a_row + 1 if mark else 0
            if mark:
                self.count += 1
                bad_steps.append((step, batches))
        if not bad_steps:
            return []
        found = gather_object([self._described(step, *batch) for step, batches in bad_steps for batch in batches])
        if not self._accelerator.is_main_process:
            return []
        for line in found:
            self._log.append(line)
        return [
            f"step {step} is left out: its loss or gradient is not finite; see {self._log.path}"
            for step, _ in bad_steps
        ]

    def advice(self) -> str:
        """What to try when there are too many."""
        return (
            f"{self.in_a_row} steps in a row had a loss or gradient that is not finite (--max_bad_steps"
            f" {self.max_in_a_row}): try a smaller --learning_rate or --max_grad_norm, a longer --lr_warmup_steps or"
            f" --mixed_precision no; {self._log.path} names their images and timesteps"
        )

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count, self.in_a_row = state["count"], state["in_a_row"]

    def forget_later_than(self, step: int) -> None:
        """Drops from the file what a run that was cut off had written of later steps."""
        if self._accelerator.is_main_process:
            self._log.drop_later_than(step)

    def _described(self, step: int, finite: Tensor, timesteps: Tensor, ids: Tensor) -> dict:
        return {
            "step": step,
            "process": self._accelerator.process_index,
            "loss_is_finite": bool(finite),
            "timesteps": timesteps.tolist(),
            "images": ids.tolist(),
        }
