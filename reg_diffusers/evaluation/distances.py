"""Distances between two sets of feature vectors, with standard errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "GROUPS",
    "NORMAL",
    "PAIRED",
    "Estimate",
    "frechet",
    "jackknife",
    "kernel",
    "manifolds",
    "mean_of",
    "nearest",
    "paired",
    "share_of",
]

GROUPS = 10
PAIRED = 5000  # points of a set that are compared in pairs: the time of all pairs grows with their square
NORMAL = 1.960  # half-width of a 95 % interval, in standard errors
_STUDENT = 2.262  # the same for a standard error that is estimated from GROUPS values (9 degrees of freedom)
_ELEMENTS_AT_A_TIME = 2**24  # of a distance matrix: 64 MB
_ELEMENTS_OF_A_SET = 2**28  # 1 GB


@dataclass(frozen=True)
class Estimate:
    """An estimated number with its uncertainty.

    Attributes:
        value: the estimate.
        standard_error: the standard error of `value`.
        half_width: half the width of the 95 % confidence interval, which is value ± half_width.
    """

    value: float
    standard_error: float
    half_width: float


def mean_of(values: Tensor) -> Estimate:
    """Returns the mean of independent values (N,); its error is nan for a single one."""
    values = _in_64_bits(values)
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(values.mean().item(), error, NORMAL * error)


def _in_64_bits(values: Tensor) -> Tensor:
    """Converts to float64: on the same device, except that MPS lacks float64 and its values move to the CPU."""
    return values.cpu().double() if values.device.type == "mps" else values.double()


def _finite(samples: Tensor, reference: Tensor) -> bool:
    return bool(samples.isfinite().all() and reference.isfinite().all())


def share_of(which: Tensor) -> Estimate:
    """Returns the share of true values among independent cases (N,) bool.

    The standard error counts two more cases of each kind (Agresti & Coull 1998), because 0 of 100 does not mean never.
    """
    number, true = len(which), which.sum().item()
    guarded = (true + 2) / (number + 4)
    error = math.sqrt(guarded * (1 - guarded) / (number + 4))
    return Estimate(true / number, error, NORMAL * error)


def jackknife(statistic: Callable[..., float | dict], *sets: Tensor) -> Estimate | dict[str, Estimate]:
    """Computes a statistic of sets of samples, with the standard error of the delete-a-group jackknife.

    Sample i belongs to group i modulo g = GROUPS. Each group is left out in turn, from all sets at once if there are
    several, which gives the statistics s_j of the remaining samples: SE^2 = (g - 1)/g sum_j (s_j - mean s)^2.
    The finite-sample bias of a statistic, such as that of the Frechet distance, stays in the value; the standard error
    does not include it.

    Source: Shao & Tu, The Jackknife and Bootstrap, 1995, section 2.3.

    Args:
        statistic: a function of the sets that returns one number, or several by name.
        *sets: (N, ...) each, with N at least 2 GROUPS.

    Raises:
        ValueError: if there are fewer samples.
    """
    number = len(sets[0])
    if number < 2 * GROUPS:
        raise ValueError(f"{number} samples are too few for a standard error: use {2 * GROUPS} or more")
    group = torch.arange(number) % GROUPS
    whole = statistic(*sets)
    parts = [statistic(*(one[(group != left_out).to(one.device)] for one in sets)) for left_out in range(GROUPS)]
    if isinstance(whole, dict):
        return {name: _jackknifed(whole[name], [part[name] for part in parts]) for name in whole}
    return _jackknifed(whole, parts)


def _jackknifed(value: float, parts: list[float]) -> Estimate:
    variance = torch.tensor(parts, dtype=torch.float64).var(correction=0).item()
    error = math.sqrt((GROUPS - 1) * variance)
    return Estimate(float(value), error, _STUDENT * error)


def frechet(samples: Tensor, reference: Tensor) -> float:
    """Computes the Frechet distance between Gaussians fitted to two sets of features.

    With means m and covariances S it is |m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2), in squared units of the
    features. It is biased upwards for finite sets, and more so for smaller ones: compare only sets of the same size.

    Source: Dowson & Landau 1982; on features of a network, Heusel et al. 2017 (arXiv:1706.08500).

    Args:
        samples: (N, D).
        reference: (M, D).

    Returns:
        The distance; nan if a feature is non-finite.
    """
    if not _finite(samples, reference):
        return math.nan
    samples, reference = _in_64_bits(samples), _in_64_bits(reference)
    one, other = (torch.atleast_2d(torch.cov(features.T)) for features in (samples, reference))
    values, vectors = torch.linalg.eigh(one)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    shared = torch.linalg.eigvalsh(root @ other @ root).clamp(min=0).sqrt().sum()
    means = (samples.mean(0) - reference.mean(0)).square().sum()
    return (means + one.trace() + other.trace() - 2 * shared).item()


def kernel(samples: Tensor, reference: Tensor) -> float:
    """Computes the squared maximum mean discrepancy with the kernel (x.y / D + 1)^3.

    This is the kernel distance (KID) of Binkowski et al. 2018 (arXiv:1801.01401), over all pairs instead of random
    subsets. The estimate is unbiased: 0 on average for equal distributions.

    Args:
        samples: (N, D), with N at least 2.
        reference: (M, D), with M at least 2.

    Returns:
        The distance; nan if a feature is non-finite.
    """
    samples, reference = _in_64_bits(samples), _in_64_bits(reference)
    within = [_mean_of_pairs(features, features, len(features)) for features in (samples, reference)]
    return (sum(within) - 2 * _mean_of_pairs(samples, reference, 0)).item()


def _mean_of_pairs(one: Tensor, other: Tensor, left_out: int) -> Tensor:
    """The mean of the kernel over all pairs; within one set, the `left_out` pairs (x, x) do not count."""
    total = sum(((rows @ other.T / one.shape[1] + 1) ** 3).sum() for rows in _chunks(one, len(other)))
    if left_out:
        total = total - ((one.square().sum(1) / one.shape[1] + 1) ** 3).sum()
    return total / (len(one) * len(other) - left_out)


def manifolds(samples: Tensor, reference: Tensor, neighbours: int = 5) -> dict[str, float]:
    """Computes precision, recall, density and coverage from k-nearest-neighbour balls.

    The ball of a point reaches to its k-th nearest neighbour in its own set.
    precision: share of samples that lie in a ball of the reference.
    recall: share of the reference that lies in a ball of the samples.
    density: mean number of reference balls around a sample, divided by k (not bounded by 1).
    coverage: share of the reference balls that contain a sample.
    For equal distributions the density is 1 on average and the coverage 1 - 2^-k.

    Source: Kynkaanniemi et al. 2019 (arXiv:1904.06991); Naeem et al. 2020 (arXiv:2002.09797).

    Args:
        samples: (N, D), with N above `neighbours`.
        reference: (M, D), with M above `neighbours`.
        neighbours: k.

    Returns:
        The four values by name; all nan if a feature is non-finite.
    """
    if not _finite(samples, reference):
        return dict.fromkeys(("precision", "recall", "density", "coverage"), math.nan)
    radii, radii_of_samples = (_radii(features, neighbours) for features in (reference, samples))
    inside = torch.zeros(len(samples), device=samples.device)  # number of reference balls around each sample
    recalled, nearest_sample = [], []
    for rows, radius in zip(
        _chunks(reference, len(samples)), radii.split(_rows(len(samples), len(reference))), strict=True
    ):
        distances = torch.cdist(rows, samples)
        inside += (distances <= radius[:, None]).sum(0)
        recalled.append((distances <= radii_of_samples).any(1))
        nearest_sample.append(distances.min(1).values)
    return {
        "precision": (inside > 0).float().mean().item(),
        "recall": torch.cat(recalled).float().mean().item(),
        "density": inside.mean().item() / neighbours,
        "coverage": (torch.cat(nearest_sample) <= radii).float().mean().item(),
    }


def _radii(features: Tensor, neighbours: int) -> Tensor:
    """The distance of each point (N, D) to its k-th nearest neighbour, (N,)."""
    rows = _chunks(features, len(features))
    return torch.cat([torch.cdist(part, features).kthvalue(neighbours + 1, dim=1).values for part in rows])


def paired(number: int, dimensions: int) -> int:
    """Returns how many of `number` points (N, D) are compared in pairs: at most PAIRED, and at most 1 GB."""
    return min(number, PAIRED, max(_ELEMENTS_OF_A_SET // dimensions, 2 * GROUPS))


def nearest(features: Tensor, searched: Iterable[Tensor], own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Finds the nearest neighbour of each point: distances (N,) and indices into the points searched (N,).

    Args:
        features: (N, D).
        searched: the points to search, in blocks (m, D), of which one at a time is in memory.
        own: the index of each point among those searched, (N,), which is not its own neighbour; -1 for none.
    """
    smallest = torch.full((len(features),), math.inf, device=features.device)
    exact, indices = smallest.clone(), torch.zeros(len(features), dtype=torch.long, device=features.device)
    start = 0
    for block in searched:
        for rows in torch.arange(len(features), device=features.device).split(_rows(len(block), len(features))):
            distances = torch.cdist(features[rows], block)
            if own is not None:
                place = own[rows] - start
                here = ((place >= 0) & (place < len(block))).nonzero()[:, 0]
                distances[here, place[here]] = math.inf
            found, places = distances.min(1)
            nearer = found < smallest[rows]
            rows, places = rows[nearer], places[nearer]
            smallest[rows], indices[rows] = found[nearer], places + start
            exact[rows] = (features[rows] - block[places]).norm(dim=1)  # 0 for a copy, where `cdist` rounds
        start += len(block)
    return exact, indices


def _rows(columns: int, rows: int) -> int:
    return max(min(_ELEMENTS_AT_A_TIME // columns, rows), 1)


def _chunks(features: Tensor, columns: int) -> Iterator[Tensor]:
    """Yields slices of rows, sized so that a matrix with this number of columns stays within the memory limit."""
    return iter(features.split(_rows(columns, len(features))))
