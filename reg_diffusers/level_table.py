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
class _Table:
    """The noise levels of a schedule, and what they were computed from.

    `config` and the tensors of a scheduler are replaced, not changed, by its methods; the version tells of changes in
    place.
    """

    levels: Tensor
    config: Any
    alphas_cumprod: Tensor
    version: int
    num_inference_steps: int | None
    timesteps: Any

    @classmethod
    def of(cls, scheduler, levels: Tensor) -> _Table:
        alpha_bar = scheduler.alphas_cumprod
        steps, timesteps = (getattr(scheduler, name, None) for name in ("num_inference_steps", "timesteps"))
        return cls(levels, scheduler.config, alpha_bar, _version(alpha_bar), steps, timesteps)

    def is_of(self, scheduler) -> bool:
        return (
            self.config is scheduler.config
            and self.alphas_cumprod is scheduler.alphas_cumprod
            and self.version == _version(self.alphas_cumprod)
            and self.num_inference_steps == getattr(scheduler, "num_inference_steps", None)
            and self.timesteps is getattr(scheduler, "timesteps", None)
        )


_TABLES: weakref.WeakKeyDictionary[Any, dict[torch.device, _Table]] = weakref.WeakKeyDictionary()


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
    if torch.compiler.is_compiling() or timesteps.is_meta:
        return None
    device = timesteps.device
    try:
        table = _TABLES.get(scheduler, {}).get(device)
    except TypeError:  # an object that cannot be a key, such as a SimpleNamespace
        return None
    if table is None or not table.is_of(scheduler):
        if not has_fixed_levels(scheduler):
            return None
        with torch.inference_mode(False), torch.no_grad():
            every = torch.arange(len(scheduler.alphas_cumprod), device=device)
            table = _Table.of(scheduler, compute(every))
        _TABLES.setdefault(scheduler, {})[device] = table
    return table.levels.index_select(1, timesteps.long()).unbind(0)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
