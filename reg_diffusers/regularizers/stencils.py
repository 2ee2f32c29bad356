r"""Finite differences on a regular grid, of second and fourth order, for residuals of differential equations.

x runs along W (the last dimension) and y along H, with the same spacing h. What lies outside the image is given by
the boundary condition:

    "periodic"    the image repeats
    "neumann"     no slope across the wall, which is half a spacing outside the outermost pixels: the image is mirrored
    "dirichlet"   0 on the wall, which is one spacing outside them: the image is mirrored with the opposite sign

    order 2   du/dx = (u_1 - u_-1) / 2h                     d2u/dx2 = (u_1 - 2 u_0 + u_-1) / h^2
    order 4   du/dx = (8 (u_1 - u_-1) - (u_2 - u_-2)) / 12h
              d2u/dx2 = (16 (u_1 + u_-1) - 30 u_0 - (u_2 + u_-2)) / 12h^2

The error is O(h^order) in the interior and for periodic fields. At a wall, this requires that the mirrored field is
smooth, like sums of cosines ("neumann") or sines ("dirichlet"); otherwise the order is lower next to the wall.

Source: Fornberg 1988 (coefficients); LeVeque 2007, ch. 1 and 2 (boundary conditions).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import at_least_float32

__all__ = ["difference", "laplacian"]

_BOUNDARIES = ("periodic", "neumann", "dirichlet")
_FIRST = {2: (-1 / 2, 0, 1 / 2), 4: (1 / 12, -2 / 3, 0, 2 / 3, -1 / 12)}
_SECOND = {2: (1, -2, 1), 4: (-1 / 12, 4 / 3, -5 / 2, 4 / 3, -1 / 12)}


def difference(field: Tensor, dim: int, *, spacing: float = 1.0, boundary: str = "periodic", order: int = 2) -> Tensor:
    """Computes the first derivative along a dimension by central differences.

    Central differences do not see the finest stripes, of period two pixels.

    Args:
        field: (..., H, W); half precision is computed in float32.
        dim: -1 for d/dx, -2 for d/dy.
        spacing: h, distance of neighbouring pixels.
        boundary: "periodic", "neumann" or "dirichlet".
        order: 2 or 4.

    Returns:
        (..., H, W), in units of the field per unit of h.

    Raises:
        ValueError: `boundary` or `order` is unknown, `spacing` is not above 0, or the field has fewer than order / 2
            pixels along the dimension.
    """
    return _applied(_FIRST, field, dim, spacing, boundary, order) / spacing


def laplacian(field: Tensor, *, spacing: float = 1.0, boundary: str = "periodic", order: int = 2) -> Tensor:
    """Computes the Laplacian, d2/dx2 + d2/dy2.

    Args:
        field: (..., H, W); half precision is computed in float32.
        spacing: h, distance of neighbouring pixels.
        boundary: "periodic", "neumann" or "dirichlet".
        order: 2 or 4.

    Returns:
        (..., H, W), in units of the field per unit of h squared.

    Raises:
        ValueError: as in `difference`.
    """
    return sum(_applied(_SECOND, field, dim, spacing, boundary, order) for dim in (-1, -2)) / spacing**2


def _applied(stencils: dict, field: Tensor, dim: int, spacing: float, boundary: str, order: int) -> Tensor:
    """The weighted sum of shifted copies of the field."""
    if order not in stencils:
        raise ValueError(f"order must be 2 or 4, not {order!r}")
    if boundary not in _BOUNDARIES:
        raise ValueError(f"boundary must be one of {', '.join(_BOUNDARIES)}, not {boundary!r}")
    if not spacing > 0:
        raise ValueError(f"spacing must be above 0, not {spacing!r}")
    size, reach = field.shape[dim], order // 2
    if size < reach:
        raise ValueError(f"order {order} needs at least {reach} pixels along each dimension, not {size}")
    extended = _extended(at_least_float32(field), dim, reach, boundary)
    return sum(
        factor * extended.narrow(dim, place, size) for place, factor in enumerate(stencils[order]) if factor != 0
    )


def _extended(field: Tensor, dim: int, reach: int, boundary: str) -> Tensor:
    """The field with `reach` more pixels at both ends of a dimension."""
    size = field.shape[dim]
    if boundary == "dirichlet":
        wall = torch.zeros_like(field.narrow(dim, 0, 1))
        before = -field.narrow(dim, 0, reach - 1).flip(dim)
        after = -field.narrow(dim, size - reach + 1, reach - 1).flip(dim)
        return torch.cat([before, wall, field, wall, after], dim)
    first, last = field.narrow(dim, 0, reach), field.narrow(dim, size - reach, reach)
    before, after = (last, first) if boundary == "periodic" else (first.flip(dim), last.flip(dim))
    return torch.cat([before, field, after], dim)
