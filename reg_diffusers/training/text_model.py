"""A text-to-image pipeline with trained adapters: draws previews with diffusers' own pipeline, saves the adapters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..networks.families import Family
from ..networks.lora import lora_file_arguments
from ..sampling.fast_scheduler import fast_scheduler
from ..views import DecodedImage

__all__ = ["TextModel"]

_GUIDANCE_SCALE = 7.5  # diffusers' default


class TextModel:
    """The result of a LoRA training.

    Args:
        family: family of the pipeline.
        unet: the adapted network, with the weights to sample from.
        scheduler: scheduler of the training.
        vae: autoencoder.
        prompts: embeddings of the texts of the samples, in turn, (P, L, D).
        empty: embedding of the empty text, (L, D).
    """

    def __init__(self, family: Family, unet: nn.Module, scheduler, vae: nn.Module, prompts: Tensor, empty: Tensor):
        self.unet, self.scheduler, self.vae = unet, scheduler, vae
        self._family = family
        self._prompts, self._empty = prompts, empty

    @torch.no_grad()
    def draw(self, number: int, steps: int, seed: int) -> Tensor:
        """Draws samples (N, C, H, W) in about [-1, 1] with classifier-free guidance of 7.5, one at a time.

        Sample i has the noise of seed + i. Its size is that of the training.

        Args:
            number: number of samples, N.
            steps: steps per sample.
            seed: seed of the noise.
        """
        pipeline = self._family.assemble(self.unet, fast_scheduler(self.scheduler), self.vae)
        pipeline.set_progress_bar_config(disable=True)
        view, samples, device = DecodedImage(self.vae), [], self.unet.device
        for index in range(number):
            latents = pipeline(
                prompt_embeds=self._prompts[index % len(self._prompts)][None].to(device),
                negative_prompt_embeds=self._empty[None].to(device),
                guidance_scale=_GUIDANCE_SCALE,
                num_inference_steps=steps,
                generator=torch.Generator().manual_seed(seed + index),
                output_type="latent",
            ).images
            samples.append(view(latents.float()).cpu())
        return torch.cat(samples)

    def save_pretrained(self, folder: str) -> None:
        """Writes pytorch_lora_weights.safetensors, which `load_lora_weights` of the pipeline reads; nothing else."""
        self._family.pipeline_class.save_lora_weights(folder, **lora_file_arguments(self.unet, self._family.component))
