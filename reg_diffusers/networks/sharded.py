"""Gathers sharded weights (FSDP2), to sample from the network, save it and average its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor

from .trained import trained_parameters

__all__ = ["SampledNetwork", "is_sharded", "sharded_like", "whole"]


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is sharded among the processes (a DTensor)."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Returns the full tensor; if it is sharded, call this in all processes."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def sharded_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Moves a full tensor, equal in all processes, to the device and sharding of another tensor."""
    if not is_sharded(other):
        return tensor.to(other.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


class SampledNetwork:
    """The network for sampling and saving: unsharded, with averaged weights if there is an average.

    Normally it is the trained network itself, with its weights swapped temporarily. If the network is sharded, no
    single process could sample from it, so it is a copy that the main process fills.

    Args:
        accelerator: the accelerator of the training.
        unet: the trained network, prepared by accelerate.
        ema: the average of its weights, or None.

    Attributes:
        unet: the network. A copy has weights in the main process only.
    """

    def __init__(self, accelerator: Accelerator, unet: torch.nn.Module, ema: EMAModel | None):
        self._trained = unet
        self._ema = ema
        self._is_main_process = accelerator.is_main_process
        self.unet = accelerator.unwrap_model(unet)
        self._is_copy = any(map(is_sharded, unet.parameters()))
        if self._is_copy:
            device = accelerator.device if self._is_main_process else "meta"
            self.unet = _copy_without_weights(self.unet).to(device)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Context manager in which `unet` has the weights for sampling, in evaluation mode; for all processes."""
        if self._is_copy:
            self._gather()
            yield
            return
        parameters = trained_parameters(self._trained)
        if self._ema is not None:
            self._ema.store(parameters)
            self._ema.copy_to(parameters)
        self._trained.eval()
        try:
            yield
        finally:
            self._trained.train()
            if self._ema is not None:
                self._ema.restore(parameters)

    def finish(self) -> None:
        """Does the same as `ready` permanently, after the training; call it in all processes."""
        if self._is_copy:
            self._gather()
            return
        if self._ema is not None:
            self._ema.copy_to(trained_parameters(self._trained))
        self._trained.eval()

    @torch.no_grad()
    def _gather(self) -> None:
        """Fills the copy one tensor at a time, so only the main process holds all weights."""
        trained = trained_parameters(self._trained)
        averaged = trained if self._ema is None else self._ema.shadow_params
        latest = dict(zip(map(id, trained), averaged, strict=True))
        weights = [latest.get(id(parameter), parameter) for parameter in self._trained.parameters()]
        sources = [*weights, *self._trained.buffers()]
        for target, source in zip([*self.unet.parameters(), *self.unet.buffers()], sources, strict=True):
            complete = whole(source)
            if self._is_main_process:
                target.copy_(complete)


def _copy_without_weights(network: torch.nn.Module) -> torch.nn.Module:
    # On the CPU, so buffers get their values, too; fork_rng preserves the noise of the training.
    with torch.random.fork_rng(devices=[]):
        return type(network).from_config(network.config).requires_grad_(False).eval()
