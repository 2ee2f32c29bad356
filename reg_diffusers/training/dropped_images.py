"""Images whose extra loss is no number, counted over all processes, which stop together when there are too many."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from ..nonfinite import NonFiniteGuard, advice

__all__ = ["DroppedImages"]


class DroppedImages:
    """Reads at intervals what a guard has dropped in each step, summed over the processes.

    A guard that raises by itself ends its own process, while the others wait for it; here all learn the same at the
    same step. A step has such images if any batch of it has, on any process, so that neither the counts nor the end
    depend on how a batch is divided.

    Args:
        accelerator: of the training.
        guard: of this process; it must not raise by itself.
        names: of all terms.
        max_in_a_row: steps in a row with such images of one term, after which `problem` tells.
    """

    def __init__(self, accelerator: Accelerator, guard: NonFiniteGuard, names: list[str], max_in_a_row: int):
        self.max_in_a_row = max_in_a_row
        self._accelerator = accelerator
        self._guard = guard
        self._dropped = dict.fromkeys(names, 0)
        self._in_a_row = dict.fromkeys(names, 0)
        self._before = self._now()
        self._steps: list[Tensor] = []  # since the last look

    def mark(self) -> None:
        """Takes note of the optimizer step that is done, without a look at the device."""
        now = self._now()
        self._steps.append(now - self._before)
        self._before = now

    def look(self) -> None:
        """Reads the steps since the last look, on all processes."""
        if not self._steps or not self._dropped:
            return
        steps, self._steps = torch.stack(self._steps), []
        for images in self._accelerator.reduce(steps, "sum").tolist():
            for name, number in zip(self._dropped, images, strict=True):
                self._dropped[name] += number
                self._in_a_row[name] = self._in_a_row[name] + 1 if number else 0

    def counts(self) -> dict[str, int]:
        """Images dropped so far by all processes, by "nonfinite/" and the term's name."""
        return {f"nonfinite/{name}": count for name, count in self._dropped.items()}

    def problem(self) -> str | None:
        """What to tell when one term has too many; the same on all processes, to be asked by all of them."""
        for name, steps in self._in_a_row.items():
            if steps >= self.max_in_a_row:
                timesteps = gather_object([self._guard.last_timesteps(name)])
                return advice(name, steps, self._dropped[name], [time for times in timesteps for time in times])
        return None

    def state_dict(self) -> dict[str, dict[str, int]]:
        return {"dropped": dict(self._dropped), "in_a_row": dict(self._in_a_row)}

    def load_state_dict(self, state: dict[str, dict[str, int]]) -> None:
        for counts, saved in ((self._dropped, state["dropped"]), (self._in_a_row, state["in_a_row"])):
            counts.update({name: saved[name] for name in counts if name in saved})

    def _now(self) -> Tensor:
        """What the guard has dropped so far, (number of terms,)."""
        counts = [torch.as_tensor(self._guard.dropped.get(name, 0)) for name in self._dropped]
        device = self._accelerator.device
        return torch.stack([count.to(device) for count in counts]) if counts else torch.zeros(0, device=device)
