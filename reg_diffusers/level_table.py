"""Noise levels of all timesteps of a schedule, computed once per scheduler and device.

A step of training then looks its timesteps up in one table, instead of computing powers and quotients.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .precision import version_of
from .schedule import has_fixed_levels

__all__ = ["LevelTable", "levels_at", "looked_up", "table_of"]


@dataclass(frozen=True)
class LevelTable:
    """Noise levels of a schedule, and what they were computed from, which a scheduler replaces to change it.

    Attributes:
        levels: (K, T).
        config, alpha_bar, schedule: those of the scheduler.
        version: number of changes of alpha_bar in place, by others.
    """

    levels: Tensor
    config: Any
    alpha_bar: Tensor
    schedule: Tensor | None
    version: int

    def is_of(self, scheduler) -> bool:
        """Whether the scheduler is still as it was."""
        alpha_bar = scheduler.alphas_cumprod
        return (
            alpha_bar is self.alpha_bar
            and version_of(alpha_bar) == self.version
            and scheduler.config is self.config
            and getattr(scheduler, "timesteps", None) is self.schedule
        )

    def at(self, timesteps: Tensor) -> tuple[Tensor, ...] | None:
        """Returns the columns at timesteps, K tensors (B,); None if they are not int64 or one is out of range."""
        if timesteps.dtype != torch.int64:
            return None
        try:
            return self.levels.index_select(1, timesteps).unbind(0)
        except (IndexError, RuntimeError):  # which one depends on the version of PyTorch
            return None


# By scheduler and device.
_TABLES: weakref.WeakKeyDictionary[Any, dict[torch.device, LevelTable]] = weakref.WeakKeyDictionary()


def looked_up(scheduler, timesteps) -> tuple[Tensor, ...] | None:
    """Looks noise levels up in a table that has been made: K tensors (B,) float32; on the CPU this checks the range.

    Args:
        scheduler: a diffusers scheduler.
        timesteps: (B,) int64.

    Returns:
        None if there is no up-to-date table, the timesteps are something else, or one is out of range.
    """
    if not isinstance(timesteps, Tensor) or timesteps.ndim != 1:
        return None
    table = table_of(scheduler, timesteps)
    return None if table is None else table.at(timesteps)


def levels_at(scheduler, timesteps: Tensor, compute: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...] | None:
    """Looks noise levels up in the table of a scheduler: K tensors (B,) float32, on the device of the timesteps.

    The table is made again after `set_timesteps` or another change of the scheduler.

    Args:
        scheduler: a diffusers scheduler.
        timesteps: (B,), in the range of the scheduler.
        compute: function that computes the table, timesteps (T,) -> (K, T) float32.

    Returns:
        None if the levels are not those of integers from 0 to T - 1, the scheduler is not hashable, or in a compiled
        program.
    """
    table = table_of(scheduler, timesteps)
    if table is None:
        is_possible = not (torch.compiler.is_compiling() or timesteps.is_meta) and _is_key(scheduler)
        if not (is_possible and has_fixed_levels(scheduler)):
            return None
        device = timesteps.device
        with torch.inference_mode(False), torch.no_grad():
            levels = compute(torch.arange(len(scheduler.alphas_cumprod), device=device))
        alpha_bar, schedule = scheduler.alphas_cumprod, getattr(scheduler, "timesteps", None)
        table = LevelTable(levels, scheduler.config, alpha_bar, schedule, version_of(alpha_bar))
        _TABLES.setdefault(scheduler, {})[device] = table
    return table.levels.index_select(1, timesteps.long()).unbind(0)


def table_of(scheduler, timesteps: Tensor) -> LevelTable | None:
    """Returns the table of a scheduler on the device of the timesteps; None if it must be made."""
    if torch.compiler.is_compiling() or timesteps.is_meta:
        return None
    try:
        tables = _TABLES.get(scheduler)
    except TypeError:  # it cannot be a key
        return None
    table = None if tables is None else tables.get(timesteps.device)
    return table if table is not None and table.is_of(scheduler) else None


def _is_key(scheduler) -> bool:
    try:
        hash(weakref.ref(scheduler))
    except TypeError:  # such as a SimpleNamespace
        return False
    return True
