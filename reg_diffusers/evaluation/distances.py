"""Distances between sets of feature vectors, each with its standard error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["GROUPS", "Estimate", "frechet", "jackknife", "kernel", "manifolds", "mean_of", "nearest", "share_of"]

GROUPS = 10
_NORMAL = 1.960  # half the width of a 95 % interval, in standard errors
_STUDENT = 2.262  # the same where the standard error itself comes from GROUPS values: 9 degrees of freedom
_ELEMENTS_AT_A_TIME = 2**24  # of a matrix of distances: 64 MB


@dataclass(frozen=True)
class Estimate:
    """A number with its uncertainty.

    Attributes:
        value: the estimate.
        standard_error: of it.
        half_width: the 95 % confidence interval is value ± half_width.
    """

    value: float
    standard_error: float
    half_width: float


def mean_of(values: Tensor) -> Estimate:
    """The mean of independent values (N,), N at least 2."""
    values = _in_64_bits(values)
    error = values.std().item() / math.sqrt(len(values))
    return Estimate(values.mean().item(), error, _NORMAL * error)


def _in_64_bits(values: Tensor) -> Tensor:
    """On the same device, but for MPS, which has no such numbers."""
    return values.cpu().double() if values.device.type == "mps" else values.double()


def _finite(samples: Tensor, reference: Tensor) -> bool:
    return bool(samples.isfinite().all() and reference.isfinite().all())


def share_of(which: Tensor) -> Estimate:
    """The share of independent cases (N,) bool that are true.

    Its error is that of two more cases of each kind (Agresti & Coull 1998), because 0 of 100 does not mean never.
    """
    number, true = len(which), which.sum().item()
    guarded = (true + 2) / (number + 4)
    error = math.sqrt(guarded * (1 - guarded) / (number + 4))
    return Estimate(true / number, error, _NORMAL * error)


def jackknife(statistic: Callable[..., float | dict], *sets: Tensor) -> Estimate | dict[str, Estimate]:
    """A statistic of sets of samples, with the standard error of the delete-a-group jackknife.

    The samples are dealt out to GROUPS groups, sample i to group i modulo GROUPS, and each group is left out in turn:
    from all sets at once, where several are given. SE^2 = (g - 1)/g sum_j (s_j - mean s)^2 over the statistics s_j of
    what is left. A bias that a statistic has for all sets of its size, as the Frechet distance has, is in the value
    and not in the error.

    Source: Shao & Tu, The Jackknife and Bootstrap, 1995, section 2.3.

    Args:
        statistic: of the sets; a number, or several by name.
        *sets: (N, ...) each, N at least 2 GROUPS.

    Raises:
        ValueError: fewer samples.
    """
    number = len(sets[0])
    if number < 2 * GROUPS:
        raise ValueError(f"{number} samples are too few for a standard error: take {2 * GROUPS} or more")
    group = torch.arange(number) % GROUPS
    whole = statistic(*sets)
    parts = [statistic(*(one[(group != left_out).to(one.device)] for one in sets)) for left_out in range(GROUPS)]
    if isinstance(whole, dict):
        return {name: _jackknifed(whole[name], [part[name] for part in parts]) for name in whole}
    return _jackknifed(whole, parts)


def _jackknifed(value: float, parts: list[float]) -> Estimate:
    spread = torch.tensor(parts, dtype=torch.float64).var(correction=0).item()
    error = math.sqrt((GROUPS - 1) * spread)
    return Estimate(float(value), error, _STUDENT * error)


def frechet(samples: Tensor, reference: Tensor) -> float:
    """Frechet distance of the Gaussians with the means and covariances of two sets of features.

    That is |m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2), in squared units of the features. It is too large for
    finite sets, the more so the smaller they are: compare only values of sets of one size.

    Source: Dowson & Landau 1982; on features of a network, Heusel et al. 2017 (arXiv:1706.08500).

    Args:
        samples: (N, D).
        reference: (M, D).

    Returns:
        The distance, nan where a feature is not finite.
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
    """Squared maximum mean discrepancy with the kernel (x.y / D + 1)^3; unbiased, 0 on average where nothing differs.

    The kernel distance (KID) of Binkowski et al. 2018 (arXiv:1801.01401), over all pairs instead of random subsets.

    Args:
        samples: (N, D), N at least 2.
        reference: (M, D), M at least 2.

    Returns:
        The distance, nan where a feature is not finite.
    """
    samples, reference = _in_64_bits(samples), _in_64_bits(reference)
    within = [_mean_of_pairs(features, features, len(features)) for features in (samples, reference)]
    return (sum(within) - 2 * _mean_of_pairs(samples, reference, 0)).item()


def _mean_of_pairs(one: Tensor, other: Tensor, left_out: int) -> Tensor:
    """The mean of the kernel over all pairs; for a set with itself without the pairs (x, x), `left_out` in number."""
    total = sum(((rows @ other.T / one.shape[1] + 1) ** 3).sum() for rows in _chunks(one, len(other)))
    if left_out:
        total = total - ((one.square().sum(1) / one.shape[1] + 1) ** 3).sum()
    return total / (len(one) * len(other) - left_out)


def manifolds(samples: Tensor, reference: Tensor, neighbours: int = 5) -> dict[str, float]:
    """Precision, recall, density and coverage, from balls around each point up to its k-th nearest neighbour.

    precision: share of samples in a ball of the reference; recall: share of the reference in a ball of the samples;
    density: how many balls of the reference hold a sample, over k (not bounded by 1); coverage: share of the
    reference's balls that hold a sample. For equal distributions density is 1 on average, coverage 1 - 2^-k.

    Source: Kynkaanniemi et al. 2019 (arXiv:1904.06991); Naeem et al. 2020 (arXiv:2002.09797).

    Args:
        samples: (N, D), N above `neighbours`.
        reference: (M, D), M above `neighbours`.
        neighbours: k.

    Returns:
        The four by name, all nan where a feature is not finite.
    """
    if not _finite(samples, reference):
        return dict.fromkeys(("precision", "recall", "density", "coverage"), math.nan)
    radii, radii_of_samples = (_radii(features, neighbours) for features in (reference, samples))
    inside = torch.zeros(len(samples), device=samples.device)  # in how many balls of the reference each sample is
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
    """The distance of each point (N, D) to its k-th nearest other, (N,)."""
    rows = _chunks(features, len(features))
    return torch.cat([torch.cdist(part, features).kthvalue(neighbours + 1, dim=1).values for part in rows])


def nearest(features: Tensor, searched: Tensor, *, same: bool = False) -> tuple[Tensor, Tensor]:
    """Distances (N,) to the nearest of the points searched, and their numbers (N,).

    Args:
        features: (N, D).
        searched: (M, D).
        same: the two are the same set, and no point is its own neighbour.
    """
    found, start = [], 0
    for rows in _chunks(features, len(searched)):
        distances = torch.cdist(rows, searched)
        if same:
            own = torch.arange(len(rows), device=rows.device)
            distances[own, own + start] = math.inf
        found.append(distances.argmin(1))
        start += len(rows)
    indices = torch.cat(found)
    return (features - searched[indices]).norm(dim=1), indices  # of a copy exactly 0, which `cdist` rounds


def _rows(columns: int, rows: int) -> int:
    return max(min(_ELEMENTS_AT_A_TIME // columns, rows), 1)


def _chunks(features: Tensor, columns: int) -> Iterator[Tensor]:
    """Rows, as many at a time as a matrix with so many columns may have."""
    return iter(features.split(_rows(columns, len(features))))
