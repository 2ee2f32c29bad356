"""What happens to images whose extra loss is infinite or not a number."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["NonFiniteGuard", "advice"]


class NonFiniteGuard:
    """Zeroes the non-finite contributions of single images, counts them, stops a run that has nothing else.

    Counting stays on the device. The counters are read after every step on a CPU and after every `check_interval`
    steps elsewhere, because reading waits for the accelerator.

    Args:
        max_steps: steps in a row with non-finite values or gradients of one term after which `check` raises; None:
            it never does.
        check_interval: steps between two readings on an accelerator.

    Attributes:
        dropped: by term, how many images were dropped so far, a scalar tensor on the device.
    """

    def __init__(self, max_steps: int | None, check_interval: int = 100):
        self.max_steps = max_steps
        self.check_interval = check_interval
        self.dropped: dict[str, Tensor] = {}
        self._in_a_row: dict[str, Tensor] = {}
        self._before: dict[str, Tensor | int] = {}  # what _in_a_row was before this step
        self._last: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._steps = 0

    def drop_values(self, name: str, values: Tensor, x0_hat: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """The (n,) values of L', 0 where it is not finite; and detached, nan there. Once per step and term.

        An image that was not finite before L' saw it is dropped too, but not counted: that is the network's doing.

        Args:
            name: the term's name.
            values: (n,) L' of each image.
            x0_hat: (n, C, ...) what L' was given.
            timesteps: (n,) the images' timesteps, for the message.
        """
        given = _are_finite(x0_hat.detach())
        bad = ~values.detach().isfinite()
        self.dropped[name] = self.dropped.get(name, 0) + (bad & given).sum()
        self._before[name] = self._in_a_row.get(name, 0)
        self._in_a_row[name] = (self._before[name] + 1) * (bad & given).any()
        self._last[name] = (bad & given, given, timesteps)
        return torch.where(bad, 0, values), values.detach().masked_fill(bad, torch.nan)

    def drop_gradients(self, name: str, gradients: Tensor) -> Tensor:
        """The (n, C, H, W) gradients of L' with 0 for every image where one of them is not finite.

        A value of 0 is not enough: its gradient is 0 times an infinite derivative. An image that was dropped for its
        value is not counted again.
        """
        bad = ~_are_finite(gradients)
        already, given, timesteps = self._last[name]
        counted = bad & given
        self.dropped[name] = self.dropped[name] + (counted & ~already).sum()
        self._in_a_row[name] = (self._before[name] + 1) * (counted | already).any()
        self._last[name] = (counted | already, given, timesteps)
        return torch.where(bad.reshape(-1, *(1,) * (gradients.ndim - 1)), 0, gradients)

    def last_timesteps(self, name: str) -> list[float]:
        """Timesteps of the images dropped for a term in its last step; waits for the accelerator."""
        if name not in self._last:
            return []
        bad, _, timesteps = self._last[name]
        return timesteps[bad.to(timesteps.device)].tolist()

    def check(self) -> None:
        """Raises `FloatingPointError` if a term was not finite for `max_steps` steps in a row."""
        if self.max_steps is None:
            return
        self._steps += 1
        for name, in_a_row in self._in_a_row.items():
            due = in_a_row.device.type == "cpu" or self._steps % self.check_interval == 0
            # Whether a step's gradients were bad is known only in the step after it.
            if due and max(int(in_a_row), int(self._before[name])) >= self.max_steps:
                raise FloatingPointError(
                    advice(name, self.max_steps, int(self.dropped[name]), self.last_timesteps(name))
                )


def _are_finite(images: Tensor) -> Tensor:
    """Whether all of an image is finite, (n,): its sum tells in one pass.

    A sum that float32 cannot hold counts as infinite: of N values, magnitudes of 3e38 / N.
    """
    return images.flatten(1).sum(1, dtype=torch.promote_types(images.dtype, torch.float32)).isfinite()


def advice(name: str, steps: int, images: int, timesteps: list[float]) -> str:
    """What to tell of a term that is not finite, and what to try.

    Args:
        name: of the term.
        steps: in a row.
        images: dropped in all.
        timesteps: of those dropped last.
    """
    span = f" (last at timesteps {min(timesteps):g} to {max(timesteps):g})" if timesteps else ""
    return (
        f"regularizer {name!r} was not finite for {steps} steps in a row{span}, {images} images in all. Look for a"
        " division, logarithm or root of values that can be 0, or leave these noise levels out by another weighting"
    )
