r"""ControlNet++: the condition of x0_hat, as a frozen network reads it, must be the condition that was given.

    L = |o - target|^2  +  weight mean_{t <= 200} distance(net(x0_hat), condition)

The mean is over the images of the batch with t <= 200.

Source: Li et al. 2024 (arXiv:2404.07987), sec. 3.3.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..frozen import FrozenNetworks
from ..objective import RegularizedLoss
from ..term import Term
from ..weighting import low_noise

__all__ = ["Consistency", "controlnet_plus_plus"]


def squared_error(found: Tensor, condition: Tensor) -> Tensor:
    """The distance of ControlNet++ for edges and depth."""
    return (found - condition) ** 2


def controlnet_plus_plus(
    scheduler,
    net: nn.Module,
    *,
    distance: Callable[[Tensor, Tensor], Tensor] = squared_error,
    weight: float = 1.0,
    max_timestep: int = 200,
    view: Callable[[Tensor], Tensor] | None = None,
) -> RegularizedLoss:
    """Returns the objective of ControlNet++.

        loss_fn = controlnet_plus_plus(noise_scheduler, depth_net, view=DecodedImage(vae))
        loss_fn(model, latents, model_kwargs={"condition": depth}, condition=depth).loss.backward()

    Args:
        scheduler: noise scheduler of 1000 timesteps.
        net: images, as the view shows them, -> condition (n, ...).
        distance: `distance(net(x0_hat), condition)` -> (n, ...), such as `partial(F.cross_entropy, reduction="none")`
            for segmentation.
        weight: 1 in the paper's code for depth, Canny and HED edges; 0.5 for segmentation and line art.
        max_timestep: last timestep at which the loss acts.
        view: `DecodedImage(vae)` for a latent model.
    """
    weighting = partial(low_noise, max_timestep=max_timestep + 1)
    term = Term(Consistency(net, distance), weight, weighting, "consistency", view=view, normalize="active")
    return RegularizedLoss(scheduler, [term])


class Consistency(nn.Module):
    """The mean of distance(net(x0_hat), condition) of each image, with a frozen network.

    Args:
        net: images (n, C, H, W) -> condition (n, ...). The module itself is used, not a copy.
        distance: of two conditions, -> (n, ...).
    """

    needs = ("condition",)

    def __init__(self, net: nn.Module, distance: Callable[[Tensor, Tensor], Tensor] = squared_error):
        super().__init__()
        self.networks = FrozenNetworks([net])
        self.distance = distance

    def forward(self, x0_hat: Tensor, /, *, condition: Tensor) -> Tensor:
        """Computes the loss of each image, (n,).

        Raises:
            ValueError: the network returns another shape than the condition, which would be broadcast.
        """
        (net,) = self.networks
        found = net(x0_hat)
        if torch.is_floating_point(condition) and found.shape != condition.shape:
            raise ValueError(
                f"the network finds a condition of shape {tuple(found.shape)}, but {tuple(condition.shape)} was given:"
                " resize one of the two"
            )
        return self.distance(found, condition).flatten(1).mean(1)
