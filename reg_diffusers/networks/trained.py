"""Defines the trained parameters in one place, for the optimizer, clipping, averaging and saving."""

from __future__ import annotations

from torch import nn

__all__ = ["trained_parameters"]


def trained_parameters(network: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters of a network that require a gradient, in order."""
    return [parameter for parameter in network.parameters() if parameter.requires_grad]
