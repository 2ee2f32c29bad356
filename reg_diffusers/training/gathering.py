"""Weights of which each process holds a part (FSDP2), made whole: to be sampled from, saved and averaged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor

__all__ = ["SampledNetwork", "divided_like", "is_divided", "whole"]


def is_divided(tensor: Tensor) -> bool:
    """Whether each process holds a part of the tensor, a DTensor."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of one that is divided; then to be called by all processes."""
    return tensor.full_tensor() if is_divided(tensor) else tensor


def divided_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, the same in all processes, on the device of another and divided as that one is."""
    if not is_divided(other):
        return tensor.to(other.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


class SampledNetwork:
    """The network that is sampled from and saved: whole, with averaged weights if there is an average.

    It is the trained network itself, whose weights are exchanged for a while. Only where that is divided, which no
    process could sample from by itself, it is a copy, which the main process fills.

    Args:
        accelerator: of the training.
        unet: the trained network, as prepared by accelerate.
        ema: the average of its weights, or None.

    Attributes:
        unet: the network. A copy has weights in the main process alone.
    """

    def __init__(self, accelerator: Accelerator, unet: torch.nn.Module, ema: EMAModel | None):
        self._trained = unet
        self._ema = ema
        self._is_main_process = accelerator.is_main_process
        self.unet = accelerator.unwrap_model(unet)
        self._is_copy = any(map(is_divided, unet.parameters()))
        if self._is_copy:
            device = accelerator.device if self._is_main_process else "meta"
            self.unet = _copy_without_weights(self.unet.config).to(device)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Inside, `unet` has the weights to sample from, in evaluation mode. To be entered by all processes."""
        if self._is_copy:
            self._gather()
            yield
            return
        parameters = list(self._trained.parameters())
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
        """As `ready`, for good: the training is over. To be called by all processes."""
        if self._is_copy:
            self._gather()
            return
        if self._ema is not None:
            self._ema.copy_to(self._trained.parameters())
        self._trained.eval()

    @torch.no_grad()
    def _gather(self) -> None:
        """Fills the copy, one tensor at a time, so that no process holds all weights but the main one."""
        weights = self._trained.parameters() if self._ema is None else self._ema.shadow_params
        sources = [*weights, *self._trained.buffers()]
        for target, source in zip([*self.unet.parameters(), *self.unet.buffers()], sources, strict=True):
            complete = whole(source)
            if self._is_main_process:
                target.copy_(complete)


def _copy_without_weights(config: dict) -> UNet2DModel:
    # Made on the CPU, where buffers get their values too; the noise of the training is not touched.
    with torch.random.fork_rng(devices=[]):
        return UNet2DModel.from_config(config).requires_grad_(False).eval()
