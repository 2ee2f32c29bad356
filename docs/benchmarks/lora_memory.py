"""Estimates the memory of a step of LoRA or of the whole network on a GPU, without one: meta tensors have no data.

    python docs/benchmarks/lora_memory.py

Networks, text encoders and autoencoders have the published configs. The frozen ones are in bfloat16, the adapters in
float32 with gradient, two moments of AdamW and an average. A step has one image, --gradient_checkpointing, the default
layers at rank 16, and a loss on the decoded picture (DecodedImage, chunk 1). In bytes:

    weights  = 2 (network + autoencoder) + 20 adapters
    training = weights + the most memory that other tensors occupy at the same time in the forward and backward pass
    texts    = 2 text encoders, before the training; they are freed then

The whole network is trained in float32 with copies in bfloat16, so its weights count 20 + 2 bytes each (6 less with
--use_8bit_adam, 4 less with --no-use_ema); all else is the same.

These are estimates: they leave out the CUDA context (about 0.5 GiB), the workspace of kernels and fragmentation, and
take attention up to 256 channels a head as a kernel that does not store its matrix. Nothing was run on a GPU. The
table is printed and kept in lora_memory.txt beside this file.
"""

from pathlib import Path

import diffusers
import torch
from decoding_memory import GIB, LATENT_SIDE, STABLE_DIFFUSION, Occupied
from diffusers import (
    AutoencoderKL,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from reg_diffusers.networks.families import FAMILIES
from reg_diffusers.networks.lora import add_lora
from reg_diffusers.networks.trained import trained_parameters
from reg_diffusers.settings.model import ModelSettings
from reg_diffusers.views import DecodedImage

RESULT = Path(__file__).with_suffix(".txt")
RANK = 16
BYTES_OF_TRAINED = 4 * 5  # weight, gradient, two moments, average
LARGEST_HEAD = 256  # of attention by a kernel that does not store its matrix
BY_NAME = {family.pipeline: family for family in FAMILIES}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
T5_XXL = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD35_MEDIUM = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "in_channels": 16,
    "out_channels": 16,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
# family, network, text encoders, pixels, shape of the text, of the pooled text
MODELS = {
    "Stable Diffusion 1.5": (
        "StableDiffusionPipeline",
        lambda: UNet2DConditionModel(cross_attention_dim=768),
        ("CLIP-L",),
        *(512, (77, 768), None),
    ),
    "Stable Diffusion XL": (
        "StableDiffusionXLPipeline",
        lambda: UNet2DConditionModel(**SDXL),
        ("CLIP-L", "CLIP-G"),
        *(1024, (77, 2048), 1280),
    ),
    "Stable Diffusion 3.5 M": (
        "StableDiffusion3Pipeline",
        lambda: SD3Transformer2DModel(**SD35_MEDIUM),
        ("CLIP-L", "CLIP-G", "T5-XXL"),
        *(1024, (77 + 256, 4096), 2048),
    ),
    "Flux.1 dev": (
        "FluxPipeline",
        lambda: FluxTransformer2DModel(guidance_embeds=True),
        ("CLIP-L", "T5-XXL"),
        *(1024, (512, 4096), 768),
    ),
}
ENCODERS = {
    "CLIP-L": lambda: CLIPTextModelWithProjection(CLIPTextConfig(projection_dim=768, **CLIP_L)),
    "CLIP-G": lambda: CLIPTextModelWithProjection(CLIPTextConfig(projection_dim=1280, **CLIP_G)),
    "T5-XXL": lambda: T5EncoderModel(T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **T5_XXL)),
}


