r"""Physical laws as losses: the mean squared residual of an equation, in the user's units.

    from reg_diffusers.regularizers import physics

    term = Term(partial(physics.divergence, spacing=0.1), weight=0.1)

Fields are (B, C, H, W); x runs along W and y along H. Of a vector field, channel 0 is the x component and channel 1
the y component. `stencils` defines the finite differences and the boundary conditions. A residual with d derivatives
is proportional to 1 / spacing^d; with the spacing of the grid, L' of a smooth field does not depend on the resolution.

An equation holds in the user's units only: channels that are scaled one by one no longer satisfy it. `views.Affine`
restores the units, and train_reg.py does so by default.

A linear law that all data satisfy also holds for their mean, so a perfect model has the residual 0 at every noise
level. For the others (`darcy`, `unit_norm`), use `weighting.matched`.

Shrinking: multiplying the field by a number below 1 lowers a homogeneous residual (`divergence`, `curl`, `laplace`,
`heat`), and a network that has not converged does so. `normalized=True` divides the value by the mean square of the
field. The quotient is the same for every multiple of the field, so its gradient has no component along the field. A
detached divisor gives the same value, but its gradient still shrinks the field, which is why the gradient goes through
both. The divisor is small where x0_hat is a blur, so `normalized=True` multiplies the weight at high noise: use it
with `weighting.matched` only. A constant flow also lowers the quotient. docs/benchmarks/shrinking.txt compares the
forms: the plain residual with `matched` was best. In any case, compare the amplitude of samples with that of the data.

Source: Raissi, Perdikaris & Karniadakis 2019 (residuals as losses); Bastek, Sun & Kochmann 2025 (arXiv:2403.14404),
for diffusion models.
"""

from __future__ import annotations

from torch import Tensor

from .contract import at_least_float32
from .stencils import difference as difference
from .stencils import laplacian as laplacian

# What the command line knows as physics.NAME.
__all__ = ["conservation", "curl", "darcy", "divergence", "heat", "laplace", "poisson", "unit_norm"]

_SMALLEST_SQUARE = 1e-12  # of a field that is 0 everywhere


def divergence(
    x0_hat: Tensor,
    /,
    *,
    spacing: float = 1.0,
    boundary: str = "periodic",
    order: int = 2,
    normalized: bool = False,
) -> Tensor:
    r"""Divergence of a vector field: mean (du/dx + dv/dy)^2, for incompressible flow.

    Zero for fields (d psi/dy, -d psi/dx) of any stream function psi, with the same stencils, and for every constant
    flow. Channels after the first two are ignored.

    Args:
        x0_hat: (B, C, H, W), C >= 2: channel 0 is u, along W; channel 1 is v, along H.
        spacing: distance h of neighbouring pixels.
        boundary: "periodic", "neumann" (no slope across the wall) or "dirichlet" (no flow on the wall).
        order: 2 or 4.
        normalized: divide by the mean of u^2 + v^2.

    Returns:
        (B,), in squared units of the field per squared unit of h; normalized: per squared unit of h.

    Raises:
        ValueError: the field has fewer than two channels, or as in `stencils.difference`.
    """
    grid = {"spacing": spacing, "boundary": boundary, "order": order}
    u, v = _components(x0_hat, "divergence")
    return _homogeneous(difference(u, -1, **grid) + difference(v, -2, **grid), (u, v), normalized)


def curl(
    x0_hat: Tensor,
    /,
    *,
    spacing: float = 1.0,
    boundary: str = "periodic",
    order: int = 2,
    normalized: bool = False,
) -> Tensor:
    r"""Curl of a vector field: mean (dv/dx - du/dy)^2, for irrotational flow and fields with a potential.

    Zero for gradients (d phi/dx, d phi/dy) with the same stencils, and for every constant flow.

    Args, Returns and Raises: as in `divergence`.
    """
    grid = {"spacing": spacing, "boundary": boundary, "order": order}
    u, v = _components(x0_hat, "curl")
    return _homogeneous(difference(v, -1, **grid) - difference(u, -2, **grid), (u, v), normalized)


def laplace(
    x0_hat: Tensor,
    /,
    *,
    spacing: float = 1.0,
    boundary: str = "periodic",
    order: int = 2,
    normalized: bool = False,
) -> Tensor:
    r"""Laplace's equation: mean (Delta u)^2, for potentials and steady temperatures.

    Zero for constant fields with a periodic or "neumann" boundary, and for the field 0 only with "dirichlet".
    `laplacian_energy` leaves the boundary out instead, and is zero for every harmonic field.

    Args:
        x0_hat: (B, C, H, W), any number of channels.
        spacing, boundary, order: as in `divergence`.
        normalized: divide by the mean square of the field.

    Returns:
        (B,), in squared units of the field per h^4; normalized: per h^4.

    Raises:
        ValueError: as in `stencils.difference`.
    """
    residual = laplacian(x0_hat, spacing=spacing, boundary=boundary, order=order)
    return _homogeneous(residual, (x0_hat,), normalized)


def poisson(
    x0_hat: Tensor, /, *, source: Tensor | float, spacing: float = 1.0, boundary: str = "periodic", order: int = 2
) -> Tensor:
    r"""Poisson's equation, Delta u = source: mean (Delta u - source)^2.

    Zero for its solutions. On a periodic or "neumann" domain there are none unless the mean of the source is 0. It
    cannot be lowered by shrinking if the source is not 0.

    Args:
        x0_hat: (B, C, H, W), any number of channels.
        source: right-hand side, (B, C, H, W) or (B, 1, H, W): a column of the data set, or a bound number.
        spacing, boundary, order: as in `divergence`.

    Returns:
        (B,), in squared units of the field per h^4.

    Raises:
        ValueError: as in `stencils.difference`.
    """
    return _mean_square(laplacian(x0_hat, spacing=spacing, boundary=boundary, order=order) - source)


