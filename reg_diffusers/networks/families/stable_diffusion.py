"""Stable Diffusion 1 and 2: a UNet2DConditionModel with the hidden states of one CLIP text encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .family import Embeddings, Family

__all__ = ["FAMILY"]


@torch.no_grad()
def _embed(pipeline, texts: list[str]) -> Embeddings:
    return {"prompt_embeds": pipeline.encode_prompt(texts, pipeline.text_encoder.device, 1, False)[0].float()}


def _call(network: Callable, config: Mapping, sample: Tensor, timesteps, embeddings: Embeddings, _: int) -> Tensor:
    return network(sample, timesteps, encoder_hidden_states=embeddings["prompt_embeds"], return_dict=False)[0]


FAMILY = Family(
    pipeline="StableDiffusionPipeline",
    network="UNet2DConditionModel",
    component="unet",
    target_modules=("to_k", "to_q", "to_v", "to_out.0"),  # the attention layers
    guidance_scale=7.5,
    embed=_embed,
    null=lambda pipeline: _embed(pipeline, [""]),
    token_limits=lambda pipeline: {"tokenizer": pipeline.tokenizer.model_max_length},
    call=_call,
    channels=lambda config: config["out_channels"],
    multiple=lambda config: 2 ** (len(config["block_out_channels"]) - 1),
    without={
        "safety_checker": None,
        "feature_extractor": None,
        "image_encoder": None,
        "requires_safety_checker": False,
    },
)
