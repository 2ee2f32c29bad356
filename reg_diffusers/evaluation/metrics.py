"""Distances between a set of samples and the data."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["sliced_wasserstein"]


def sliced_wasserstein(samples: Tensor, reference: Tensor, *, directions: int = 512, seed: int = 0) -> float:
    r"""Sliced 2-Wasserstein distance of two equally large sets of images, in pixel space.

    SW^2 = E_u[ W_2^2(u.X, u.Y) ] over directions u uniform on the unit sphere; in one dimension W_2^2 is the mean
    squared difference of the sorted projections. Its unit is that of a pixel value: shifting every pixel by c gives c
    in expectation over the directions. Two finite sets from one distribution are not at distance 0: compare with the
    distance of two halves of the data.

    Source: Rabin, Peyre, Delon & Bernot 2011.

    Args:
        samples: (N, ...).
        reference: (N, ...).
        directions: number of random directions.
        seed: of the directions.

    Raises:
        ValueError: sets of different size or shape.
    """
    if samples.shape != reference.shape:
        raise ValueError(
            f"sets of one size and shape are needed, not {tuple(samples.shape)}, {tuple(reference.shape)}"
        )
    samples, reference = samples.flatten(1).float(), reference.flatten(1).float()
    u = torch.randn(samples.shape[1], directions, generator=torch.Generator().manual_seed(seed))
    u = (u / u.norm(dim=0)).to(samples.device)
    difference = (samples @ u).sort(dim=0).values - (reference @ u).sort(dim=0).values
    return float((difference**2).mean().sqrt())
