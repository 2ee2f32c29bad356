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

from .schedule import has_fixed_levels

__all__ = ["levels_at"]


@dataclass(frozen=True)
class _Source:
    """What a table was computed from. `config` and tensors are replaced, not changed, by the scheduler's methods."""

    config: Any
    alphas_cumprod: Tensor
    version: int
    num_inference_steps: int | None
    timesteps: Any

    @classmethod
    def of(cls, scheduler) -> _Source:
        table = scheduler.alphas_cumprod
        steps = getattr(scheduler, "num_inference_steps", None)
        version = 0 if table.is_inference() else table._version
        return cls(scheduler.config, table, version, steps, getattr(scheduler, "timesteps", None))

    def is_of(self, other: _Source) -> bool:
        return (
            self.config is other.config
            and self.alphas_cumprod is other.alphas_cumprod
            and self.version == other.version
            and self.num_inference_steps == other.num_inference_steps
            and self.timesteps is other.timesteps
        )


_TABLES: weakref.WeakKeyDictionary[Any, dict[torch.device, tuple[_Source, Tensor]]] = weakref.WeakKeyDictionary()


def levels_at(scheduler, timesteps: Tensor, compute: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...] | None:
    """Looks noise levels up in the table of a scheduler: K tensors (B,) float32, on the device of the timesteps.

    The table is made again after `set_timesteps` or another change of the scheduler.

    Args:
        scheduler: a diffusers scheduler.
        timesteps: (B,), in the range of the scheduler.
        compute: function that computes the table, timesteps (T,) -> (K, T) float32.

    Returns:
        None if the levels are not those of integers from 0 to T - 1, or in a compiled program.
    """
    if torch.compiler.is_compiling() or timesteps.is_meta or not has_fixed_levels(scheduler):
        return None
    source, device = _Source.of(scheduler), timesteps.device
    tables = _TABLES.setdefault(scheduler, {})
    if device not in tables or not tables[device][0].is_of(source):
        with torch.inference_mode(False), torch.no_grad():
            every = torch.arange(len(scheduler.alphas_cumprod), device=device)
            tables[device] = source, compute(every)
    return tables[device][1].index_select(1, timesteps.long()).unbind(0)
