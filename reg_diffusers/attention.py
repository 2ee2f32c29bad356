"""How the attention of a UNet2DModel is computed: one fused kernel, or two products of matrices and a softmax.

Both compute softmax(q k^T / sqrt(d)) v. The fused kernel of PyTorch never holds the matrix of all pairs of pixels,
which is what large images need. On a CPU it is slow for the narrow heads of small networks (diffusers' default is 8
channels to a head), where the matrix fits memory with ease and plain products are faster.
"""

from __future__ import annotations

import re

from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import nn

__all__ = ["attention_bytes", "prefers_explicit_attention", "use_explicit_attention"]

# Float32 of a batch, in the largest layer: a training keeps one such matrix of each layer for its backward pass.
EXPLICIT_ATTENTION_LIMIT = 256 * 2**20


def attention_bytes(unet: nn.Module, batch_size: int) -> int:
    """Size of the largest attention matrix, of all heads and images of a batch, in float32; 0 without attention.

    Args:
        unet: a `UNet2DModel`, for images of its own `sample_size`.
        batch_size: images, B.
    """
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    matrices = [layer.heads * ((height >> level) * (width >> level)) ** 2 for layer, level in _attention_layers(unet)]
    return 4 * batch_size * max(matrices, default=0)


def prefers_explicit_attention(unet: nn.Module, batch_size: int, device_type: str) -> bool:
    """Whether explicit attention is the faster way here, by a rule: the same whenever it is asked."""
    return device_type == "cpu" and 0 < attention_bytes(unet, batch_size) <= EXPLICIT_ATTENTION_LIMIT


def use_explicit_attention(unet: nn.Module) -> None:
    """Computes all attention of a network by explicit products from now on; weights and their names stay.

    The softmax is taken in the type of its input: PyTorch computes it in float32 inside, and diffusers rounds the
    result to that type anyway, so a float32 copy of the matrix would be kept for nothing.
    """
    for layer in _layers(unet).values():
        layer.set_processor(AttnProcessor())
        layer.upcast_softmax = False


def _layers(unet: nn.Module) -> dict[str, Attention]:
    return {name: module for name, module in unet.named_modules() if isinstance(module, Attention)}


def _attention_layers(unet: nn.Module) -> list[tuple[Attention, int]]:
    """Each attention layer with how many times its images have been halved."""
    coarsest = len(unet.config.block_out_channels) - 1
    levels = []
    for name, layer in _layers(unet).items():
        place = re.match(r"(down|up)_blocks\.(\d+)\.", name)
        if place is None:
            levels.append((layer, coarsest))
        else:
            number = int(place.group(2))
            levels.append((layer, number if place.group(1) == "down" else coarsest - number))
    return levels
