"""Noise levels of a batch with the weights that a loss gives them, looked up at once.

The weightings of this package depend on the noise level alone, so each has one value per timestep of a schedule: a row
beside the noise levels in one table, made once per scheduler and device.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from . import weighting
from .level_table import LevelTable, table_of
from .parameterization import Parameterization, parameterization
from .prediction import NoiseLevel, noise_level, output_weight
from .schedule import is_affine
from .term import Term

__all__ = ["WeightTable", "Weighted"]


class Weighted(NamedTuple):
    """The noise level of each image of a batch, and the weights that follow from it.

    Attributes:
        level: noise levels, with the weight of this training's denoising loss.
        factor: (B,) factor of each image's ||o - target||^2 in the denoising loss; None: 1.
        weightings: by term, its weighting of each image, (B,), finite; only of terms whose weighting is in the table.
        kind: the meaning of the network's output.
    """

    level: NoiseLevel
    factor: Tensor | None
    weightings: dict[str, Tensor]
    kind: Parameterization


class WeightTable:
    """Looks up noise levels and weights of a loss.

    Args:
        scheduler: the noise scheduler used in training.
        terms: terms of the loss.
        snr_gamma: gamma if the denoising loss uses min-SNR weighting.
    """

    def __init__(self, scheduler, terms: Iterable[Term], snr_gamma: float | None):
        self._scheduler = scheduler
        self._terms = [term for term in terms if _depends_on_level_alone(term)]
        self._snr_gamma = snr_gamma
        self._made: dict[torch.device, _Made] = {}

    def at(self, timesteps: Tensor) -> Weighted:
        """Returns noise levels and weights of the timesteps, (B,); computes them where there is no table.

        Raises:
            ValueError: a timestep is out of the scheduler's range.
        """
        if (made := self._up_to_date(timesteps)) and (rows := made.table.at(timesteps)):
            time, alpha, sigma, snr, weight, factor, *weightings = rows
            factor = None if self._snr_gamma is None else factor
            level = NoiseLevel(time, alpha, sigma, snr, weight)
            return Weighted(level, factor, dict(zip(made.names, weightings, strict=True)), made.kind)
        natural = noise_level(self._scheduler, timesteps)
        level, factor = self.in_training(natural), None
        is_weighted_itself = is_affine(self._scheduler) and self._scheduler.denoising_weight is not None
        if self._snr_gamma is not None or is_weighted_itself:
            factor = level.denoising_weight / output_weight(self._scheduler, natural)
        return Weighted(level, factor, {}, parameterization(self._scheduler))

    def in_training(self, level: NoiseLevel) -> NoiseLevel:
        """Returns a noise level with the weight of this training's denoising loss."""
        return level if self._snr_gamma is None else level.weighted_by(level.snr.clamp(max=self._snr_gamma))

    def _up_to_date(self, timesteps: Tensor) -> _Made | None:
        """Returns the table on the device of the timesteps; None while there is none of the scheduler."""
        if torch.compiler.is_compiling():
            return None
        made = self._made.get(timesteps.device)
        if made is None or not made.table.is_of(self._scheduler):
            of_scheduler = table_of(self._scheduler, timesteps)
            made = self._made[timesteps.device] = of_scheduler and self._make(of_scheduler)
        return made

    def _make(self, of_scheduler: LevelTable) -> _Made:
        """Computes the table of this loss from that of the scheduler.

        A weighting that is not finite at all timesteps is left to be computed, and checked, for each batch.
        """
        with torch.inference_mode(False), torch.no_grad():
            natural = NoiseLevel(*of_scheduler.levels)
            level = self.in_training(natural)
            weightings = {term.name: term.weighting(level) for term in self._terms}
            if natural.snr.device.type == "cpu":  # elsewhere this would wait for the device
                weightings = {name: weights for name, weights in weightings.items() if weights.isfinite().all()}
            factor = level.denoising_weight / natural.denoising_weight
            rows = [level.timesteps, level.alpha, level.sigma, level.snr, level.denoising_weight, factor]
            table = replace(of_scheduler, levels=torch.stack([*rows, *weightings.values()]))
        return _Made(table, list(weightings), parameterization(self._scheduler))


class _Made(NamedTuple):
    """A table of noise levels, factors, and weightings of the terms with these names."""

    table: LevelTable
    names: list[str]
    kind: Parameterization


def _depends_on_level_alone(term: Term) -> bool:
    """Whether equal noise levels always have equal weights: known of the weightings of this package only.

    A weighting of one's own may have a state, or weights that are trained.
    """
    function = getattr(term.weighting, "func", term.weighting)  # of a functools.partial
    return getattr(function, "__module__", None) == weighting.__name__
