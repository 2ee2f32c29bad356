"""Wishes and their opposites, for docs/does-it-make-sense.md: no data can fulfil both of a pair."""

from functools import partial

import torch

from reg_diffusers.regularizers import (
    gradient_energy,
    high_frequency_energy,
    mean_intensity,
    out_of_range,
    sparsity,
    symmetry,
    total_variation,
)


def more_contrast(images, /):
    """Minus the variance of each image: there is always an image with more of it."""
    return -images.flatten(1).var(1)


def less_contrast(images, /):
    """The variance of each image."""
    return images.flatten(1).var(1)


def contrast(images, /, *, target):
    """Squared difference of the image's standard deviation to a target."""
    return (images.flatten(1).std(1) - target) ** 2


def border(images, /, *, target):
    """The outermost pixels have this value."""
    inner = images[..., 1:-1, 1:-1] - target
    total = (images - target).square().flatten(1).sum(1) - inner.square().flatten(1).sum(1)
    return total / (images[0].numel() - inner[0].numel())


def border_absolute(images, /, *, target):
    """The same by absolute differences."""
    edge = torch.ones_like(images[:1])
    edge[..., 1:-1, 1:-1] = 0
    return ((images - target).abs() * edge).flatten(1).sum(1) / edge.sum()


def left_half(images, /, *, target):
    """The left half has this value."""
    return (images[..., : images.shape[-1] // 2] - target).square().flatten(1).mean(1)


def top_half(images, /, *, target):
    """The top half has this value."""
    return (images[..., : images.shape[-2] // 2, :] - target).square().flatten(1).mean(1)


def centre(images, /, *, target):
    """The middle quarter has this value."""
    height, width = images.shape[-2:]
    middle = images[..., height // 4 : height - height // 4, width // 4 : width - width // 4]
    return (middle - target).square().flatten(1).mean(1)


def everywhere(images, /, *, target):
    """The whole image has this value."""
    return (images - target).square().flatten(1).mean(1)


def edge_direction(images, /):
    """Share of the energy of differences that lies along the rows: 0 where all edges lie horizontally."""
    along_rows, along_columns = vertical_edges(images), horizontal_edges(images)
    return along_rows / (along_rows + along_columns + 1e-6)


def darker(images, /):
    """The mean: a linear loss."""
    return images.flatten(1).mean(1)


def antisymmetry(images, /):
    """Difference to minus the mirror image."""
    return (images + images.flip(-1)).square().flatten(1).mean(1)


def inside(images, /, *, limit=1.0):
    """All pixels out of [-limit, limit]."""
    return (limit - images.abs()).clamp(min=0).square().flatten(1).mean(1)


def vertical_edges(images, /):
    """Energy of the differences along a row: low where edges lie horizontally."""
    return images.diff(dim=-1).square().flatten(1).mean(1)


def horizontal_edges(images, /):
    """Energy of the differences along a column: low where edges stand vertically."""
    return images.diff(dim=-2).square().flatten(1).mean(1)


def minus(regularizer, images, /):
    """The opposite of any loss."""
    return -regularizer(images)


PAIRS = {
    "border white / dark": (partial(border, target=1.0), partial(border, target=-1.0)),
    "border white / dark, absolute": (partial(border_absolute, target=1.0), partial(border_absolute, target=-1.0)),
    "left half white / black": (partial(left_half, target=1.0), partial(left_half, target=-1.0)),
    "top half white / black": (partial(top_half, target=1.0), partial(top_half, target=-1.0)),
    "centre white / black": (partial(centre, target=1.0), partial(centre, target=-1.0)),
    "image white / black": (partial(everywhere, target=1.0), partial(everywhere, target=-1.0)),
    "darker / brighter, linear": (darker, partial(minus, darker)),
    "mean -0.9 / 0.9": (partial(mean_intensity, target=-0.9), partial(mean_intensity, target=0.9)),
    "smooth / rough": (total_variation, partial(minus, total_variation)),
    "smooth / rough, squared": (gradient_energy, partial(minus, gradient_energy)),
    "symmetric / antisymmetric": (symmetry, antisymmetry),
    "symmetric / minus it": (symmetry, partial(minus, symmetry)),
    "dark sparse / bright sparse": (partial(sparsity, background=-1.0), partial(sparsity, background=1.0)),
    "sparse / dense": (partial(sparsity, background=-1.0), partial(minus, partial(sparsity, background=-1.0))),
    "in range / out of range": (out_of_range, inside),
    "in range / minus it": (out_of_range, partial(minus, out_of_range)),
    "contrast low / high": (partial(contrast, target=0.1), partial(contrast, target=1.0)),
    "variance / minus it": (less_contrast, more_contrast),
    "few high frequencies / minus": (high_frequency_energy, partial(minus, high_frequency_energy)),
    "edges horizontal / vertical": (vertical_edges, horizontal_edges),
    "edge direction / minus it": (edge_direction, partial(minus, edge_direction)),
}
