"""The output of a pipeline: samples as pictures, arrays or tensors, with their scores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput
from diffusers.utils.pil_utils import numpy_to_pil
from torch import Tensor

from ..views import Affine

__all__ = ["RegDDPMPipelineOutput", "rendered"]


@dataclass
class RegDDPMPipelineOutput(BaseOutput):
    """Samples and their scores.

    Attributes:
        images: a list of PIL images, an array (B, H, W, C) or a tensor (B, C, H, W), depending on `output_type`.
        scores: by regularizer, its value on each sample, (B,).
        x0_hat: (steps, B, C, H, W) float32 on the CPU, about [-1, 1]: the predicted image at each step, with
            `return_x0_hat`; else None.
    """

    images: list[PIL.Image.Image] | np.ndarray | Tensor
    scores: dict[str, Tensor]
    x0_hat: Tensor | None = None


def rendered(
    sample: Tensor, output_type: str, normalization: dict | None
) -> list[PIL.Image.Image] | np.ndarray | Tensor:
    """Converts samples to the requested output type.

    Args:
        sample: (B, C, H, W), about [-1, 1].
        output_type: "latent" for `sample` itself; "pt" (B, C, H, W) or "np" (B, H, W, C), pictures in [0, 1] and
            fields in their own units, float64 if float32 would lose the variation; "pil" for pictures.
        normalization: units of a field, see `RegDDPMPipeline`; None for pictures.
    """
    if output_type == "latent":
        return sample
    if normalization is None or output_type == "pil":
        images = (sample / 2 + 0.5).clamp(0, 1)
    else:
        images = Affine(normalization["scale"], normalization["offset"])(sample)
    if output_type == "pt":
        return images
    images = images.to(torch.promote_types(images.dtype, torch.float32)).cpu().permute(0, 2, 3, 1).numpy()
    return numpy_to_pil(images) if output_type == "pil" else images