def darcy(
    x0_hat: Tensor, /, *, source: Tensor | float, spacing: float = 1.0, boundary: str = "periodic", order: int = 2
) -> Tensor:
    r"""Darcy flow, div(K grad p) = -source: mean (K Delta p + grad K . grad p + source)^2.

    Zero where pressure p and permeability K belong together. It is not linear in the pair, so the mean of solutions is
    not a solution: use `weighting.matched`.

    Args:
        x0_hat: (B, C, H, W), C >= 2: channel 0 is the pressure p, channel 1 the permeability K.
        source: inflow, (B, H, W) or (B, 1, H, W): a column of the data set, or a bound number.
        spacing, order: as in `divergence`.
        boundary: "periodic" or "neumann" (no flow through the wall, at which the permeability is mirrored as well).

    Returns:
        (B,), in squared units of K p per h^4.

    Raises:
        ValueError: the field has fewer than two channels, the boundary is "dirichlet", on which the permeability is
            unknown, or as in `stencils.difference`.
    """
    if boundary == "dirichlet":
        raise ValueError(
            'the boundary of darcy must be "periodic" or "neumann": the permeability on a wall is unknown'
        )
    pressure, permeability = _components(x0_hat, "darcy")
    grid = {"spacing": spacing, "boundary": boundary, "order": order}
    flow = permeability * laplacian(pressure, **grid)
    for dim in (-1, -2):
        flow = flow + difference(permeability, dim, **grid) * difference(pressure, dim, **grid)
    if isinstance(source, Tensor) and source.ndim == x0_hat.ndim:
        source = source.squeeze(1)
    return _mean_square(flow + source)


def heat(
    x0_hat: Tensor,
    /,
    *,
    diffusivity: float = 1.0,
    time_step: float = 1.0,
    spacing: float = 1.0,
    boundary: str = "periodic",
    order: int = 2,
    normalized: bool = False,
) -> Tensor:
    r"""Heat equation, du/dt = diffusivity Delta u, from each channel to the next.

    Channel k is the field at time k * time_step. The residual is that of the Crank-Nicolson scheme,
    (u_k+1 - u_k) / time_step - diffusivity Delta (u_k + u_k+1) / 2, with the error O(time_step^2 + h^order).
    Zero for its solutions, among them constant fields with a periodic or "neumann" boundary.

    Source: Crank & Nicolson 1947.

    Args:
        x0_hat: (B, C, H, W), C >= 2 times.
        diffusivity: in h^2 per unit of time.
        time_step: time from one channel to the next.
        spacing, boundary, order: as in `divergence`.
        normalized: divide by the mean square of the field.

    Returns:
        (B,), in squared units of the field per squared unit of time; normalized: per squared unit of time.

    Raises:
        ValueError: the field has fewer than two channels, or as in `stencils.difference`.
    """
    _components(x0_hat, "heat")
    field = at_least_float32(x0_hat)
    change, middle = field.diff(dim=1) / time_step, (field[:, 1:] + field[:, :-1]) / 2
    flow = diffusivity * laplacian(middle, spacing=spacing, boundary=boundary, order=order)
    return _homogeneous(change - flow, (field,), normalized)


def conservation(x0_hat: Tensor, /, *, total: Tensor | float, spacing: float = 1.0) -> Tensor:
    r"""Conserved sum, such as mass or energy: mean over channels of (mean u - total / area)^2.

    The integral of a channel is spacing^2 times the sum of its pixels, and its area is spacing^2 H W. Zero if each
    channel has its total. The law is linear: it holds for means of data with the same total.

    Args:
        x0_hat: (B, C, H, W), any number of channels.
        total: integral of each channel, (B,) or (B, C): a column of the data set, or a bound number.
        spacing: distance of neighbouring pixels.

    Returns:
        (B,), in squared units of the field.
    """
    field = at_least_float32(x0_hat).flatten(2)
    if isinstance(total, Tensor) and total.ndim == 1:
        total = total[:, None]
    return _mean_square(field.mean(2) - total / (spacing**2 * field.shape[2]))


def unit_norm(x0_hat: Tensor, /) -> Tensor:
    r"""Unit length of the vector in each pixel: mean (sum_c u_c^2 - 1)^2, for directions, normals and phases.

    Zero where the channels of every pixel lie on the unit sphere. Means of unit vectors are shorter, so a perfect
    model violates it at high noise: use `weighting.matched`.

    Args:
        x0_hat: (B, C, H, W), any number of channels.

    Returns:
        (B,), without unit.
    """
    field = at_least_float32(x0_hat)
    return _mean_square(field.square().sum(1) - 1)


poisson.needs = darcy.needs = ("source",)
conservation.needs = ("total",)


def _components(field: Tensor, name: str) -> tuple[Tensor, Tensor]:
    if field.ndim != 4 or field.shape[1] < 2:
        raise ValueError(f"{name} needs a field (B, C, H, W) with at least 2 channels, not {tuple(field.shape)}")
    field = at_least_float32(field[:, :2])
    return field[:, 0], field[:, 1]


def _mean_square(residual: Tensor) -> Tensor:
    """Mean over all dimensions but the batch, (B,)."""
    return at_least_float32(residual).square().flatten(1).mean(1)


def _homogeneous(residual: Tensor, fields: tuple[Tensor, ...], normalized: bool) -> Tensor:
    """The mean squared residual, by request divided by the mean square of the fields, with a gradient through both."""
    value = _mean_square(residual)
    return value / (sum(_mean_square(field) for field in fields) + _SMALLEST_SQUARE) if normalized else value
