"""Measures L', the distance to the data and the denoising loss of a model, for `--compare` and for `evaluate`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..context import cut
from ..estimators import one_step
from ..loss_weighting import DENSITIES, LOSS_WEIGHTINGS
from ..networks.conditions import Conditions
from ..objective import RegularizedLoss, timesteps_of_training
from ..prediction import noise_level, tensor_of
from ..term import Term, score
from ..weighting import constant
from .distances import GROUPS, Estimate, jackknife, mean_of
from .images import Images, blocks

__all__ = ["LEAST_SNR", "SLICED", "WithoutGradient", "denoising_losses", "distance_to_data"]
__all__ += ["losses_of_predictions", "mean_loss", "sliced_wasserstein"]

SLICED = "sliced Wasserstein"
_DIRECTIONS = 512
_NOISE_LEVELS_PER_IMAGE = 4
LEAST_SNR = 1.0  # of the noise levels at which a loss sees x0_hat: below, x0_hat is a blur, and L' says little
_AT_A_TIME = 16


def mean_loss(term: Term, samples: Tensor | Images, context: Mapping[str, Tensor]) -> Estimate:
    """Measures the mean of L' over samples, with its standard error.

    Args:
        term: the loss; it sees the samples through its view.
        samples: (N, C, H, W) in [-1, 1].
        context: what the regularizer needs for each sample, (N, ...).
    """
    values, start = [], 0
    for part in blocks(samples):
        of_part = {need: context[need][start : start + len(part)].to(part.device) for need in term.needs}
        values.append(score(term, part, of_part).cpu())
        start += len(part)
    return mean_of(torch.cat(values))


def distance_to_data(samples: Tensor | Images, reference: Tensor | Images) -> Estimate:
    """Measures the sliced Wasserstein distance; its standard error is nan below 2 GROUPS samples."""
    along = [_projections(images, _DIRECTIONS, seed=0) for images in (samples, reference)]
    if len(samples) < 2 * GROUPS:
        return Estimate(_distance_along(*along), math.nan, math.nan)
    return jackknife(_distance_along, *along)


@torch.no_grad()
def denoising_losses(
    unet,
    noise_scheduler,
    original_samples: Tensor,
    seed: int,
    *,
    snr_gamma: float | None = None,
    loss_weighting: str = "none",
    timestep_sampling: str = "uniform",
    **conditions: Tensor,
) -> Tensor:
    """Computes a model's denoising loss for each image, (N,), on noise and timesteps that are equal for every model.

    This is the training loss with its weight, without the auxiliary losses. The timesteps follow the distribution of
    the training, evenly spaced in probability, so a few hundred images suffice.

    Args:
        unet: the network, in evaluation mode.
        noise_scheduler: the scheduler it was trained with.
        original_samples: (N, C, H, W) images in [-1, 1].
        seed: the seed of the noise.
        snr_gamma: gamma of the min-SNR weight; None for training without it.
        loss_weighting: the weight of the training, as --loss_weighting names it.
        timestep_sampling: the density of its timesteps, as --timestep_sampling names it.
        **conditions: the conditions of the network, by name.
    """
    weighting, density = LOSS_WEIGHTINGS[loss_weighting], DENSITIES[timestep_sampling]
    loss_fn = RegularizedLoss(noise_scheduler, snr_gamma=snr_gamma, loss_weighting=weighting)
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(len(original_samples), dtype=torch.float64)
    number = len(original_samples)
    for repetition in range(_NOISE_LEVELS_PER_IMAGE):
        levels = (torch.randperm(number, generator=generator) + (repetition + 0.5) / _NOISE_LEVELS_PER_IMAGE) / number
        timesteps = timesteps_of_training(noise_scheduler, levels, density)
        noise = torch.randn(original_samples.shape, generator=generator)
        for batch in torch.arange(number).split(64):
            network, arguments = Conditions(conditions).of_images(batch).bind(unet)
            output = loss_fn(
                network,
                original_samples[batch],
                noise=noise[batch].to(original_samples.device),
                timesteps=timesteps[batch],
                model_kwargs=arguments,
            )
            total[batch] += output.per_image["denoising"].double().cpu()
    return total / _NOISE_LEVELS_PER_IMAGE


def losses_of_predictions(
    term: Term,
    network,
    noise_scheduler,
    original_samples: Tensor,
    seed: int,
    context: Mapping[str, Any],
    **conditions: Tensor,
) -> Tensor:
    """Computes L' of x0_hat for each of some images, (N,), for losses that need more than a sample has.

    Noise and timesteps are equal for every model. Each image has 4 noise levels with an SNR of at least 1, evenly
    spread over the timesteps of such levels.

    Args:
        term: the loss; it sees x0_hat through its view. Its weight and weighting are ignored.
        network: the network, in evaluation mode.
        noise_scheduler: the scheduler it was trained with.
        original_samples: (N, C, H, W) images in [-1, 1], or their latents.
        seed: the seed of the noise.
        context: what the regularizer needs for each image, N each, by name.
        **conditions: the conditions of the network, by name.
    """
    name, number = "loss", len(original_samples)
    seen = replace(term, weight=1.0, weighting=constant, schedule=None, estimator=one_step, name=name)
    loss_fn = RegularizedLoss(noise_scheduler, [seen], max_nonfinite_steps=None).to(original_samples.device)
    all_levels = timesteps_of_training(noise_scheduler, torch.arange(1000) / 1000)
    levels = all_levels[noise_level(noise_scheduler, all_levels).snr >= LEAST_SNR]
    generator, total = torch.Generator().manual_seed(seed), torch.zeros(number, dtype=torch.float64)
    for repetition in range(_NOISE_LEVELS_PER_IMAGE):
        places = (torch.randperm(number, generator=generator) + (repetition + 0.5) / _NOISE_LEVELS_PER_IMAGE) / number
        timesteps = levels[(places * len(levels)).long()]
        noise = torch.randn(original_samples.shape, generator=generator)
        for rows in torch.arange(number).split(_AT_A_TIME):
            model, arguments = Conditions(conditions).of_images(rows).bind(WithoutGradient(network))
            output = loss_fn(
                model,
                original_samples[rows],
                noise=noise[rows].to(original_samples.device),
                timesteps=timesteps[rows],
                model_kwargs=arguments,
                **{need: cut(value, rows, number, need) for need, value in context.items()},
            )
            total[rows] += output.per_image[name].double().cpu()
    return total / _NOISE_LEVELS_PER_IMAGE


class WithoutGradient(nn.Module):
    """A network whose output is a leaf, so that L' is differentiable as in training, and the network keeps nothing."""

    def __init__(self, network: Callable):
        super().__init__()
        self.network = network

    def forward(self, *arguments, **keywords) -> Tensor:
        with torch.no_grad():
            output = tensor_of(self.network(*arguments, **keywords))
        return output.detach().requires_grad_()


