"""Tiny random text-to-image pipelines, tokenizer files included, for 16 x 16 images."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"
MOST_TOKENS = 12


def tokenizer(folder):
    """A CLIP tokenizer that knows letters; a token for each."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokens = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=MOST_TOKENS, unk_token="<|endoftext|>"
    )


def text_encoder(width=16):
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=2 + 2 * len(LETTERS),
            hidden_size=width,
            intermediate_size=width,
            num_attention_heads=2,
            num_hidden_layers=1,
            max_position_embeddings=MOST_TOKENS,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def autoencoder():
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        scaling_factor=2.0,
    )


def save_stable_diffusion(folder, scratch, seed=0, **schedule):
    """Saves a StableDiffusionPipeline of 16 x 16 images."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
    )
    parts = (
        autoencoder(),
        text_encoder(),
        tokenizer(scratch),
        unet,
        DDPMScheduler(clip_sample=False, steps_offset=1, **schedule),
        None,
        None,
    )
    StableDiffusionPipeline(*parts, requires_safety_checker=False).save_pretrained(str(folder))
    return str(folder)
