"""Computes the attention of a UNet2DModel by one fused kernel, or by two matrix products and a softmax.

Both compute softmax(q k^T / sqrt(d)) v. The fused kernel of PyTorch never stores the matrix of all pairs of pixels,
which makes large images possible. On a CPU in bfloat16, it is slow for small networks, especially for narrow heads
(diffusers' default is 8 channels per head). There the matrix easily fits in memory, and the products use the
processor's bfloat16 instructions. In float32, the matrix is twice as large.
"""

from __future__ import annotations

import re

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["attention_bytes", "prefers_explicit_attention", "use_explicit_attention"]

# Bytes per batch in the largest layer: a training keeps one such matrix per layer for the backward pass.
EXPLICIT_ATTENTION_LIMIT = 128 * 2**20
_SLICE = 8 * 2**20  # bytes of the matrix that are computed at a time, so they stay in the processor's cache


def attention_bytes(unet: nn.Module, batch_size: int) -> int:
    """Returns the bytes of the largest attention matrix of a batch, over all heads, in bfloat16; 0 without attention.

    Args:
        unet: a `UNet2DModel`, for images of its `sample_size`.
        batch_size: number of images, B.
    """
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    matrices = [layer.heads * ((height >> level) * (width >> level)) ** 2 for layer, level in _attention_layers(unet)]
    return 2 * batch_size * max(matrices, default=0)


def prefers_explicit_attention(unet: nn.Module, batch_size: int, device_type: str, mixed_precision: str) -> bool:
    """Whether explicit attention is faster here, by a fixed rule, so the answer is reproducible."""
    is_fast = device_type == "cpu" and mixed_precision == "bf16"
    return is_fast and 0 < attention_bytes(unet, batch_size) <= EXPLICIT_ATTENTION_LIMIT


def use_explicit_attention(unet: nn.Module) -> None:
    """Switches all attention of a network to explicit products; weights and their names do not change.

    It supports first derivatives only. The softmax runs in the dtype of its input: PyTorch computes it in float32
    internally, and diffusers rounds the result to that dtype anyway, so a float32 copy of the matrix would be a waste.
    """
    for layer in _layers(unet).values():
        layer.set_processor(_Explicit())
        layer.upcast_softmax = False


class _Explicit(AttnProcessor):
    """diffusers' explicit self-attention, with the products of `_SlicedAttention`.

    The computation of diffusers returns channels-last memory, which all following layers would keep. PyTorch's group
    norm on a CPU is many times slower in that format, so this class restores the contiguous format.
    """

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states=None, attention_mask=None, temb=None
    ) -> Tensor:
        """Maps (B, C, H, W) to the same shape, in contiguous memory.

        The other arguments exist because diffusers inspects their names; a UNet2DModel does not use them.
        """
        is_usual = attn.residual_connection and attn.spatial_norm is None and not attn.upcast_attention
        if torch.compiler.is_compiling() or not is_usual:
            return super().__call__(attn, hidden_states, temb=temb).contiguous()
        pixels = hidden_states.flatten(2)
        if attn.group_norm is not None:
            pixels = attn.group_norm(pixels)
        pixels = pixels.mT
        heads = (attn.head_to_batch_dim(project(pixels)) for project in (attn.to_q, attn.to_k, attn.to_v))
        attended = attn.batch_to_head_dim(_SlicedAttention.apply(*heads, attn.scale))
        for layer in attn.to_out:
            attended = layer(attended)
        attended = attended.mT.reshape(hidden_states.shape).contiguous()
        return (attended + hidden_states) / attn.rescale_output_factor


class _SlicedAttention(torch.autograd.Function):
    """Computes softmax(scale q k^T) v in slices of heads and images, so that each matrix stays in the cache.

    Forward and backward finish one slice before the next; on an accelerator there is a single slice. The dtype is that
    of the inputs, independent of autocast. The gradients of k and v are computed as (g^T P)^T instead of P^T g, which
    is faster on a CPU.
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Maps tensors of shape (heads of all images, pixels, channels of a head) to the same shape."""
        keeps = any(ctx.needs_input_grad)
        pixels = query.shape[1]
        probabilities = query.new_empty(len(query), pixels, pixels) if keeps else None
        attended = torch.empty_like(query)
        with torch.autocast(query.device.type, enabled=False):
            for part in _parts(query):
                scores = torch.baddbmm(query.new_zeros(()), query[part], key[part].mT, beta=0, alpha=scale)
                torch.softmax(scores, -1, out=probabilities[part] if keeps else scores)
                torch.bmm(probabilities[part] if keeps else scores, value[part], out=attended[part])
        if keeps:
            ctx.save_for_backward(query, key, value, probabilities)
        ctx.scale = scale
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Returns the gradients of query, key and value."""
        query, key, value, probabilities = ctx.saved_tensors
        of_query, of_key, of_value = (torch.empty_like(tensor) for tensor in (query, key, value))
        with torch.autocast(query.device.type, enabled=False):
            for part in _parts(query):
                p, g = probabilities[part], gradient[part]
                of_value[part] = (g.mT @ p).mT
                of_scores = torch.ops.aten._softmax_backward_data(g @ value[part].mT, p, -1, p.dtype)
                of_query[part] = (of_scores @ key[part]).mul_(ctx.scale)
                of_key[part] = (query[part].mT @ of_scores).mT.mul_(ctx.scale)
        return of_query, of_key, of_value, None


def _parts(query: Tensor) -> list[slice]:
    """Returns the slices of heads that are computed together."""
    if query.device.type != "cpu":
        return [slice(None)]
    number = max(_SLICE // (query.shape[1] ** 2 * query.element_size()), 1)
    return [slice(start, start + number) for start in range(0, len(query), number)]


def _layers(unet: nn.Module) -> dict[str, Attention]:
    return {name: module for name, module in unet.named_modules() if isinstance(module, Attention)}


def _attention_layers(unet: nn.Module) -> list[tuple[Attention, int]]:
    """Returns each attention layer with the number of times its input is downsampled by 2."""
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
