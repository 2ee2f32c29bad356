"""Case D: Darcy flow div(K grad p) = -f on 32 x 32 pixels of the unit square, pressure and permeability together.

K = exp(G), where G is a Gaussian field with the covariance exp(-distance / .1), by the first 64 terms of its
Karhunen-Loeve expansion. f is 10 in one corner and -10 in the opposite one, on squares of .125. No flow crosses the
walls, and the mean of p is 0. A model sees p, in units of .075 (about its standard deviation), and G = log K.

The pairs solve the equation of `physics.darcy`, whose discrete form has a solution only if a constant is added to f;
that constant, .008 on average, is the residual of the data.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from fields import Problem
from methods import MEAN, PBFM, Method
from safetensors.torch import load_file, save_file
from scipy import sparse
from scipy.sparse.linalg import spsolve
from torch import Tensor

from reg_diffusers.regularizers.physics import difference, laplacian
from reg_diffusers.weighting import matched

SIZE, TERMS, LENGTH, UNIT = 32, 64, 0.1, 0.075
GRID = {"spacing": 1 / SIZE, "boundary": "neumann"}
SOURCE = torch.zeros(SIZE, SIZE)
SOURCE[: SIZE // 8, : SIZE // 8], SOURCE[-SIZE // 8 :, -SIZE // 8 :] = 10, -10
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "reg_diffusers"
SOLVED = 64  # samples of a seed whose pressure is solved for again


def fields(number: int, seed: int) -> Tensor:
    """Pairs (p / UNIT, log K), (n, 2, H, W); a large number of them, which takes minutes, is kept on disk."""
    path = CACHE / f"darcy-{SIZE}-{TERMS}-{number}-{seed}.safetensors"
    if path.exists():
        return load_file(path)["fields"]
    generator = torch.Generator().manual_seed(seed)
    terms = torch.randn(number, TERMS, generator=generator, dtype=torch.float64)
    logarithms = (terms @ modes().flatten(1)).reshape(-1, SIZE, SIZE)
    found = torch.stack([solved(logarithms) / UNIT, logarithms], 1).float()
    if number >= 1000:
        CACHE.mkdir(parents=True, exist_ok=True)
        print(f"solved for {number} pressures, kept in {path}", flush=True)
        save_file({"fields": found}, path)
    return found


def modes() -> Tensor:
    """The terms of the expansion of G without their random numbers, (TERMS, H, W)."""
    centres = (torch.arange(SIZE, dtype=torch.float64) + 0.5) / SIZE
    points = torch.cartesian_prod(centres, centres)
    values, vectors = torch.linalg.eigh((-torch.cdist(points, points) / LENGTH).exp())
    return (vectors[:, -TERMS:] * values[-TERMS:].sqrt()).T.reshape(TERMS, SIZE, SIZE)


def solved(logarithms: Tensor) -> Tensor:
    """The pressures of log K, (n, H, W) float64, by a sparse solver."""
    first = matrix(lambda rows: difference(rows, -1, **GRID))
    second = matrix(lambda rows: laplacian(rows[:, None], **GRID)[:, 0])
    one, border = sparse.eye_array(SIZE), np.ones((SIZE**2, 1))
    slopes = sparse.kron(one, first).tocsr(), sparse.kron(first, one).tocsr()
    curvature = (sparse.kron(one, second) + sparse.kron(second, one)).tocsr()
    right = np.append(-SOURCE.double().flatten().numpy(), 0)
    found = []
    for permeability in logarithms.double().exp():
        factors = [difference(permeability, dim, **GRID) for dim in (-1, -2)]
        diagonals = [sparse.diags_array(factor.flatten().numpy()) for factor in (permeability, *factors)]
        system = sum(diagonal @ part for diagonal, part in zip(diagonals, (curvature, *slopes), strict=True))
        bordered = sparse.block_array([[system, border], [border.T, None]]).tocsc()
        found.append(spsolve(bordered, right)[:-1])
    return torch.from_numpy(np.stack(found)).reshape(-1, SIZE, SIZE)


def matrix(operator: Callable[[Tensor], Tensor]) -> sparse.csr_array:
    """The matrix of a linear operator on rows of pixels."""
    return sparse.csr_array(operator(torch.eye(SIZE, dtype=torch.float64)).T.numpy())


def residual(fields: Tensor) -> Tensor:
    """div(K grad p) + f as in `physics.darcy`, (n, H, W); log K, at most 4.2 in the data, is limited to 5."""
    pressure, permeability = fields[:, 0] * UNIT, fields[:, 1].clamp(-5, 5).exp()
    flow = permeability * laplacian(pressure, **GRID)
    for dim in (-1, -2):
        flow = flow + difference(permeability, dim, **GRID) * difference(pressure, dim, **GRID)
    return flow + SOURCE


def judge(samples: Tensor, data: Tensor) -> dict[str, float]:
    remaining = residual(samples).abs().mean().item()
    pressure, expected = samples[:SOLVED, 0] * UNIT, solved(samples[:SOLVED, 1])
    return {
        "residual": remaining,
        "relative residual": remaining / (samples[:, 0].std().item() * UNIT),
        "distance p": wasserstein(samples[:, 0], data[:, 0]),
        "distance K": wasserstein(samples[:, 1].exp(), data[:, 1].exp()),
        "std p": (samples[:, 0].std() / data[:, 0].std()).item(),
        "std K": (samples[:, 1].exp().std() / data[:, 1].exp().std()).item(),
        "solved again": ((pressure - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).mean().item(),
    }


def wasserstein(samples: Tensor, data: Tensor) -> float:
    """The distance W1 of the values of a pixel, mean over pixels, in standard deviations of the data."""
    places = (torch.arange(len(samples)) + 0.5) / len(samples) * len(data)
    expected = data.flatten(1).sort(0).values[places.long()]
    return ((samples.flatten(1).sort(0).values - expected).abs().mean() / data.std()).item()


PROBLEM = Problem(
    fields=fields,
    residual=residual,
    judge=judge,
    methods=(
        Method("plain"),
        Method("matched", 1e-5, weighting=matched),
        Method("matched", 1e-4, weighting=matched),
        Method(MEAN, 1e-5, MEAN),
        Method(MEAN, 1e-3, MEAN),
        Method("PBFM", 1.0, PBFM),
    ),
    width=384,
    rate=3e-3,
    seconds=60,
)
