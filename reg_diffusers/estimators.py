"""Estimators: how a term obtains x0_hat from the network's output.

An estimator is any callable `Prediction -> x0_hat`, (n, C, ...). Two optional attributes describe it: `calls_model =
True` gives it the network. `draws = S` declares that it returns S estimates of each image, (S n, C, ...), draws
outermost; L' is averaged over them.

| estimator  | x0_hat                                                    | network calls | needs                   |
|------------|-----------------------------------------------------------|---------------|-------------------------|
| one_step   | E[x_0 | x_t], by Tweedie's formula                        | none          |                         |
| Ddim       | end of a deterministic trajectory that starts at x_t      | `steps`       | the network             |
| KnownNoise | (1 - kappa) x_0 + kappa E[x_0 | x_t]                      | none          | noise, original_samples |
| MonteCarlo | E[x_0 | x_t] + r z, a Gaussian around it                  | none          |                         |

Sources: Song et al. 2021 (arXiv:2010.02502) for DDIM, and Baldan et al. 2025 (arXiv:2506.08604) for its unrolling in
training; Shen et al. 2025 (SRPO, arXiv:2509.06942) for known noise; Song et al. 2023 (LGD, PMLR 202), eq. 8, for the
Gaussian.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .context import cut, unwrap
from .precision import input_dtype
from .prediction import (
    model_output_for,
    noise_level,
    predict_original_sample,
    scale_model_input,
    step_to,
    tensor_of,
    without_learned_variance,
)
from .schedule import towards_image

__all__ = ["Ddim", "KnownNoise", "MonteCarlo", "Prediction", "calls_model", "mean_of_draws", "one_step"]


@dataclass(frozen=True)
class Prediction:
    """The network's input and output for some images of a batch.

    Attributes:
        scheduler: the noise scheduler.
        model_output: (n, C, ...) output of the network for `sample`; (n, 2C, ...) with a learned variance.
        timesteps: timesteps of the images, (n,).
        sample: (n, C, ...) noisy images x_t.
        model: network, `(sample, timesteps, **model_kwargs)`; None if the caller passed none, and for estimators
            without `calls_model = True`.
        model_kwargs: further arguments of the network, one entry per image or `Shared`.
        noise: (n, C, ...) eps, or None.
        original_samples: (n, C, ...) x_0, or None.
    """

    scheduler: Any
    model_output: Tensor
    timesteps: Tensor
    sample: Tensor
    model: Callable | None = None
    model_kwargs: dict | None = None
    noise: Tensor | None = None
    original_samples: Tensor | None = None

    @classmethod
    def of_image(
        cls,
        scheduler,
        x0_hat: Tensor,
        timesteps: Tensor,
        sample: Tensor,
        noise: Tensor | None = None,
        original_samples: Tensor | None = None,
    ) -> Prediction:
        """Returns the prediction of a network whose x0_hat, (n, C, ...), is known; without the network."""
        output = model_output_for(scheduler, x0_hat, timesteps, sample)
        return cls(scheduler, output, timesteps, sample, noise=noise, original_samples=original_samples)

    def __len__(self) -> int:
        return self.timesteps.shape[0]  # len() of a tensor is slow

    def __getitem__(self, index: Tensor | slice | int) -> Prediction:
        """Selects images by their positions, a bool mask or a slice; a number selects one, (1, ...)."""
        index = index.cpu() if isinstance(index, Tensor) else index
        index = torch.arange(len(self), device="cpu")[index].reshape(-1)

        def part(name: str):
            value = getattr(self, name)
            return None if value is None else cut(value, index, len(self), name)

        names = ("model_output", "timesteps", "sample", "model_kwargs", "noise", "original_samples")
        return replace(self, **{name: part(name) for name in names})

    def predict(self, sample: Tensor, timesteps: Tensor) -> Tensor:
        """Calls the network on these images at other noise levels.

        Args:
            sample: (n, C, ...) noisy images, in the coordinates of `scheduler.step`.
            timesteps: (n,).

        Returns:
            (n, C, ...), without a learned variance.

        Raises:
            ValueError: `model` is None.
        """
        if self.model is None:
            raise ValueError(
                "this estimator calls the network again: set calls_model = True on the estimator, and pass model= and"
                " model_kwargs= to the loss"
            )
        model_input = scale_model_input(self.scheduler, sample, timesteps)
        model_input = model_input.to(input_dtype(self.model, self.sample))
        on_device = timesteps.to(sample.device, non_blocking=True)
        model_output = tensor_of(self.model(model_input, on_device, **unwrap(self.model_kwargs or {})))
        return without_learned_variance(self.scheduler, model_output, sample)


def calls_model(estimator: Callable) -> bool:
    """Returns whether an estimator calls the network again."""
    return bool(getattr(estimator, "calls_model", False))


def mean_of_draws(values: Tensor, draws: int) -> Tensor:
    """Averages values over the draws of an image, (draws n,) -> (n,)."""
    return values if draws == 1 else values.unflatten(0, (draws, -1)).mean(0)


def one_step(prediction: Prediction) -> Tensor:
    """Estimates E[x_0 | x_t] by Tweedie's formula, without a further network call.

    The default estimator; the same as `predict_original_sample`. Returns (n, C, ...), in at least float32.
    """
    return predict_original_sample(
        prediction.scheduler, prediction.model_output, prediction.timesteps, prediction.sample
    )


@dataclass(frozen=True)
class Ddim:
    """Follows the deterministic trajectory of DDIM from x_t to the image, with further network calls.

    The time between x_t and the image is divided evenly. The first step uses the output of the loop; each further step
    calls the network on the active images. On a flow schedule this is Euler's method with steps +
    1 steps.

    Attributes:
        steps: number of further network calls, at least 1.
        gradient: "last" differentiates the last call only, with the memory of one call; "all" differentiates the whole
            trajectory.

    Raises:
        ValueError: `steps` is below 1, or `gradient` is unknown; when called, the network is missing.
    """

    steps: int
    gradient: str = "last"

    calls_model = True

    def __post_init__(self):
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps must be a whole number of at least 1, not {self.steps!r}; 0 would be one_step")
        if self.gradient not in ("last", "all"):
            raise ValueError(f"gradient must be 'last' or 'all', not {self.gradient!r}")

    def __call__(self, prediction: Prediction) -> Tensor:
        """Estimates the end of the trajectory, (n, C, ...)."""
        scheduler, sample, timesteps = prediction.scheduler, prediction.sample, prediction.timesteps
        x0_hat = one_step(prediction)
        for left in range(self.steps, 0, -1):
            end = towards_image(scheduler, prediction.timesteps, left / (self.steps + 1))
            is_differentiated = torch.is_grad_enabled() and (self.gradient == "all" or left == 1)
            if self.gradient == "last":
                x0_hat = x0_hat.detach()
            with torch.set_grad_enabled(is_differentiated):
                sample = step_to(scheduler, x0_hat, timesteps, sample, end)
                model_output = prediction.predict(sample, end)
                x0_hat = predict_original_sample(scheduler, model_output, end, sample)
            timesteps = end
        return x0_hat


@dataclass(frozen=True)
class KnownNoise:
    """Steps to a lower noise level, and removes the known noise there, for a sharper image.

    A step from x_t to x_t' = alpha' x0_hat + sigma' eps_hat, and the image (x_t' - sigma' eps) / alpha' there, give
    together

        (1 - kappa) x_0 + kappa x0_hat,        kappa = 1 - sqrt(SNR_t / SNR_t'),

    which for flow matching is kappa = (t - t') / (t (1 - t')). The gradient with respect to the network is kappa times
    that of `one_step`. Pass `noise` and `original_samples` to the loss: the first call then checks that this noise is
    the one in x_t.

    Attributes:
        kappa: fraction of the way from x_0 to x0_hat, above 0 and at most 1.

    Raises:
        ValueError: `kappa` is out of range; when called, noise or original_samples are missing.
    """

    kappa: float

    def __post_init__(self):
        if not (isinstance(self.kappa, int | float) and 0 < self.kappa <= 1):
            raise ValueError(f"kappa must be above 0 and at most 1, not {self.kappa!r}")

    def __call__(self, prediction: Prediction) -> Tensor:
        """Estimates the image, (n, C, ...)."""
        missing = [name for name in ("noise", "original_samples") if getattr(prediction, name) is None]
        if missing:
            raise ValueError(
                f"KnownNoise needs {' and '.join(missing)}: pass {missing[0]}= to the loss, or in guidance's context"
            )
        x0_hat = one_step(prediction)
        original_samples = prediction.original_samples.to(x0_hat)
        return original_samples + self.kappa * (x0_hat - original_samples)


@dataclass(frozen=True)
class MonteCarlo:
    """Averages L' over a Gaussian around x0_hat, instead of evaluating it at the center.

        x0_hat + r z,        z ~ N(0, I),        r^2 = sigma^2 / (alpha^2 + sigma^2),

    where r is the standard deviation of x_0 given x_t for data of unit variance. The noise is drawn from PyTorch's
    global generator, for the active images.

    Attributes:
        samples: number of draws S, at least 1.

    Raises:
        ValueError: `samples` is below 1.
    """

    samples: int

    def __post_init__(self):
        if isinstance(self.samples, bool) or not isinstance(self.samples, int) or self.samples < 1:
            raise ValueError(f"samples must be a whole number of at least 1, not {self.samples!r}")

    @property
    def draws(self) -> int:
        """The number of draws, `samples`."""
        return self.samples

    def __call__(self, prediction: Prediction) -> Tensor:
        """Draws around the estimate, (S n, C, ...), draws outermost."""
        x0_hat = one_step(prediction)
        level = noise_level(prediction.scheduler, prediction.timesteps)
        radius = (level.sigma / (level.alpha**2 + level.sigma**2).sqrt()).to(x0_hat, non_blocking=True)
        noise = torch.randn((self.samples, *x0_hat.shape), dtype=x0_hat.dtype, device=x0_hat.device)
        return (x0_hat + radius.reshape(-1, *(1,) * (x0_hat.ndim - 1)) * noise).flatten(0, 1)
