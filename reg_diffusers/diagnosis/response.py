r"""The effect of an auxiliary loss on the optimal x0_hat at one noise level, as a function of its weight.

With unlimited capacity, the network that minimizes w_d |x0_hat - x_0|^2 / N + weight lambda L'(x0_hat), for images of
N values, returns for each image the proximal point of L' at the optimal denoiser D:

    x0_hat* = argmin_x 1/2 |x - D|^2 + tau L'(x),        tau = weight lambda N / (2 w_d).

Weight, weighting and parameterization therefore matter only through tau. `response` follows x0_hat* along tau, and the
effect of any weight or weighting is read off that path. The step need not be small: for a strong loss, x0_hat* stops
near a minimum of L', which a first-order formula would overshoot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

__all__ = ["Response", "proximal_point", "response"]

_SIZES = np.logspace(-4, 1, 11)  # of the first-order step, in units of the data's spread
_ITERATIONS = 15
_STEADY = 1.5  # largest power of tau in the squared displacement of a bounded loss; a constant gradient gives 2
_FAR = 20.0  # in units of the spread; a convex loss moves x0_hat* at most by the first-order step, which is 10


@dataclass(frozen=True)
class Response:
    """The proximal points at one noise level, averaged over images.

    Attributes:
        tau: (G,) increasing; empty if the gradient of L' is 0 everywhere and nothing moves.
        squared_displacement: (G,) mean square of x0_hat* - D over the values of an image.
        value: (G,) L'(x0_hat*).
        start: L'(D).
        unbounded: whether a finite weight drives images arbitrarily far: they are far, or the displacement keeps
            growing about as fast as the weight.
    """

    tau: np.ndarray
    squared_displacement: np.ndarray
    value: np.ndarray
    start: float
    unbounded: bool = False

    def displacement_at(self, tau: np.ndarray | float) -> np.ndarray:
        """Returns the mean square of x0_hat* - D, interpolated and extrapolated by powers of tau."""
        tau = np.asarray(tau, dtype=float)
        if len(self.tau) == 0:
            return np.zeros_like(tau)
        with np.errstate(divide="ignore"):
            inside = np.exp(np.interp(np.log(tau), *self._logarithms))
        below = self.squared_displacement[0] * (tau / self.tau[0]) ** 2
        above = self.squared_displacement[-1] * (tau / self.tau[-1]) ** self._last_power
        return np.where(tau < self.tau[0], below, np.where(tau > self.tau[-1], above, inside))

    def value_at(self, tau: np.ndarray | float) -> np.ndarray:
        """Returns L'(x0_hat*), interpolated in the logarithm of tau.

        Below the first tau, the change is proportional to tau; above the last, the value is constant.
        """
        tau = np.asarray(tau, dtype=float)
        if len(self.tau) == 0:
            return np.full_like(tau, self.start)
        with np.errstate(divide="ignore"):
            inside = np.interp(np.log(tau), self._logarithms[0], self.value)
        below = self.start + (self.value[0] - self.start) * tau / self.tau[0]
        return np.where(tau < self.tau[0], below, inside)

    # A search for a weight reads the same path hundreds of times.

    @cached_property
    def _logarithms(self) -> tuple[np.ndarray, np.ndarray]:
        return np.log(self.tau), np.log(np.maximum(self.squared_displacement, 1e-300))

    @cached_property
    def _last_power(self) -> float:
        """The power of tau with which the squared displacement grows at the end of the path, 0 to 2."""
        before, last = np.maximum(self.squared_displacement[-2:], 1e-300)
        return float(np.clip(np.log(last / before) / np.log(self.tau[-1] / self.tau[-2]), 0, 2))


def response(evaluate: Callable[[Tensor], tuple[Tensor, Tensor]], guesses: Tensor, spread: float) -> Response:
    """Computes the proximal points of L' at D for increasing tau.

    The first-order step tau |grad L'| goes from 1e-4 to 10 times the spread of the data.

    Args:
        evaluate: images (B, ...) -> L' (B,) and its gradient (B, ...).
        guesses: D, (B, ...).
        spread: spread of the data, in pixel values.
    """
    values, gradient = evaluate(guesses)
    start, slope = values.double().nanmean().item(), gradient.double().square().mean().sqrt().item()
    if not slope > 0:
        return Response(np.empty(0), np.empty(0), np.empty(0), start)
    tau = _SIZES * spread / slope
    points, squares, reached = guesses, [], []
    for size, strength in zip(_SIZES, tau, strict=True):
        points, values = proximal_point(evaluate, guesses, float(strength), points, first_step=1 / (1 + size))
        squares.append((points - guesses).double().square().mean().item())
        reached.append(values.double().nanmean().item())
    path = Response(tau, np.array(squares), np.array(reached), start)
    far = not squares[-1] < (_FAR * spread) ** 2
    return replace(path, unbounded=far or path._last_power > _STEADY)


def proximal_point(
    evaluate: Callable[[Tensor], tuple[Tensor, Tensor]],
    guesses: Tensor,
    tau: float,
    start: Tensor | None = None,
    *,
    first_step: float = 1.0,
    iterations: int = _ITERATIONS,
) -> tuple[Tensor, Tensor]:
    """Computes argmin_x 1/2 |x - D|^2 + tau L'(x) for each image, by gradient descent with Barzilai-Borwein steps.

    Returns the best of all points on the way, so the result is never worse than the start, even if L' is not smooth.

    Source: Barzilai & Borwein 1988.

    Args:
        evaluate: images (B, ...) -> L' (B,) and its gradient (B, ...).
        guesses: D, (B, ...).
        tau: weight of L'.
        start: (B, ...) starting point. Default: D.
        first_step: length of the first step, in units of the gradient.
        iterations: number of steps.

    Returns:
        The points (B, ...) and L' there (B,).
    """
    shape = (len(guesses),) + (1,) * (guesses.ndim - 1)
    point = guesses if start is None else start
    best = objective = best_value = None
    step, before, slope_before = torch.full(shape, first_step).to(guesses), None, None
    for _ in range(iterations + 1):
        value, gradient = evaluate(point)
        energy = (point - guesses).flatten(1).square().sum(1) / 2 + tau * value
        slope = point - guesses + tau * gradient
        if best is None:
            best, objective, best_value = point, energy, value
        else:
            better = energy < objective  # False for nan
            best = torch.where(better.view(shape), point, best)
            objective, best_value = torch.where(better, energy, objective), torch.where(better, value, best_value)
            moved, turned = (point - before).flatten(1), (slope - slope_before).flatten(1)
            curvature = (moved * turned).sum(1)
            step = torch.where(curvature > 0, moved.square().sum(1) / curvature, step.flatten()).clamp(max=1)
            step = step.nan_to_num(0.0).view(shape)
        before, slope_before = point, slope
        point = point - step * slope
    return best, best_value
