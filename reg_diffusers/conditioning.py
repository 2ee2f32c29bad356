"""Conditioning a network by an image that is laid beside the noisy one, as further input channels.

Source: Saharia et al. 2021, "Image Super-Resolution via Iterative Refinement" (SR3, arXiv:2104.07636), sec. 2.2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["with_condition"]


def with_condition(model: Callable, condition: Tensor | None) -> Callable:
    """The network as a function of the noisy image alone: (x_t, t, ...) -> model([x_t, condition], t, ...).

        loss_fn(with_condition(unet, condition), original_samples)

    Args:
        model: `(sample, timesteps, **kwargs)`, of C + K input channels.
        condition: (B, K, H, W) in [-1, 1]; None returns the model as it is.
    """
    if condition is None:
        return model

    def conditioned(sample: Tensor, timesteps, **kwargs):
        return model(torch.cat([sample, condition.to(sample)], dim=1), timesteps, **kwargs)

    return conditioned