def main() -> None:
    functional.scaled_dot_product_attention = _attention
    with torch.device("meta"):
        encoders = {name: number_of(build()) for name, build in ENCODERS.items()}
        rows = [_row(name, encoders, *model) for name, model in MODELS.items()]
        whole = [_row_of_whole(name, *model) for name, model in MODELS.items()]
    headings = f"{'':<28}{'network':>10}{'adapters':>10}{'texts':>10}{'weights':>10}{'training':>10}"
    lines = [
        f"Estimates, GiB; parameters in millions. One image, rank {RANK}, bfloat16, gradient checkpointing; torch"
        f" {torch.__version__.partition('+')[0]}, diffusers {diffusers.__version__}",
        "",
        headings,
        *rows,
        "",
        "Without --lora_rank: all weights, with an average; then with --use_8bit_adam, and --no-use_ema in addition",
        "",
        f"{'':<28}{'network':>10}{'weights':>10}{'training':>10}{'8 bits':>10}{'no EMA':>10}",
        *whole,
    ]
    text = "\n".join(lines) + "\n"
    print(text, end="")
    RESULT.write_text(text)


def number_of(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _row(name, encoders, pipeline, build, names, pixels, text, pooled) -> str:
    family, network = BY_NAME[pipeline], torch.nn.Module.to(build(), torch.bfloat16)
    whole = number_of(network)
    settings = ModelSettings(pretrained_model_name_or_path=name, lora_rank=RANK)
    add_lora(network, settings, family.target_modules)
    adapters = sum(parameter.numel() for parameter in trained_parameters(network))
    of_decoder, peak = _step(family, network, pixels, text, pooled)
    weights = 2 * (whole + of_decoder) + BYTES_OF_TRAINED * adapters
    training = weights + peak - 4 * adapters  # the gradients are in both
    texts = 2 * sum(encoders[one] for one in names)
    parameters = f"{whole / 1e6:>10,.0f}{adapters / 1e6:>10.1f}"
    memory = "".join(f"{value / GIB:>10.1f}" for value in (texts, weights, training))
    return f"{f'{name}, {pixels}':<28}{parameters}{memory}"


def _row_of_whole(name, pipeline, build, _, pixels, text, pooled) -> str:
    family, network = BY_NAME[pipeline], torch.nn.Module.to(build(), torch.bfloat16)
    whole = number_of(network)
    of_decoder, peak = _step(family, network, pixels, text, pooled)
    weights = (BYTES_OF_TRAINED + 2) * whole + 2 * of_decoder
    training = weights + peak - 2 * whole  # the gradients are in both, here in bfloat16
    shown = (weights, training, training - 6 * whole, training - 10 * whole)
    memory = "".join(f"{value / GIB:>10.1f}" for value in shown)
    return f"{f'{name}, {pixels}':<28}{whole / 1e6:>10,.0f}{memory}"


def _step(family, network, pixels, text, pooled) -> tuple[int, int]:
    """Returns the parameters of the decoder's autoencoder, and the most memory of other tensors in a step."""
    network.enable_gradient_checkpointing()
    network.train()
    channels, side = family.channels(network.config), pixels // LATENT_SIDE
    vae = AutoencoderKL(**{**STABLE_DIFFUSION, "latent_channels": channels})
    torch.nn.Module.to(vae, torch.bfloat16)
    embeddings = {"prompt_embeds": torch.empty(1, *text)}
    if pooled:
        embeddings["pooled_prompt_embeds"] = torch.empty(1, pooled)
    called = family.as_called(network, network.config, torch.bfloat16, LATENT_SIDE)
    view, sample = DecodedImage(vae), torch.empty(1, channels, side, side)
    with Occupied() as occupied:
        (output,) = called(sample, torch.empty(1), **embeddings)
        error, x0_hat = output.float() - sample, sample - output.float()
        (error.square().mean() + view(x0_hat).square().mean()).backward()
    return number_of(vae), occupied.peak


class _Attention(torch.autograd.Function):
    """The shapes that a kernel without a stored matrix keeps: query, key, value and result."""

    @staticmethod
    def forward(ctx, query, key, value):
        result = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, result)
        return result

    @staticmethod
    def backward(ctx, gradient):
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


_stored = functional.scaled_dot_product_attention


def _attention(query, key, value, *args, **kwargs):
    if query.shape[-1] > LARGEST_HEAD:
        return _stored(query, key, value, *args, **kwargs)
    return _Attention.apply(query, key, value)


if __name__ == "__main__":
    main()
