"""Predicts the effect of any weight and weighting from the measurements at each noise level."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ..prediction import NoiseLevel
from .response import Response
from .result import Cost

__all__ = ["Prospects"]


class Prospects:
    """Predicts the effect of any weight and weighting.

    Args:
        level: the noise levels (L,).
        training_shares: the share of the training that each level represents.
        decided_shares: the share of a sample that is decided at each level.
        errors: the mean squared error of the best guess at each level.
        responses: the response of the best guess at each level.
        size: number of values in an image.
    """

    def __init__(
        self,
        level: NoiseLevel,
        training_shares: list[float],
        decided_shares: list[float],
        errors: list[float],
        responses: list[Response],
        size: int,
    ):
        self._level, self._responses, self._size = level, responses, size
        self._counts = np.array(training_shares) * level.denoising_weight.double().numpy()
        self._decided = np.array(decided_shares)
        self._errors = np.array(errors)
        self._loss = (self._counts * self._errors).sum()

    def displacements(self, weight: float, lambdas: list[float]) -> np.ndarray:
        """Returns the root mean square of x0_hat* - D at each level."""
        taus = self._taus(weight, lambdas)
        return np.sqrt([path.displacement_at(tau) for path, tau in zip(self._responses, taus, strict=True)])

    def cost(self, name: str, weight: float, lambdas: list[float]) -> Cost:
        before = (self._decided * np.array([path.start for path in self._responses])).sum()
        taus = self._taus(weight, lambdas)
        after = [path.value_at(tau) for path, tau in zip(self._responses, taus, strict=True)]
        fall = float((before - (self._decided * after).sum()) / abs(before)) if before else 0.0
        largest = float((self.displacements(weight, lambdas) ** 2 / self._errors).max())
        acting = [time for time, value in zip(self._level.timesteps.tolist(), lambdas, strict=True) if value]
        return Cost(name, weight, self._rise(weight, lambdas), largest, fall, max(acting, default=None))

    def affordable(self, weightings: dict[str, Callable], rise: float) -> tuple[Cost, ...]:
        """Finds the weight of each weighting that makes the denoising loss rise by this share."""
        costs = []
        for name, function in weightings.items():
            lambdas = function(self._level).double().tolist()
            if not all(map(math.isfinite, lambdas)):
                continue
            low, high = -20.0, 20.0  # powers of ten of the weight
            if not self._rise(10**high, lambdas) > rise > self._rise(10**low, lambdas):
                continue
            for _ in range(40):
                middle = (low + high) / 2
                low, high = (low, middle) if self._rise(10**middle, lambdas) > rise else (middle, high)
            costs.append(self.cost(name, 10**low, lambdas))
        return tuple(sorted(costs, key=lambda cost: (cost.largest_rise > 1, -cost.fall)))

    def _rise(self, weight: float, lambdas: list[float]) -> float:
        return float((self._counts * self.displacements(weight, lambdas) ** 2).sum() / self._loss)

    def _taus(self, weight: float, lambdas: list[float]) -> np.ndarray:
        return weight * np.array(lambdas) * self._size / (2 * self._level.denoising_weight.double().numpy())
