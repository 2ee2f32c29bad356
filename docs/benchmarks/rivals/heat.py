"""Case C: the heat equation u_t = nu u_xx with an unknown diffusivity, on a grid of 32 times and 32 places.

The fields are u = sin(x + phi) exp(-nu t) with nu ~ U(1, 5), phi ~ U(0, pi), x in [0, 2 pi) and t in [0, 1]. A model
sees u alone. Its law: there is one number nu with which the field solves the equation, so the residual is that of the
Crank-Nicolson scheme with the diffusivity that fits the field best; it is 0 for the data. The sum over x is 0 at each
time. Both nu and phi are recovered from a sample by a fit, which gives an exact distance to the law of the data.
"""

from __future__ import annotations

import math

import torch
from fields import Problem
from methods import MEAN, PBFM, Method
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from reg_diffusers.regularizers.physics import laplacian
from reg_diffusers.weighting import constant, matched

SIZE = 32
PLACES, TIMES = 2 * math.pi * torch.arange(SIZE) / SIZE, torch.linspace(0, 1, SIZE)
SPACING, TIME_STEP = 2 * math.pi / SIZE, 1 / (SIZE - 1)
DIFFUSIVITIES = torch.linspace(0, 10, 1001)  # that the fit tries


def fields(number: int, seed: int) -> Tensor:
    """Solutions of the law, (n, 1, times, places)."""
    return solutions(parameters(torch.rand(number, 2, generator=torch.Generator().manual_seed(seed))))


def parameters(square: Tensor) -> Tensor:
    """(nu, phi) of points in the unit square, (n, 2)."""
    return square * torch.tensor([4.0, math.pi]) + torch.tensor([1.0, 0.0])


def solutions(parameters: Tensor) -> Tensor:
    """Fields (n, 1, times, places) of (nu, phi)."""
    nu, phi = parameters.T[..., None, None]
    return ((PLACES + phi).sin() * (-nu * TIMES[:, None]).exp())[:, None]


def residual(fields: Tensor) -> Tensor:
    """u_t - nu u_xx between two times, with the nu of a field that makes it least, (n, times - 1, places)."""
    u = fields[:, 0]
    change = u.diff(dim=1) / TIME_STEP
    middle = (u[:, 1:] + u[:, :-1]) / 2
    flow = laplacian(middle[..., None, :], spacing=SPACING)[..., 0, :]  # each time is a row of its own
    nu = (change * flow).sum((1, 2), keepdim=True) / (flow.square().sum((1, 2), keepdim=True) + 1e-6)
    return change - nu * flow


def recovered(fields: Tensor) -> Tensor:
    """The (nu, phi) of the solution nearest to each field, (n, 2); phi in [-pi/2, 3 pi/2)."""
    u = fields[:, 0]
    decays = (-DIFFUSIVITIES[:, None] * TIMES).exp()
    sine, cosine = ((u @ wave) @ decays.T for wave in (PLACES.sin(), PLACES.cos()))  # (n, nu)
    norms = decays.square().sum(1) * SIZE / 2
    best = (torch.hypot(sine, cosine) - norms / 2).argmax(1, keepdim=True)
    phi = torch.atan2(cosine.gather(1, best), sine.gather(1, best))
    phi = (phi + math.pi / 2) % (2 * math.pi) - math.pi / 2
    return torch.cat([DIFFUSIVITIES[best], phi], 1)


def wasserstein(found: Tensor, expected: Tensor) -> float:
    """The distance W1 of two sets of equally many (nu, phi), in units of the widths of their ranges."""
    costs = torch.cdist(*(points / torch.tensor([4.0, math.pi]) for points in (found, expected)))
    return float(costs[linear_sum_assignment(costs.numpy())].mean())


def judge(samples: Tensor, data: Tensor) -> dict[str, float]:
    law = parameters(torch.quasirandom.SobolEngine(2).draw(len(samples)))
    return {
        "residual": residual(samples).abs().mean().item(),
        "sum": samples.mean(-1).abs().mean().item() * 2 * math.pi,
        "distance": wasserstein(recovered(samples), law),
        "std ratio": (samples.std() / data.std()).item(),
    }


PROBLEM = Problem(
    fields=fields,
    residual=residual,
    judge=judge,
    methods=(
        Method("plain"),
        Method("matched", 3e-4, weighting=matched),
        Method("matched", 1e-3, weighting=matched),
        Method("constant", 1e-3, weighting=constant),
        Method(MEAN, 1e-5, MEAN),
        Method(MEAN, 1e-4, MEAN),
        Method("PBFM", 1.0, PBFM),
    ),
    width=128,
    rate=3e-3,
    seconds=20,
)
