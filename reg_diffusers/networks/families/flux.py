"""Flux 1: a FluxTransformer2DModel with T5 and a pooled CLIP text, by flow matching on latents in patches of 2 x 2.

The network of FLUX.1-dev takes the guidance scale as an input, because it was distilled from samples with guidance. It
is trained at 1: the loss is that of a model without guidance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .family import Embeddings, Family

__all__ = ["FAMILY"]

_TOKENS = 512  # of T5; the default of the pipeline
_GUIDANCE_OF_TRAINING = 1.0
_TIMESTEPS = 1000  # the network takes sigma, as the pipeline gives it


@torch.no_grad()
def _embed(pipeline, texts: list[str]) -> Embeddings:
    embedded, pooled, _ = pipeline.encode_prompt(
        texts,
        device=pipeline.text_encoder.device,
        max_sequence_length=_token_limits(pipeline)["tokenizer_2"],
    )
    return {"prompt_embeds": embedded.float(), "pooled_prompt_embeds": pooled.float()}


def _token_limits(pipeline) -> dict[str, int]:
    return {
        "tokenizer": pipeline.tokenizer.model_max_length,
        "tokenizer_2": min(_TOKENS, pipeline.tokenizer_2.model_max_length),
    }


def _call(network: Callable, config: Mapping, sample: Tensor, timesteps, embeddings: Embeddings, _: int) -> Tensor:
    height, width = sample.shape[-2:]
    texts = embeddings["prompt_embeds"]
    guidance = embeddings.get("guidance", timesteps.new_full((len(sample),), _GUIDANCE_OF_TRAINING))
    output = network(
        _packed(sample),
        encoder_hidden_states=texts,
        pooled_projections=embeddings["pooled_prompt_embeds"],
        timestep=timesteps / _TIMESTEPS,
        img_ids=_places(height // 2, width // 2, sample),
        txt_ids=sample.new_zeros(texts.shape[1], 3),
        guidance=guidance if config["guidance_embeds"] else None,
        return_dict=False,
    )[0]
    return _unpacked(output, height, width)


def _packed(latents: Tensor) -> Tensor:
    """Converts latents (n, c, h, w) to one token per patch of 2 x 2, (n, h w / 4, 4 c)."""
    patches = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # (n, c, h / 2, 2, w / 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """Converts tokens (n, h w / 4, 4 c) to latents (n, c, h, w)."""
    patches = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (height // 2, width // 2))  # (n, h / 2, w / 2, c, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def _places(rows: int, columns: int, like: Tensor) -> Tensor:
    """Returns the position of each token, (rows columns, 3): 0, row, column."""
    axes = [torch.arange(number, device=like.device) for number in (1, rows, columns)]
    return torch.cartesian_prod(*axes).to(torch.float32)


FAMILY = Family(
    pipeline="FluxPipeline",
    network="FluxTransformer2DModel",
    component="transformer",
    target_modules=(
        *("attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0"),
        *("attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    ),
    guidance_scale=3.5,
    is_distilled=lambda config: config["guidance_embeds"],
    embed=_embed,
    null=lambda pipeline: _embed(pipeline, [""]),
    token_limits=_token_limits,
    call=_call,
    channels=lambda config: config["in_channels"] // 4,
    multiple=lambda config: 2,
    sample_size=128,
    vae_entries=("shift_factor",),
    without={"image_encoder": None, "feature_extractor": None},
)