def sliced_wasserstein(samples: Tensor, reference: Tensor, *, directions: int = _DIRECTIONS, seed: int = 0) -> float:
    r"""Computes the sliced 2-Wasserstein distance of two sets of images of the same size, in pixel space.

    SW^2 = E_u[ W_2^2(u.X, u.Y) ] over directions u uniform on the unit sphere; in one dimension W_2^2 is the mean
    squared difference of the sorted projections. Its unit is that of a pixel value: shifting every pixel by c gives c
    in expectation over the directions. Two finite sets from one distribution have a distance above 0: compare with the
    distance between two halves of the data.

    Source: Rabin, Peyre, Delon & Bernot 2011.

    Args:
        samples: (N, ...).
        reference: (N, ...).
        directions: number of random directions.
        seed: the seed of the directions.

    Raises:
        ValueError: if the sets differ in size or shape.
    """
    if samples.shape != reference.shape:
        raise ValueError(
            f"both sets must have the same size and shape, not {tuple(samples.shape)} and {tuple(reference.shape)}"
        )
    return _distance_along(*(_projections(images, directions, seed) for images in (samples, reference)))


def _projections(images: Tensor | Images, directions: int, seed: int) -> Tensor:
    """Projects images on random directions, (N, directions)."""
    u = torch.randn(images[:1].numel(), directions, generator=torch.Generator().manual_seed(seed))
    u = u / u.norm(dim=0)
    return torch.cat([part.flatten(1).float() @ u.to(part.device) for part in blocks(images)])


def _distance_along(samples: Tensor, reference: Tensor) -> float:
    difference = samples.sort(dim=0).values - reference.sort(dim=0).values
    return float((difference**2).mean().sqrt())
