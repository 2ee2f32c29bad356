r"""The effect of a gradient step on L' for images with an error and for clean images.

Images x_0 + r take one common step -s g, where g is the gradient of L' at x_0 + r. The remaining squared error
E|r - s g|^2 is smallest at s = E<g, r> / E|g|^2, and that step removes the share

    removed = E<g, r>^2 / (E|g|^2 E|r|^2)

of E|r|^2. The same step also moves the clean images, with gradient g_0, and adds an error to them:

    moved = s^2 E|g_0|^2 / E|r|^2,        net = removed - moved.

For a quadratic L' with Hessian H and white r of variance v, E|g|^2 = E|g_0|^2 + v |H|^2. So E<g, r> = v tr H > 0 for
every convex L', whatever its minimum, and a significant cosine shows no more than that. But

    net = removed (1 - E|g_0|^2 / E|g|^2) = removed v |H|^2 / (E|g_0|^2 + v |H|^2)

is small unless clean images nearly satisfy the wish: it falls with v^2 as v -> 0, whereas a wish that all images
satisfy (g_0 = 0) keeps its share tr(H)^2 / (N |H|^2), where N is the number of values in an image.
"""

from __future__ import annotations

import math

from torch import Tensor

from .result import Effect

__all__ = ["effect"]


def effect(gradient: Tensor, clean_gradient: Tensor, error: Tensor) -> Effect:
    """Computes the effect of the best common gradient step on L'.

    Args:
        gradient: the gradient of L' at the images with an error, (B, ...).
        clean_gradient: the gradient of L' at the clean images, (B, ...).
        error: the error; the images are x_0 + error, (B, ...).

    Returns:
        The effect. If every step increases the error, the step is s = 0, which removes and moves nothing.
    """
    gradient, clean_gradient, error = (x.flatten(1).double() for x in (gradient, clean_gradient, error))
    gain, square = (gradient * error).sum(1), gradient.square().sum(1)
    clean_square, energy = clean_gradient.square().sum(1), error.square().sum(1).mean()
    clean_pull = _quotient(clean_square.sum().item(), square.sum().item())
    if not (gain.sum() > 0 and energy > 0):
        return Effect(0.0, 0.0, 0.0, 0.0, clean_pull)
    step = gain.sum() / square.sum()
    removed = (2 * step * gain - step**2 * square) / energy
    moved = step**2 * clean_square / energy
    net = removed - moved
    return Effect(
        removed=removed.mean().item(),
        moved=moved.mean().item(),
        net=net.mean().item(),
        net_error=net.std().item() / math.sqrt(len(net)),
        clean_pull=clean_pull,
    )


def _quotient(above: float, below: float) -> float:
    if below == 0:
        return math.inf if above else 0.0
    return above / below
