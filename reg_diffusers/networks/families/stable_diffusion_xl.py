"""Stable Diffusion XL: a UNet2DConditionModel with two CLIP text encoders, a pooled text and the size of the image.

The network was trained with the size of each image before resizing, the corner of its crop and its size after. A
training gives those of its images ("time_ids", see `data.image_sizes`); samples count as of their own size and
uncropped, as in the pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .family import Embeddings, Family

__all__ = ["FAMILY"]


@torch.no_grad()
def _embed(pipeline, texts: list[str]) -> Embeddings:
    device = pipeline.text_encoder.device
    embedded, _, pooled, _ = pipeline.encode_prompt(texts, device=device, do_classifier_free_guidance=False)
    return {"prompt_embeds": embedded.float(), "pooled_prompt_embeds": pooled.float()}


def _null(pipeline) -> Embeddings:
    """Returns zeros or the embedding of an empty text: what the pipeline takes in the place of a negative prompt."""
    empty = _embed(pipeline, [""])
    if pipeline.config.force_zeros_for_empty_prompt:
        return {name: torch.zeros_like(value) for name, value in empty.items()}
    return empty


def _call(network: Callable, config: Mapping, sample: Tensor, timesteps, embeddings: Embeddings, side: int) -> Tensor:
    height, width = (side * length for length in sample.shape[-2:])
    sizes = embeddings.get("time_ids")
    if sizes is None:
        sizes = torch.tensor([[height, width, 0, 0, height, width]], device=sample.device).expand(len(sample), -1)
    added = {"text_embeds": embeddings["pooled_prompt_embeds"], "time_ids": sizes.float()}
    return network(
        sample,
        timesteps,
        encoder_hidden_states=embeddings["prompt_embeds"],
        added_cond_kwargs=added,
        return_dict=False,
    )[0]


FAMILY = Family(
    pipeline="StableDiffusionXLPipeline",
    network="UNet2DConditionModel",
    component="unet",
    target_modules=("to_k", "to_q", "to_v", "to_out.0"),  # the attention layers
    guidance_scale=5.0,
    embed=_embed,
    null=_null,
    token_limits=lambda pipeline: {
        name: getattr(pipeline, name).model_max_length for name in ("tokenizer", "tokenizer_2")
    },
    call=_call,
    channels=lambda config: config["out_channels"],
    multiple=lambda config: 2 ** (len(config["block_out_channels"]) - 1),
    vae_entries=("latents_mean", "latents_std"),
    takes_sizes=True,
    without={"image_encoder": None, "feature_extractor": None},
)
