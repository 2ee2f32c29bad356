"""A loader of whole batches that accelerate must not divide again."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard
from torch import Tensor

__all__ = ["prepared_loader", "unchanged"]


def prepared_loader(
    data, batches, seed: int, num_workers: int, accelerator: Accelerator, *, drop_last: bool = False
) -> DataLoaderShard:
    """Builds a loader on the device from the batch sampler of this process, as `accelerator.prepare` would return it.

    Args:
        data: data set that reads whole batches.
        batches: batch sampler of this process.
        seed: seed of the workers.
        num_workers: number of processes that load data; 0 loads in this process.
        accelerator: the accelerator.
        drop_last: whether all batches have the same number of images.
    """
    loader = DataLoaderShard(
        data,
        device=accelerator.device,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=unchanged,
        pin_memory=accelerator.device.type == "cuda",
        # a separate generator: otherwise, each epoch or resumed run would draw from that of the noise
        generator=torch.Generator().manual_seed(seed),
        persistent_workers=num_workers > 0,
        _drop_last=drop_last,
        _non_blocking=True,
    )
    loader._is_accelerate_prepared = True
    return loader


def unchanged(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Collates a batch that is already one."""
    return batch
