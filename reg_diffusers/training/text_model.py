"""A text-to-image pipeline with trained adapters: draws previews with diffusers' own pipeline, saves the adapters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..networks.families import Embeddings, Family
from ..networks.lora import frozen_dtype, lora_file_arguments
from ..sampling.fast_scheduler import fast_scheduler
from ..views import DecodedImage

__all__ = ["TextModel"]


class TextModel:
    """The result of a LoRA training.

    Args:
        family: family of the pipeline.
        unet: the adapted network, with the weights to sample from.
        scheduler: scheduler of the training.
        vae: autoencoder.
        size: height and width of the samples, in pixels.
        prompts: embeddings of the texts of the samples, in turn, (P, ...) by name.
        null: embedding of no text, (1, ...) by name.
    """

    def __init__(
        self,
        family: Family,
        unet: nn.Module,
        scheduler,
        vae: nn.Module,
        size: tuple[int, int],
        prompts: Embeddings,
        null: Embeddings,
    ):
        self.unet, self.scheduler, self.vae = unet, scheduler, vae
        self._family, self._size = family, size
        self._prompts, self._null = prompts, null

    @torch.no_grad()
    def draw(self, number: int, steps: int, seed: int) -> Tensor:
        """Draws samples (N, C, H, W) in about [-1, 1] with the guidance scale of the family, one at a time.

        Sample i has the noise of seed + i. Its size is that of the training.

        Args:
            number: number of samples, N.
            steps: steps per sample.
            seed: seed of the noise.
        """
        pipeline = self._family.assemble(self.unet, fast_scheduler(self.scheduler), self.vae)
        pipeline.set_progress_bar_config(disable=True)
        view, samples, device, dtype = DecodedImage(self.vae), [], self.unet.device, frozen_dtype(self.unet)
        height, width = self._size
        null = {f"negative_{name}": value.to(device, dtype) for name, value in self._null.items()}
        for index in range(number):
            texts = {
                name: values[index % len(values)][None].to(device, dtype) for name, values in self._prompts.items()
            }
            latents = pipeline(
                **texts,
                **null,
                height=height,
                width=width,
                guidance_scale=self._family.guidance_scale,
                num_inference_steps=steps,
                generator=torch.Generator().manual_seed(seed + index),
                output_type="latent",
            ).images
            factor = pipeline.vae_scale_factor
            latents = self._family.unpacked(latents, height // factor, width // factor)
            samples.append(view(latents.float()).cpu())
        return torch.cat(samples)

    def save_pretrained(self, folder: str) -> None:
        """Writes pytorch_lora_weights.safetensors, which `load_lora_weights` of the pipeline reads; nothing else."""
        self._family.pipeline_class.save_lora_weights(folder, **lora_file_arguments(self.unet, self._family.component))
