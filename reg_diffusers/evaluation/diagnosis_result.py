"""What `diagnosis` finds about a loss: its numbers by name, with their units."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Cost", "Diagnosis", "Guesses", "LevelDiagnosis", "OnImages"]


@dataclass(frozen=True)
class OnImages:
    """L' of real images.

    Attributes:
        mean, standard_deviation: over the images.
        percentiles: by percent.
        blurred: L' of the mean of all images, the best guess where there is nothing but noise.
        agreement: cosine between the gradient of L' and white noise that was added to the images, a tenth of their
            spread: its square is the share of the noise that a step against L' of the best length takes away. Above
            0: images that fulfil the wish better are nearer to real ones. About 0: the loss knows nothing of the data.
        agreement_error: its standard error.
    """

    mean: float
    standard_deviation: float
    percentiles: dict[int, float]
    blurred: float
    agreement: float
    agreement_error: float


@dataclass(frozen=True)
class Guesses:
    """x0_hat of one denoiser at one timestep.

    Attributes:
        source: "ideal", "linear" or "model".
        error: mean square of x0_hat - x_0 over the values of an image.
        value, value_error: L'(x0_hat), mean over images, and its standard error.
        gap, gap_error: L'(x0_hat) - L'(x_0), and its standard error.
        denoising_gradient, auxiliary_gradient: root mean square norms of the gradients of both losses, weights
            included, by the model output.
        cosine, cosine_error: between them, mean over images: above 0 they pull the same way, below 0 they fight.
        nonfinite: number of images left out of all that concerns L', because it or its gradient is no number.
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
    nonfinite: int


@dataclass(frozen=True)
class LevelDiagnosis:
    """One timestep.

    Attributes:
        timestep, snr: of it.
        training_share: of the training that this timestep stands for.
        decided_share: of a sample that is decided there, its part of sqrt(SNR) on the way of DDIM.
        denoising_weight: w_d, the weight of the denoising loss in x_0 units.
        ratio, ratio_constant: weight lambda / w_d, for the weighting asked for and for `constant`.
        displacement, displacement_constant: root mean square of x0_hat* - D in units of the data's spread.
        best: the guesses of the better of the two denoisers that need no training.
        model: those of the model, if there is one.
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
    """What one weighting with one weight is predicted to do.

    Attributes:
        weighting: its name.
        weight: of the term.
        rise: of the denoising loss, relative.
        largest_rise: of the denoising loss at one timestep, the one where it rises most. Above 1 the loss on the image
            would pull harder there than the data.
        fall: of L', relative, levels counted by how much of a sample they decide.
        last_timestep: the noisiest of the levels at which the weighting is not 0.
    """

    weighting: str
    weight: float
    rise: float
    largest_rise: float
    fall: float
    last_timestep: float | None


@dataclass(frozen=True)
class Diagnosis:
    """All that was measured about one term.

    Attributes:
        name: of the term.
        images, held_out: numbers of images that guesses were computed from, and for.
        shape: (C, H, W).
        spread: of the data, in pixel values.
        data: L' of real images.
        levels: by rising timestep.
        asked: what the weight and weighting asked for are predicted to do.
        affordable: by relative rise of the denoising loss (0.01, 0.05), what each weighting does at the weight that
            makes it rise so much; without those that never do. First the one under which L' falls most, among those
            whose `largest_rise` is at most 1.
        unbounded: whether L' falls without end, so that nothing holds images back at some weight.
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
        """Norm of the auxiliary gradient by the model output over that of the denoising loss, root mean squares.

        What `--reg_weight auto:` sets, for the best guesses in place of a network's; 0 where nothing pulls.
        """
        auxiliary, denoising = (
            sum(level.training_share * getattr(level.best, name) ** 2 for level in self.levels)
            for name in ("auxiliary_gradient", "denoising_gradient")
        )
        return math.sqrt(auxiliary / denoising)
