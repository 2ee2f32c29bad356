"""Conditioning of a network on an image, concatenated with the noisy image as further input channels.

Source: Saharia et al. 2021, "Image Super-Resolution via Iterative Refinement" (SR3, arXiv:2104.07636), sec. 2.2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["takes_condition", "with_condition"]


def with_condition(model: Callable, condition: Tensor | None) -> Callable:
    """Binds a condition to the network: returns (x_t, t, ...) -> model([x_t, condition], t, ...).

        loss_fn(with_condition(unet, condition), original_samples)

    Args:
        model: `(sample, timesteps, **kwargs)`, with C + K input channels.
        condition: (B, K, H, W) in [-1, 1]; None returns the model unchanged.
    """
    if condition is None:
        return model

    def conditioned(sample: Tensor, timesteps, **kwargs):
        if len(condition) != len(sample):
            raise ValueError(
                f"the condition has {len(condition)} images, and the network is called on {len(sample)}: use"
                " takes_condition(model) and model_kwargs={'condition': condition}, which follows the images"
            )
        return model(torch.cat([sample, condition.to(sample)], dim=1), timesteps, **kwargs)

    return conditioned


def takes_condition(model: Callable) -> Callable:
    """Gives the network a keyword for the condition: returns (x_t, t, condition=...) -> model([x_t, condition], t).

        loss_fn(takes_condition(unet), original_samples, model_kwargs={"condition": condition})

    Unlike `with_condition`, this serves estimators that call the network on some images of a batch.

    Args:
        model: `(sample, timesteps, **kwargs)`, with C + K input channels.
    """

    def conditioned(sample: Tensor, timesteps, *, condition: Tensor, **kwargs):
        return with_condition(model, condition)(sample, timesteps, **kwargs)

    return conditioned
