"""Batches of a training: images in [-1, 1] and the conditions of the network, epoch after epoch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.training_data import TrainingData
from ..networks.conditions import Conditions
from ..runs.checkpoint import endless_batches
from .preparation import Training

__all__ = ["Batch", "batches_of", "flip_half"]


@dataclass(frozen=True)
class Batch:
    """A batch of images.

    Attributes:
        original_samples: images in [-1, 1], (B, C, H, W).
        conditions: conditions of the images.
        given: conditions that the network sees: with --condition_dropout, some are missing.
        ids: rows of the images in the data set, (B,).
    """

    original_samples: Tensor
    conditions: Conditions
    given: Conditions
    ids: Tensor


def batches_of(
    training: Training, data: TrainingData, *, random_flip: bool, condition_dropout: float = 0.0
) -> Iterator[Batch]:
    """Yields batches without end, from the current position of the training.

    Args:
        training: the training, with its dataloader and progress.
        data: data of the training.
        random_flip: whether to flip each image left to right with probability 1/2.
        condition_dropout: probability that an image has neither text nor class label.
    """
    absent = Conditions.absent(data)
    for batch in endless_batches(training.accelerator, training.dataloader, training.progress):
        original_samples = data.normalization.normalize(batch["values"])
        conditions = Conditions.of_batch(data, batch)
        if random_flip:
            flipped = batch.get("mirrored")  # latents of the mirror images
            original_samples, conditions = flip_half(original_samples, conditions, flipped)
        given = conditions.without_some(absent, condition_dropout) if condition_dropout else conditions
        yield Batch(original_samples, conditions, given, batch["ids"])


def flip_half(samples: Tensor, conditions: Conditions, mirrored: Tensor | None = None) -> tuple[Tensor, Conditions]:
    """Flips each image of (B, C, H, W) and its conditions left to right with probability 1/2.

    Args:
        samples: the images.
        conditions: their conditions.
        mirrored: the flipped images, if flipping their values would give something else.
    """
    flipped = torch.rand(len(samples), 1, 1, 1, device=samples.device) < 0.5
    mirrored = samples.flip(-1) if mirrored is None else mirrored
    return torch.where(flipped, mirrored, samples), conditions.flipped(flipped)
