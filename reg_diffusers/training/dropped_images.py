"""Counts images with a non-finite extra loss over all processes, and stops all of them if there are too many."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from ..nonfinite import NonFiniteGuard, advice
from ..runtime.errors import UsageError

__all__ = ["DroppedImages", "TooManyDroppedImages"]


class TooManyDroppedImages(UsageError):
    """Ends a training in which L' of one term is non-finite for too many consecutive steps.

    Attributes:
        name: name of the term.
        steps: number of consecutive steps.
        images: total number of dropped images.
        timesteps: timesteps of the images that were dropped last.

    Args:
        remedy: what to change in the term's view, see `NonFiniteGuard.remedy`.
    """

    def __init__(self, name: str, steps: int, images: int, timesteps: list[float], remedy: str = ""):
        super().__init__(advice(name, steps, images, timesteps, remedy))
        self.name, self.steps, self.images, self.timesteps = name, steps, images, timesteps


class DroppedImages:
    """Counts the images that a guard drops in each step, summed over the processes and read at intervals.

    A guard that raises would end its own process only, and the others would wait for it. Here all processes get the
    same counts at the same step. A step counts if any of its batches has dropped images on any process, so the counts
    and the end of the training do not depend on how a batch is divided.

    Args:
        accelerator: accelerator of the training.
        guard: guard of this process; it must not raise.
        names: names of all terms.
        max_in_a_row: number of consecutive steps with dropped images of one term that ends the training.
    """

    def __init__(self, accelerator: Accelerator, guard: NonFiniteGuard, names: list[str], max_in_a_row: int):
        self.max_in_a_row = max_in_a_row
        self._accelerator = accelerator
        self._guard = guard
        self._dropped = dict.fromkeys(names, 0)
        self._in_a_row = dict.fromkeys(names, 0)
        self._before = self._now()
        self._steps: list[Tensor] = []  # since the last `compute`

    def update(self) -> None:
        """Adds the finished optimizer step, without reading from the device."""
        now = self._now()
        self._steps.append(now - self._before)
        self._before = now

    def compute(self) -> None:
        """Reads the steps since the last call, on all processes."""
        if not self._steps or not self._dropped:
            return
        steps, self._steps = torch.stack(self._steps), []
        for images in self._accelerator.reduce(steps, "sum").tolist():
            for name, number in zip(self._dropped, images, strict=True):
                self._dropped[name] += number
                self._in_a_row[name] = self._in_a_row[name] + 1 if number else 0

    def counts(self) -> dict[str, int]:
        """Returns the number of images dropped so far on all processes, by "nonfinite/" and the term's name."""
        return {f"nonfinite/{name}": count for name, count in self._dropped.items()}

    def problem(self) -> TooManyDroppedImages | None:
        """Returns the error that must end the training, or None. All processes must call it, and get the same."""
        for name, steps in self._in_a_row.items():
            if steps >= self.max_in_a_row:
                timesteps = gather_object(self._guard.last_timesteps(name))
                return TooManyDroppedImages(name, steps, self._dropped[name], timesteps, self._guard.remedy(name))
        return None

    def state_dict(self) -> dict[str, dict[str, int]]:
        return {"dropped": dict(self._dropped), "in_a_row": dict(self._in_a_row)}

    def load_state_dict(self, state: dict[str, dict[str, int]]) -> None:
        for counts, saved in ((self._dropped, state["dropped"]), (self._in_a_row, state["in_a_row"])):
            counts.update({name: saved[name] for name in counts if name in saved})

    def _now(self) -> Tensor:
        """Returns the number of images that the guard has dropped so far, (number of terms,)."""
        counts = [torch.as_tensor(self._guard.dropped.get(name, 0)) for name in self._dropped]
        device = self._accelerator.device
        return torch.stack([count.to(device) for count in counts]) if counts else torch.zeros(0, device=device)
