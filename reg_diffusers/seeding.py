"""Detection of regularizers that seed the global random number generators."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from .term import TermError

__all__ = ["SeedGuard", "random_states"]


class SeedGuard:
    """Detects a regularizer that calls `torch.manual_seed`, which would repeat the noise and timesteps in every step.

    A regularizer that draws random numbers leaves the generators in a new state each time. One that seeds them leaves
    the same state whatever the state before, which shows in the second call.
    """

    def __init__(self):
        self._last: dict[tuple[int, str], tuple[list[Tensor], list[Tensor]]] = {}  # by thread and term

    def check(self, name: str, before: list[Tensor], device: torch.device) -> None:
        """Checks the states after a call of the regularizer of a term.

        Args:
            name: name of the term.
            before: the `random_states` before the call.
            device: device of the images.

        Raises:
            TermError: the generators end in the same state as after the last call, although they started in another
                one.
        """
        after = random_states(device)
        if _same(before, after):
            return
        key = threading.get_ident(), name
        last_before, last_after = self._last.get(key, (before, before))
        if _same(after, last_after) and not _same(before, last_before):
            raise TermError(
                f"regularizer {name!r} seeds the global random numbers, so every step would have the same noise"
                " and timesteps: use a torch.Generator of its own instead of torch.manual_seed"
            )
        self._last[key] = before, after


def random_states(device: torch.device) -> list[Tensor]:
    """Returns the states of the global generators for images on this device."""
    of_device = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *of_device]


def _same(states: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(states, others, strict=True))
