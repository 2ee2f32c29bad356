"""Skips optimizer steps with a non-finite loss or gradient on all processes, and reports them."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor

from ..networks.sharded import whole
from ..runtime.errors import UsageError
from .metrics import JsonLines

__all__ = ["BadSteps", "TooManyBadSteps"]


class TooManyBadSteps(UsageError):
    """Ends a training after too many consecutive steps with a non-finite loss or gradient.

    Attributes:
        steps: number of consecutive steps.
        limit: value of --max_bad_steps.
        log: file that lists the images and timesteps.
    """

    def __init__(self, steps: int, limit: int, log: Path):
        super().__init__(
            f"{steps} steps in a row had a non-finite loss or gradient (--max_bad_steps {limit}): try a"
            " smaller --learning_rate or --max_grad_norm, a longer --lr_warmup_steps or --mixed_precision no;"
            f" {log} lists their images and timesteps"
        )
        self.steps, self.limit, self.log = steps, limit, log


class BadSteps:
    """Keeps non-finite values out of the weights, without reading from the device in a step.

    A non-finite loss makes the gradient non-finite, and the reduction of the gradients passes this on to every
    process. A fused optimizer skips a step on the device if `found_inf` marks it, as for gradient scaling. `compute`
    reads the marks at intervals. A gradient scaler and DeepSpeed handle overflows of the gradient themselves; then
    only the loss is checked.

    Args:
        accelerator: accelerator of the training.
        path: file to which the main process appends one JSON object per batch of a bad step.
        max_in_a_row: number of consecutive bad steps that ends the training.

    Attributes:
        count: number of bad steps so far.
        in_a_row: number of consecutive bad steps up to the last step read.
    """

    def __init__(self, accelerator: Accelerator, path: Path, max_in_a_row: int):
        self.count = self.in_a_row = 0
        self.max_in_a_row = max_in_a_row
        self._accelerator = accelerator
        self._log = JsonLines(path)
        self._batches: list[tuple[Tensor, Tensor, Tensor]] = []  # of the current step
        self._steps: list[tuple[int, Tensor, list]] = []  # since the last `compute`

    def guard(self, loss: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        """Returns the loss of a batch; if it is non-finite, so is each of its gradients.

        Args:
            loss: loss of the batch, a scalar.
            timesteps: timesteps of the images, (B,).
            ids: rows of the images in the data set, (B,).
        """
        finite = loss.detach().isfinite()
        self._batches.append((finite, timesteps, ids))
        return loss * torch.where(finite, 1.0, math.nan)

    def update(self, step: int, optimizer, gradient_norm: Tensor) -> None:
        """Makes the optimizer skip its next step if the gradient is non-finite.

        Args:
            step: number of the step.
            optimizer: a fused optimizer, as prepared by Accelerate.
            gradient_norm: norm of the gradient, a scalar that is equal on all processes; it may be sharded.
        """
        skips_by_itself = self._accelerator.distributed_type == DistributedType.DEEPSPEED  # and has already skipped it
        if self._accelerator.scaler is None and not skips_by_itself:
            bad = ~whole(gradient_norm).isfinite()
            optimizer.optimizer.found_inf = bad.float()
        else:
            bad = ~torch.stack([finite for finite, *_ in self._batches]).all()
        self._steps.append((step, bad, self._batches))
        self._batches = []

    def compute(self) -> list[str]:
        """Reads the marks since the last call. All processes call it; the main process gets the lines to print."""
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
            f"step {step} is skipped: its loss or gradient is not finite; see {self._log.path}"
            for step, _ in bad_steps
        ]

    def problem(self) -> TooManyBadSteps | None:
        """Returns the error that must end the training; None if it can continue."""
        if self.in_a_row < self.max_in_a_row:
            return None
        return TooManyBadSteps(self.in_a_row, self.max_in_a_row, self._log.path)

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count, self.in_a_row = state["count"], state["in_a_row"]

    def forget_later_than(self, step: int) -> None:
        """Removes the lines of later steps, which an interrupted run wrote."""
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
