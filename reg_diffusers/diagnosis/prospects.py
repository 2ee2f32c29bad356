"""Predicts the effect of any weight and weighting from the measurements at each noise level."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from ..prediction import NoiseLevel
from .response import Response
from .result import Cost

__all__ = ["Prospects"]


class Prospects:
    """Predicts the effect of any weight and weighting.

    Errors and responses are measured at a few noise levels only, while the weight of the denoising loss may change by
    orders of magnitude from one to the next. So sums go over all timesteps, each with its own weights, and only what
    was measured is interpolated in log SNR: errors and displacements by their logarithms, L' linearly.

    Args:
        schedule: the noise levels of all timesteps of the training, (T,), without 0 or infinite SNR, falling.
        training_shares: the share of the training at each of them.
        decided_shares: the share of a sample that is decided at each of them.
        measured: (L,) the indices of those at which the following was measured, increasing.
        errors: the mean squared error of the best guess at each of these, (L,).
        responses: the response of the best guess at each of these, (L,).
        size: number of values in an image.
    """

    def __init__(
        self,
        schedule: NoiseLevel,
        training_shares: Tensor,
        decided_shares: Tensor,
        measured: Tensor,
        errors: list[float],
        responses: list[Response],
        size: int,
    ):
        self._schedule, self._measured, self._responses, self._size = schedule, measured.numpy(), responses, size
        self._denoising_weights = schedule.denoising_weight.double().numpy()
        self._counts = training_shares.double().numpy() * self._denoising_weights
        self._decided = decided_shares.double().numpy()
        noise = -schedule.snr.double().log().numpy()
        places = noise[self._measured]
        self._before = np.clip(np.searchsorted(places, noise, side="right") - 1, 0, max(len(places) - 2, 0))
        self._after = np.minimum(self._before + 1, len(places) - 1)
        gaps = places[self._after] - places[self._before]
        of_level = np.concatenate([self._before, self._after])
        self._rows = [np.flatnonzero(of_level == index) for index in range(len(places))]
        self._way = np.divide(noise - places[self._before], gaps, out=np.zeros_like(noise), where=gaps > 0).clip(0, 1)
        errors = np.array(errors)
        self._errors = self._between(errors[self._before], errors[self._after])
        self._loss = (self._counts * self._errors).sum()

    def displacements(self, weight: float, lambdas: Sequence[float]) -> np.ndarray:
        """Returns the root mean square of x0_hat* - D at each measured level, (L,); `lambdas` are of the schedule."""
        taus = self._taus(weight, lambdas)[self._measured]
        return np.sqrt([path.displacement_at(tau) for path, tau in zip(self._responses, taus, strict=True)])

    def cost(self, name: str, weight: float, lambdas: Sequence[float]) -> Cost:
        before, after = (
            float((self._decided * self._values(taus)).sum())
            for taus in (np.zeros(len(self._decided)), self._taus(weight, lambdas))
        )
        fall = (before - after) / abs(before) if before else 0.0
        squares = self._squares(weight, lambdas)
        largest = float((squares / self._errors).max())
        acting = [time for time, value in zip(self._schedule.timesteps.tolist(), lambdas, strict=True) if value]
        return Cost(name, weight, self._rise(weight, lambdas), largest, fall, max(acting, default=None))

    def affordable(self, weightings: dict[str, Callable], rise: float) -> tuple[Cost, ...]:
        """Finds the weight of each weighting that makes the denoising loss rise by this share."""
        costs = []
        for name, function in weightings.items():
            lambdas = function(self._schedule).double().numpy()
            if not np.isfinite(lambdas).all():
                continue
            low, high = -20.0, 20.0  # powers of ten of the weight
            if not self._rise(10**high, lambdas) > rise > self._rise(10**low, lambdas):
                continue
            for _ in range(40):
                middle = (low + high) / 2
                low, high = (low, middle) if self._rise(10**middle, lambdas) > rise else (middle, high)
            costs.append(self.cost(name, 10**low, lambdas))
        return tuple(sorted(costs, key=lambda cost: (cost.largest_rise > 1, -cost.fall)))

    def _rise(self, weight: float, lambdas: Sequence[float]) -> float:
        return float((self._counts * self._squares(weight, lambdas)).sum() / self._loss)

    def _squares(self, weight: float, lambdas: Sequence[float]) -> np.ndarray:
        """The mean square of x0_hat* - D at each timestep, (T,)."""
        return self._between(*self._neighbours("displacement_at", self._taus(weight, lambdas)))

    def _values(self, taus: np.ndarray) -> np.ndarray:
        """L'(x0_hat*) at each timestep, (T,)."""
        before, after = self._neighbours("value_at", taus)
        return (1 - self._way) * before + self._way * after

    def _neighbours(self, what: str, taus: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the responses at the measured levels before and after each timestep say of its tau."""
        both = np.concatenate([taus, taus])
        found = np.empty(len(both))
        for path, rows in zip(self._responses, self._rows, strict=True):
            found[rows] = getattr(path, what)(both[rows])
        before, after = np.split(found, 2)
        return before, after

    def _between(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Interpolates positive values by their logarithms, and linearly where one of them is 0."""
        positive = (before > 0) & (after > 0)
        logarithms = (np.log(np.where(positive, values, 1.0)) for values in (before, after))
        linear, powers = (
            (1 - self._way) * one + self._way * other for one, other in ((before, after), tuple(logarithms))
        )
        return np.where(positive, np.exp(powers), linear)

    def _taus(self, weight: float, lambdas: Sequence[float]) -> np.ndarray:
        return weight * np.array(lambdas) * self._size / (2 * self._denoising_weights)
