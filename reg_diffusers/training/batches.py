"""Batches of a training: images in [-1, 1] and the conditions of the network, epoch after epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.column_values import flipped
from ..data.training_data import TrainingData
from ..networks.conditions import Conditions
from ..runs.checkpoint import endless_batches
from .preparation import Training

__all__ = ["Batch", "batches_of", "context_of", "flip_half"]


@dataclass(frozen=True)
class Batch:
    """A batch of images.

    Attributes:
        original_samples: images in [-1, 1], (B, C, H, W).
        conditions: conditions of the images.
        given: conditions that the network sees: with --condition_dropout, some are missing.
        columns: columns that regularizers need, by name; in latents also "original_images" (B, C', H', W').
        ids: rows of the images in the data set, (B,).
    """

    original_samples: Tensor
    conditions: Conditions
    given: Conditions
    columns: dict
    ids: Tensor

    def context(self, needs: Sequence[str]) -> dict:
        """Returns the arguments of the loss that regularizers with these `needs` use."""
        return context_of(needs, self.conditions, self.columns)


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
        columns = batch.get("columns", {})
        if random_flip:
            mirrored = batch.get("mirrored")  # latents of the mirror images
            original_samples, conditions, columns = flip_half(original_samples, conditions, columns, mirrored)
        given = conditions.without_some(absent, condition_dropout) if condition_dropout else conditions
        yield Batch(original_samples, conditions, given, columns, batch["ids"])


def context_of(needs: Sequence[str], conditions: Conditions, columns: dict) -> dict:
    """Returns the arguments of the loss that regularizers with these `needs` use, from conditions and columns."""
    given = {**conditions, **columns}
    names = (*needs, "original_images") if "original_samples" in needs else needs
    return {name: given[name] for name in names if name in given}


def flip_half(
    samples: Tensor, conditions: Conditions, columns: dict, mirrored: Tensor | None = None
) -> tuple[Tensor, Conditions, dict]:
    """Flips each image of (B, C, H, W), its conditions and its columns left to right with probability 1/2.

    Args:
        samples: the images.
        conditions: their conditions.
        columns: columns that regularizers need.
        mirrored: the flipped images, if flipping their values would give something else.
    """
    mask = torch.rand(len(samples), 1, 1, 1, device=samples.device) < 0.5
    mirrored = samples.flip(-1) if mirrored is None else mirrored
    return torch.where(mask, mirrored, samples), conditions.flipped(mask), flipped(columns, mask)
