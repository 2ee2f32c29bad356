"""Detection of regularizers that seed the global random number generators."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from .term import TermError

__all__ = ["SeedGuard"]

_FIRST_CALLS = 3  # whose states are compared; later only seeds are, which takes no time


class SeedGuard:
    """Detects a regularizer that calls `torch.manual_seed`, which would repeat the noise and timesteps in every step.

    A regularizer that draws random numbers leaves the generators in a new state each time. One that seeds them leaves
    the same state whatever the state before, which shows in the second call. After the first calls, states are
    compared only after a call that changed a seed. So a regularizer that begins later to seed, and with the seed that
    the generator has already, is not detected.
    """

    def __init__(self):
        # By thread and term: calls without a change of seed, and states before and after the last call that drew.
        self._calls: dict[tuple[int, str], int] = {}
        self._last: dict[tuple[int, str], tuple[list[Tensor], list[Tensor]]] = {}

    def before(self, name: str, device: torch.device) -> tuple[tuple[int, ...], list[Tensor]]:
        """Returns the seeds of the generators before a call, and their states, or [] if they are not compared.

        Args:
            name: name of the term.
            device: device of the images.
        """
        key = threading.get_ident(), name
        calls = self._calls.get(key, 0)
        self._calls[key] = calls + 1
        return _seeds(device), _states(device) if calls < _FIRST_CALLS else []

    def check(self, name: str, before: tuple[tuple[int, ...], list[Tensor]], device: torch.device) -> None:
        """Checks the generators after a call of the regularizer of a term.

        Args:
            name: name of the term.
            before: result of `before`.
            device: device of the images.

        Raises:
            TermError: the generators end in the same state as after the last call, although they started in another
                one.
        """
        seeds, states = before
        is_seeded = seeds != _seeds(device)
        if not (states or is_seeded):
            return
        after = _states(device)
        if _same(states, after):
            return
        key = threading.get_ident(), name
        last_before, last_after = self._last.get(key, ([], []))
        if _same(after, last_after) and not _same(states, last_before):
            raise TermError(
                f"regularizer {name!r} seeds the global random numbers, so every step would have the same noise"
                " and timesteps: use a torch.Generator of its own instead of torch.manual_seed"
            )
        self._last[key] = states, after
        if is_seeded:
            self._calls[key] = 0


def _seeds(device: torch.device) -> tuple[int, ...]:
    """Returns the seeds of the global generators for images on this device."""
    seed = torch.default_generator.initial_seed()
    return (seed, torch.cuda.default_generators[device.index].initial_seed()) if device.type == "cuda" else (seed,)


def _states(device: torch.device) -> list[Tensor]:
    """Returns the states of the same generators."""
    of_device = [torch.cuda.default_generators[device.index].get_state()] if device.type == "cuda" else []
    return [torch.default_generator.get_state(), *of_device]


def _same(states: list[Tensor], others: list[Tensor]) -> bool:
    """Whether states are equal; [] stands for unknown ones, which differ from all."""
    return bool(states) and len(states) == len(others) and all(map(torch.equal, states, others))
