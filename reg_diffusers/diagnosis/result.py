"""The results of a diagnosis, by name and with units."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Cost", "Diagnosis", "Effect", "Guesses", "LevelDiagnosis", "OnImages"]


@dataclass(frozen=True)
class Effect:
    """The effect of the best common gradient step on L', in shares of the mean squared error; see `effect`.

    Attributes:
        removed: share of the error that the step removes, 0 to 1.
        moved: mean squared shift of clean images by the same step.
        net: removed - moved. The verdict depends on it.
        net_error: standard error of net.
        clean_pull: mean squared gradient of L' at clean images over that at images with an error: 0 if clean images
            satisfy the wish, near 1 if L' ignores the error because it asks for something else.
    """

    removed: float
    moved: float
    net: float
    net_error: float
    clean_pull: float


@dataclass(frozen=True)
class OnImages:
    """L' of real images.

    Attributes:
        mean, standard_deviation: mean and standard deviation over the images.
        percentiles: the percentiles by percent.
        blurred: L' of the mean of all images, which is the best guess for pure noise.
        agreement: cosine between the gradient of L' and white noise added to the images, of a tenth of their spread;
            mean over images. It is above 0 for every convex L'. Below 0, lowering L' adds to the noise.
        agreement_error: its standard error.
        effect: effect of the best gradient step on that noise and on the clean images.
        noisy: mean L' of the images with that noise.
        halfway: mean L' of the same noisy images after a move halfway to the mean of the data, which halves how much
            they vary. A quadratic L' that the data satisfy, such as the squared residual of a linear law, falls to a
            quarter of `noisy`.
    """

    mean: float
    standard_deviation: float
    percentiles: dict[int, float]
    blurred: float
    agreement: float
    agreement_error: float
    effect: Effect
    noisy: float
    halfway: float


@dataclass(frozen=True)
class Guesses:
    """x0_hat of one denoiser at one timestep.

    Attributes:
        source: "ideal", "linear" or "model".
        error: mean square of x0_hat - x_0 over the values of an image.
        value, value_error: mean of L'(x0_hat) over images, and its standard error.
        gap, gap_error: mean of L'(x0_hat) - L'(x_0), and its standard error.
        denoising_gradient, auxiliary_gradient: root mean square norms of the weighted gradients of both losses, with
            respect to the model output.
        cosine, cosine_error: cosine between the two, mean over images: above 0 they agree, below 0 they conflict.
        effect: effect of the best gradient step on the error x0_hat - x_0 and on the clean images.
        nonfinite: number of images that no value of L' includes, because L' or its gradient is non-finite.
    """

    source: str
    error: float
    value: float
    value_error: float
    gap: float
    gap_error: float
    denoising_gradient: float
    auxiliary_gradient: float
    cosine: float
    cosine_error: float
    effect: Effect
    nonfinite: int


@dataclass(frozen=True)
class LevelDiagnosis:
    """The measurements at one timestep.

    Attributes:
        timestep, snr: the timestep and its SNR.
        training_share: the share of the training that this timestep represents.
        decided_share: the share of a sample that is decided there: its share of sqrt(SNR) along a DDIM trajectory.
        denoising_weight: w_d, the weight of the denoising loss in x_0 units.
        ratio, ratio_constant: weight lambda / w_d, for the weighting of the term and for `constant`.
        displacement, displacement_constant: root mean square of x0_hat* - D in units of the data's spread.
        best: the guesses of the better of the two denoisers without training.
        model: the guesses of the model, if there is one.
    """

    timestep: float
    snr: float
    training_share: float
    decided_share: float
    denoising_weight: float
    ratio: float
    ratio_constant: float
    displacement: float
    displacement_constant: float
    best: Guesses
    model: Guesses | None = None


@dataclass(frozen=True)
class Cost:
    """The predicted effect of one weighting with one weight.

    Attributes:
        weighting: the name of the weighting.
        weight: the weight of the term.
        rise: relative rise of the denoising loss.
        largest_rise: largest relative rise at any timestep. Above 1, the loss on the image pulls harder there than the
            data.
        fall: relative fall of L', with each level weighted by the share of a sample that it decides.
        last_timestep: the noisiest timestep with a weighting above 0.
    """

    weighting: str
    weight: float
    rise: float
    largest_rise: float
    fall: float
    last_timestep: float | None


@dataclass(frozen=True)
class Diagnosis:
    """All measurements of one term.

    Attributes:
        name: the name of the term.
        images, held_out: number of images that guesses are computed from, and number of held-out images.
        shape: (C, H, W).
        spread: standard deviation of the data over images and pixels, in pixel values.
        data: L' of real images.
        levels: the measurements at each timestep, in increasing order.
        asked: the predicted effect of the weight and weighting of the term.
        affordable: for each relative rise of the denoising loss (0.01, 0.05), the effect of each weighting at the
            weight that causes this rise, if there is one. Weightings with a `largest_rise` of at most 1 come first,
            sorted by the fall of L'.
        unbounded: whether L' falls without bound, so that images run away at some weight.
    """

    name: str
    images: int
    held_out: int
    shape: tuple[int, ...]
    spread: float
    data: OnImages
    levels: tuple[LevelDiagnosis, ...]
    asked: Cost
    affordable: dict[float, tuple[Cost, ...]]
    unbounded: bool = False

    def gradient_share(self) -> float:
        """Returns the norm of the auxiliary gradient over that of the denoising loss (root mean squares).

        Both gradients are with respect to the model output. `--reg_weight auto:` sets this ratio in a training; here
        it is that of the best guesses instead of a network's. It is 0 if L' has no gradient.
        """
        auxiliary, denoising = (
            sum(level.training_share * getattr(level.best, name) ** 2 for level in self.levels)
            for name in ("auxiliary_gradient", "denoising_gradient")
        )
        return math.sqrt(auxiliary / denoising)
