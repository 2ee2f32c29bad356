"""How the attention of a UNet2DModel is computed: by one fused kernel, or by two products of matrices and a softmax.

Both compute softmax(q k^T / sqrt(d)) v. The fused kernel of PyTorch never holds the matrix of all pairs of pixels,
which is what large images need. On a CPU in bfloat16 it is slow for small networks, above all for narrow heads
(diffusers' default is 8 channels to a head); there the matrix fits memory with ease, and the products are done by the
processor's own instructions for bfloat16. In float32 the two ways take the same time.
"""

from __future__ import annotations

import re

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor, nn

__all__ = ["attention_bytes", "prefers_explicit_attention", "use_explicit_attention"]

# Bytes of a batch, in the largest layer: a training keeps one such matrix of each layer for its backward pass.
EXPLICIT_ATTENTION_LIMIT = 128 * 2**20
_SLICE = 8 * 2**20  # bytes of the matrix that are computed at a time, while they are in the processor's cache


def attention_bytes(unet: nn.Module, batch_size: int) -> int:
    """Size of the largest attention matrix, of all heads and images of a batch, in bfloat16; 0 without attention.

    Args:
        unet: a `UNet2DModel`, for images of its own `sample_size`.
        batch_size: images, B.
    """
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    matrices = [layer.heads * ((height >> level) * (width >> level)) ** 2 for layer, level in _attention_layers(unet)]
    return 2 * batch_size * max(matrices, default=0)


def prefers_explicit_attention(unet: nn.Module, batch_size: int, device_type: str, mixed_precision: str) -> bool:
    """Whether explicit attention is the faster way here, by a rule: the same whenever it is asked."""
    is_fast = device_type == "cpu" and mixed_precision == "bf16"
    return is_fast and 0 < attention_bytes(unet, batch_size) <= EXPLICIT_ATTENTION_LIMIT


def use_explicit_attention(unet: nn.Module) -> None:
    """Computes all attention of a network by explicit products from now on; weights and their names stay.

    The softmax is taken in the type of its input: PyTorch computes it in float32 inside, and diffusers rounds the
    result to that type anyway, so a float32 copy of the matrix would be kept for nothing.
    """
    for layer in _layers(unet).values():
        layer.set_processor(_Explicit())
        layer.upcast_softmax = False


class _Explicit(AttnProcessor):
    """diffusers' explicit self-attention, for some images of the batch after the other.

    Its result has the channels last in memory, and so would all that follows in the network; PyTorch's group norm for
    a CPU is ten times slower on that, so the usual order is restored.
    """

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states=None, attention_mask=None, temb=None
    ) -> Tensor:
        """(B, C, H, W) or (B, N, C) -> the same shape, in the usual order of memory.

        The other arguments are named because diffusers looks at the names; a UNet2DModel has no use for them.
        """
        pixels = hidden_states[0, 0].numel() if hidden_states.ndim == 4 else hidden_states.shape[1]
        images = max(_SLICE // (attn.heads * pixels**2 * 2), 1)
        if torch.compiler.is_compiling() or images >= len(hidden_states):
            return super().__call__(attn, hidden_states).contiguous()
        parts = [super(_Explicit, self).__call__(attn, part) for part in hidden_states.split(images)]
        return torch.cat(parts).contiguous()


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
