"""A pipeline for networks in latents that are called otherwise than a UNet2DModel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..pipeline import RegDDPMPipeline

__all__ = ["LatentPipeline"]


class LatentPipeline(RegDDPMPipeline):
    """A `RegDDPMPipeline` whose network is called as `as_in_loss` returns it, with one timestep for each sample.

    The network takes no conditioning image, and its learned variance, if it has one, is not used.
    """

    @property
    def condition_channels(self) -> int:
        return 0

    @property
    def learns_variance(self) -> bool:
        return False

    def _network(self, t, **context: Tensor) -> Callable:
        called = self.as_in_loss()

        def network(sample: Tensor) -> Tensor:
            scale = getattr(self.scheduler, "scale_model_input", None)  # flow-matching schedulers lack it
            timesteps = torch.as_tensor(t, device=sample.device).expand(len(sample))
            scaled = sample if scale is None else scale(sample, t)
            return called(scaled, timesteps, **context)[0].to(sample.dtype)

        return network
