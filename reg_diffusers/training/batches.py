"""Batches of a training: images in [-1, 1] and the conditions of the network, epoch after epoch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.column_values import flipped
from ..data.crops import drawn
from ..data.streaming import StreamedPictures
from ..data.training_data import StreamedLatents, TrainingData
from ..networks.conditions import Conditions
from ..runs.checkpoint import endless_batches
from .preparation import Training

__all__ = ["Batch", "Context", "batches_of", "flip_half"]


@dataclass(frozen=True)
class Context:
    """What belongs to the images of a batch.

    Attributes:
        conditions: conditions of the network.
        columns: columns that regularizers need, by name; in latents also "original_images" (B, C', H', W').
    """

    conditions: Conditions
    columns: Mapping[str, Any]

    @classmethod
    def of_batch(cls, data: TrainingData, batch: Mapping[str, Any]) -> Context:
        """Reads what belongs to the images of a batch of the data."""
        return cls(Conditions.of_batch(data, batch), batch.get("columns", {}))

    def flipped(self, mask: Tensor) -> Context:
        """Returns it after the images in `mask` (B, 1, 1, 1) are flipped left to right."""
        return Context(self.conditions.flipped(mask), flipped(self.columns, mask))

    def needed(self, needs: Sequence[str]) -> dict[str, Any]:
        """Returns the arguments of the loss that regularizers with these `needs` use."""
        given = {**self.conditions, **self.columns}
        names = (*needs, "original_images") if "original_samples" in needs else needs
        return {name: given[name] for name in names if name in given}


@dataclass(frozen=True)
class Batch:
    """A batch of images.

    Attributes:
        original_samples: images in [-1, 1], (B, C, H, W).
        context: what belongs to the images.
        given: conditions that the network sees: with --condition_dropout, some are missing.
        ids: rows of the images in the data set, (B,).
    """

    original_samples: Tensor
    context: Context
    given: Conditions
    ids: Tensor


def batches_of(
    training: Training, data: TrainingData, *, random_flip: bool, condition_dropout: float = 0.0, crop_seed: int = 0
) -> Iterator[Batch]:
    """Yields batches without end, from the current position of the training.

    Args:
        training: the training, with its dataloader and progress.
        data: data of the training.
        random_flip: whether to flip each image left to right with probability 1/2.
        condition_dropout: probability that an image has neither text nor class label.
        crop_seed: seed of the windows of --random_crop. They are new in each epoch; in a stream, whose epochs have no
            number, in each batch.
    """
    encodes = isinstance(data, StreamedLatents)
    images, progress = data.images if encodes else data, training.progress
    is_cropped = getattr(images, "is_cropped", False)
    absent = Conditions.absent(data)
    for batch in endless_batches(training.accelerator, training.dataloader, training.progress):
        if is_cropped:
            epoch = progress.batch if isinstance(images, StreamedPictures) else progress.epoch
            batch = drawn(batch, images.shape[1:], crop_seed, epoch)
        original_samples = images.normalization.normalize(batch["values"])
        context = Context.of_batch(images, batch)
        if random_flip:
            mirrored = batch.get("mirrored")  # latents of the mirror images
            original_samples, context = flip_half(original_samples, context, mirrored)
        if encodes:
            batch = data.seen({**batch, "values": original_samples, "columns": context.columns})
            original_samples, context = batch["values"], Context.of_batch(data, batch)
        given = context.conditions
        given = given.without_some(absent, condition_dropout) if condition_dropout else given
        yield Batch(original_samples, context, given, batch["ids"])


def flip_half(samples: Tensor, context: Context, mirrored: Tensor | None = None) -> tuple[Tensor, Context]:
    """Flips each image of (B, C, H, W) and what belongs to it left to right with probability 1/2.

    Args:
        samples: the images.
        context: what belongs to them.
        mirrored: the flipped images, if flipping their values would give something else.
    """
    mask = torch.rand(len(samples), 1, 1, 1, device=samples.device) < 0.5
    mirrored = samples.flip(-1) if mirrored is None else mirrored
    return torch.where(mask, mirrored, samples), context.flipped(mask)
