"""Stable Diffusion 3 and 3.5: an SD3Transformer2DModel with two CLIP text encoders and T5, by flow matching."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .family import Embeddings, Family

__all__ = ["FAMILY"]

_TOKENS = 256  # of T5; the default of the pipeline


@torch.no_grad()
def _embed(pipeline, texts: list[str]) -> Embeddings:
    embedded, _, pooled, _ = pipeline.encode_prompt(
        *(texts, texts, texts),
        device=pipeline.text_encoder.device,
        do_classifier_free_guidance=False,
        max_sequence_length=_token_limits(pipeline).get("tokenizer_3", _TOKENS),
    )
    return {"prompt_embeds": embedded.float(), "pooled_prompt_embeds": pooled.float()}


def _token_limits(pipeline) -> dict[str, int]:
    of_clip = dict.fromkeys(("tokenizer", "tokenizer_2"), pipeline.tokenizer.model_max_length)
    if pipeline.text_encoder_3 is None:  # many save memory by leaving T5 out: zeros take its place
        return of_clip
    return of_clip | {"tokenizer_3": min(_TOKENS, pipeline.tokenizer_3.model_max_length)}


def _call(network: Callable, config: Mapping, sample: Tensor, timesteps, embeddings: Embeddings, _: int) -> Tensor:
    return network(
        sample,
        timestep=timesteps,
        encoder_hidden_states=embeddings["prompt_embeds"],
        pooled_projections=embeddings["pooled_prompt_embeds"],
        return_dict=False,
    )[0]


_OF_TEXT = ("attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out")
_OF_IMAGE = ("attn.to_k", "attn.to_out.0", "attn.to_q", "attn.to_v")

FAMILY = Family(
    pipeline="StableDiffusion3Pipeline",
    network="SD3Transformer2DModel",
    component="transformer",
    target_modules=_OF_TEXT + _OF_IMAGE,  # the attention layers
    guidance_scale=7.0,
    embed=_embed,
    null=lambda pipeline: _embed(pipeline, [""]),
    token_limits=_token_limits,
    call=_call,
    channels=lambda config: config["out_channels"],
    multiple=lambda config: config["patch_size"],
    vae_entries=("shift_factor",),
    optional=("text_encoder_3", "tokenizer_3"),
    without={"image_encoder": None, "feature_extractor": None},
)
