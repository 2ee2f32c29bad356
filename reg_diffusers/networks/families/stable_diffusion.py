"""Stable Diffusion 1 and 2: a UNet2DConditionModel with the hidden states of one CLIP text encoder."""

from __future__ import annotations

import torch
from torch import Tensor

from .family import Family

__all__ = ["FAMILY"]

_WITHOUT = {"safety_checker": None, "feature_extractor": None, "image_encoder": None, "requires_safety_checker": False}


def _load_encoder(path: str, cache_dir: str | None):
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(
        path, unet=None, vae=None, cache_dir=cache_dir, use_safetensors=True, **_WITHOUT
    )


@torch.no_grad()
def _embed(pipeline, texts: list[str]) -> Tensor:
    return pipeline.encode_prompt(texts, pipeline.text_encoder.device, 1, False)[0].float()


def _assemble(unet, scheduler, vae):
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(vae, None, None, unet, scheduler, None, None, requires_safety_checker=False)


def _lost_tokens(pipeline, text: str) -> int:
    tokens = pipeline.tokenizer(text, truncation=False, verbose=False).input_ids
    return max(len(tokens) - pipeline.tokenizer.model_max_length, 0)


FAMILY = Family(
    pipeline="StableDiffusionPipeline",
    network="UNet2DConditionModel",
    component="unet",
    target_modules=("to_k", "to_q", "to_v", "to_out.0"),  # the attention layers, as in diffusers' scripts
    load_encoder=_load_encoder,
    embed=_embed,
    assemble=_assemble,
    lost_tokens=_lost_tokens,
)
