"""Losses L' on the denoised image.

A regularizer is any callable `(B, C, H, W) in [-1, 1] -> (B,)`. It returns one value per image, so that each image can
be weighted by its noise level. The built-in regularizers average over channels and pixels, treat the images of a batch
independently, accept any number of channels (vector fields: at least two), and are differentiable wherever their
formula is. In `pixels`, differences are taken per pixel: at twice the resolution, the same smooth picture has half the
total variation and a quarter of the gradient energy.

A loss that needs more than x0_hat lists it in `needs` and receives it as keyword arguments:

    def masked_error(x0_hat, /, *, original_samples, mask):
        return (mask * (x0_hat - original_samples) ** 2).flatten(1).mean(1)

    masked_error.needs = ("original_samples", "mask")

Losses with `original_samples` among their needs compare x0_hat with its own image (paired); the others judge x0_hat
alone. The families: `pixels`, `frequency`, `similarity`, `physics`, and those of networks, `perceptual`,
`self_perceptual`, `classifier`, `score` and `prompt_similarity`; `combinators` makes regularizers from others.

Bind fixed parameters with `functools.partial(mean_intensity, target=0.2)`.
"""

from . import physics as physics
from .classifier import Classifier as Classifier
from .combinators import equality as equality
from .combinators import inequality as inequality
from .combinators import masked as masked
from .combinators import random_crop as random_crop
from .combinators import resized as resized
from .combinators import threshold as threshold
from .contract import Regularizer as Regularizer
from .contract import regularizer_name as regularizer_name
from .frequency import RadialSpectrum as RadialSpectrum
from .frequency import mean_radial_spectrum as mean_radial_spectrum
from .frequency import radial_spectrum, spectrum, wavelet
from .perceptual import Perceptual as Perceptual
from .pixels import (
    gradient_energy,
    high_frequency_energy,
    isotropic_total_variation,
    laplacian_energy,
    mean_intensity,
    near_background,
    out_of_range,
    sparsity,
    symmetry,
    total_variation,
)
from .prompt_similarity import PromptSimilarity as PromptSimilarity
from .score import Score as Score
from .self_perceptual import SelfPerceptual as SelfPerceptual
from .similarity import ssim

# What the command line knows by name.
__all__ = [
    "gradient_energy",
    "high_frequency_energy",
    "isotropic_total_variation",
    "laplacian_energy",
    "mean_intensity",
    "near_background",
    "out_of_range",
    "radial_spectrum",
    "sparsity",
    "spectrum",
    "ssim",
    "symmetry",
    "total_variation",
    "wavelet",
]
