"""Tiny random text-to-image pipelines, tokenizer files included, for 16 x 16 images."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz"
MOST_TOKENS = 12  # of CLIP
MOST_TOKENS_OF_T5 = 8
TEXTS = ["a cat", "a dog", "cat", "dog"]


def write_photos(number=8, texts=TEXTS, folder="photos"):
    """A folder of images with a metadata.jsonl of texts."""
    Path(folder).mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    lines = []
    for index in range(number):
        pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(Path(folder, f"{index}.png"))
        lines.append(json.dumps({"file_name": f"{index}.png", "text": texts[index % len(texts)], "number": index}))
    Path(folder, "metadata.jsonl").write_text("\n".join(lines))


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


def t5_tokenizer():
    """A T5 tokenizer that knows letters; a token for each."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=MOST_TOKENS_OF_T5)


def t5_encoder(width=32):
    sizes = {"d_kv": 8, "num_heads": 2, "num_layers": 1}
    return T5EncoderModel(T5Config(vocab_size=4 + len(LETTERS), d_model=width, d_ff=width, **sizes))


def text_encoder(width=16, kind=CLIPTextModel):
    return kind(
        CLIPTextConfig(
            vocab_size=2 + 2 * len(LETTERS),
            hidden_size=width,
            projection_dim=width,
            intermediate_size=width,
            num_attention_heads=2,
            num_hidden_layers=1,
            max_position_embeddings=MOST_TOKENS,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def autoencoder(**config):
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        scaling_factor=2.0,
        **config,
    )


UNET = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "attention_head_dim": 2,
}


def save_stable_diffusion(folder, scratch, seed=0, **schedule):
    """Saves a StableDiffusionPipeline of 16 x 16 images."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(cross_attention_dim=16, **UNET)
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


def save_stable_diffusion_xl(folder, scratch, seed=0, **schedule):
    """Saves a StableDiffusionXLPipeline of 16 x 16 images."""
    torch.manual_seed(seed)
    pooled, of_sizes = 16, 8
    unet = UNet2DConditionModel(
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=of_sizes,
        projection_class_embeddings_input_dim=pooled + 6 * of_sizes,
        **UNET,
    )
    StableDiffusionXLPipeline(
        autoencoder(),
        text_encoder(),
        text_encoder(kind=CLIPTextModelWithProjection),
        tokenizer(scratch),
        tokenizer(scratch),
        unet,
        DDPMScheduler(clip_sample=False, steps_offset=1, **schedule),
    ).save_pretrained(str(folder))
    return str(folder)


def save_stable_diffusion_3(folder, scratch, seed=0, shift=3.0):
    """Saves a StableDiffusion3Pipeline of 16 x 16 images."""
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
    )
    StableDiffusion3Pipeline(
        transformer,
        FlowMatchEulerDiscreteScheduler(shift=shift),
        autoencoder(latent_channels=16, shift_factor=0.1),
        text_encoder(kind=CLIPTextModelWithProjection),
        tokenizer(scratch),
        text_encoder(kind=CLIPTextModelWithProjection),
        tokenizer(scratch),
        t5_encoder(),
        t5_tokenizer(),
    ).save_pretrained(str(folder))
    return str(folder)


def save_flux(folder, scratch, seed=0, guidance_embeds=True):
    """Saves a FluxPipeline of 16 x 16 images."""
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    FluxPipeline(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        autoencoder(latent_channels=16, shift_factor=0.1),
        text_encoder(),
        tokenizer(scratch),
        t5_encoder(),
        t5_tokenizer(),
        transformer,
    ).save_pretrained(str(folder))
    return str(folder)
