r"""Numerical checks, before training, that a loop's arguments match its scheduler.

`verify` takes the loop's own target instead of the network's output; x0_hat must then equal the original image. The
error of an image is

    |alpha| ||x0_hat - x_0|| / ||x_t||,

about 1e-7 in float32 if all is right, and about 1 if not. The limit is 1e-3, or 0.05 if an input has half precision.
Images with an SNR below 0.1 contain little of x_0: they count only if the batch has no other, and then a warning is
issued. If the loop passes an image (prediction_type "sample" or x0_hat=), the error does not depend on timesteps and
sample. In this case the noise between sample and original_samples must have a mean square of 1, within a factor of 2.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from ..inputs import checked_mask, handed_over
from ..prediction import noise_level, predict_original_sample, without_learned_variance
from ..schedule import FirstTimesteps
from .hypotheses import Handed, diagnosis, diagnosis_of_time, errors_as_declared

__all__ = ["FirstBatch", "check_noisy_samples", "verify"]

_LIMIT, _HALF_LIMIT = 1e-3, 0.05
_LOWEST_SNR, _HIGHEST_SNR = 0.1, 1e4  # too little image below, too little noise above


@torch.no_grad()
def verify(
    scheduler,
    model_output=None,
    timesteps=None,
    sample: Tensor | None = None,
    original_samples: Tensor | None = None,
    *,
    x0_hat: Tensor | None = None,
) -> float:
    """Checks the arguments of a loop, as `X0Regularization.verify`, for a scheduler.

    Raises:
        ValueError: an argument is missing or non-finite, shapes differ, or the error exceeds its limit.
    """
    handed, timesteps = handed_over(model_output, timesteps, sample, x0_hat, needs_sample=True)
    if original_samples is None:
        raise ValueError("original_samples are missing: pass the images x_0 of sample, (B, C, ...)")
    name = "model_output" if x0_hat is None else "x0_hat"
    _refuse_other_shape("original_samples", original_samples, sample)
    _refuse_nonfinite({name: handed, "sample": sample, "original_samples": original_samples})
    handed = without_learned_variance(scheduler, handed, sample)
    images = (handed, sample, original_samples)
    limit = _HALF_LIMIT if _are_half((*images, timesteps)) or _hold_half(images) else _LIMIT
    timesteps = timesteps.detach().cpu()
    try:
        level = noise_level(scheduler, timesteps)
    except ValueError as error:
        is_readable = timesteps.isfinite().all()
        found = is_readable and _diagnosed(scheduler, name, handed, timesteps, sample, original_samples, limit)
        raise ValueError(found or str(error)) from None
    predicted = handed if x0_hat is not None else predict_original_sample(scheduler, handed, timesteps, sample)
    difference = _norm(predicted - original_samples.to(predicted)) / _norm(sample).clamp(min=1e-30)
    errors = level.alpha.abs() * difference.cpu()  # beyond its times, an alpha of one's own may be negative
    counted = level.snr >= _LOWEST_SNR
    if not counted.any():
        everything = Handed.of(scheduler, name, handed, timesteps, sample, original_samples, limit)
        errors = errors_as_declared(everything)
        counted = torch.ones_like(errors, dtype=torch.bool)
    error = errors[counted].max().item()
    if not error <= limit:
        found = _diagnosed(scheduler, name, handed, timesteps, sample, original_samples, limit)
        raise ValueError(f"{found or _unexplained(name)} ({_measured(errors, counted, timesteps, limit)})")
    if found := _diagnosed(scheduler, name, handed, timesteps, sample, original_samples, limit, diagnosis_of_time):
        raise ValueError(found)
    if not (level.snr >= _LOWEST_SNR).any():
        warnings.warn(
            f"verify: no image of this batch has an SNR of {_LOWEST_SNR:g} or more, so the check is weak: repeat it"
            " with smaller timesteps",
            stacklevel=4,
        )
    return error


@torch.no_grad()
def check_noisy_samples(
    scheduler, timesteps: Tensor, sample: Tensor, original_samples: Tensor, noise: Tensor, image_mask=None
) -> bool:
    """Checks x_t = alpha x_0 + sigma eps for a batch. Waits for an accelerator once.

    Args:
        scheduler: the noise scheduler.
        timesteps: (B,).
        sample: (B, C, ...) x_t.
        original_samples: (B, C, ...) x_0.
        noise: (B, C, ...) eps.
        image_mask: (B,) bool, images to check. Default: all.

    Returns:
        Whether the batch was conclusive: it contained an image with enough signal and enough noise.

    Raises:
        ValueError: the equation does not hold for an image; the message contains the diagnosis.
    """
    level = noise_level(scheduler, timesteps)
    shape = (-1,) + (1,) * (sample.ndim - 1)
    precise = torch.promote_types(sample.dtype, torch.float32)
    alpha, sigma = (part.to(sample.device, precise).reshape(shape) for part in (level.alpha, level.sigma))
    x0, eps = original_samples.to(sample.device, precise), noise.to(sample.device, precise)
    errors = _norm(sample.to(precise) - alpha * x0 - sigma * eps) / _norm(sample).clamp(min=1e-30)
    counted = level.snr >= _LOWEST_SNR
    if image_mask is not None:
        counted = counted & checked_mask(image_mask, level)
    shows = counted & (level.snr <= _HIGHEST_SNR)
    errors, counted, shows = torch.stack([part.to(errors.device).float() for part in (errors, counted, shows)]).cpu()
    counted = counted.bool() & errors.isfinite()  # `nonfinite` handles the others
    images = (sample, original_samples, noise)
    limit = _HALF_LIMIT if _are_half((*images, timesteps)) else _LIMIT
    if not (errors[counted] <= limit).all() and _hold_half(images):
        limit = _HALF_LIMIT
    if not (errors[counted] <= limit).all():
        chosen = counted.nonzero().flatten()
        of = [tensor[chosen.to(tensor.device)] for tensor in (noise, timesteps, sample, original_samples)]
        found = _diagnosed(scheduler, "noise", *of, limit)
        raise ValueError(
            f"sample is not alpha original_samples + sigma noise: {found or _unexplained('noise')}"
            f" ({_measured(errors, counted, timesteps.cpu(), limit)})"
        )
    return bool((counted & shows.bool()).any())


class FirstBatch:
    """Runs `check_noisy_samples` once, on the first batch with all its arguments and a conclusive image.

    Until then, it also checks the timesteps of the first batches; see `schedule.FirstTimesteps`.
    """

    def __init__(self):
        self._is_done = False
        self._timesteps = FirstTimesteps()

    def check(self, scheduler, timesteps: Tensor, sample, original_samples, noise, image_mask) -> None:
        """Runs the checks on a batch, unless they are done or an argument is missing."""
        self._timesteps.check(scheduler, timesteps)
        given = (sample, original_samples, noise)
        if self._is_done or not all(isinstance(part, Tensor) for part in given):
            return
        if torch.compiler.is_compiling() or (sample.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        if noise.shape != sample.shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, sample {tuple(sample.shape)}")
        of_one_shape = original_samples.shape == sample.shape
        self._is_done = not of_one_shape or check_noisy_samples(
            scheduler, timesteps, sample, original_samples, noise, image_mask
        )


def _diagnosed(scheduler, name, handed, timesteps, sample, original_samples, limit, diagnosis=diagnosis) -> str | None:
    return diagnosis(Handed.of(scheduler, name, handed, timesteps, sample, original_samples, limit))


def _norm(images: Tensor) -> Tensor:
    """Returns the norm of each image, (B,), in float32 or float64."""
    precise = torch.promote_types(images.dtype, torch.float32)
    return torch.linalg.vector_norm(images.detach().flatten(1), dim=1, dtype=precise)


def _are_half(tensors: Iterable[Tensor]) -> bool:
    return any(tensor.is_floating_point() and tensor.dtype.itemsize < 4 for tensor in tensors)


def _hold_half(tensors: Iterable[Tensor]) -> bool:
    """Whether float32 values were rounded to half precision before: `.float()` does not restore them.

    Values that even 8 bits hold, such as those of black and white images, were not rounded.
    """
    wide = [tensor for tensor in tensors if tensor.dtype == torch.float32]
    halves = (torch.bfloat16, torch.float16)
    rounded = [tensor for tensor in wide if any(torch.equal(tensor, tensor.to(half).float()) for half in halves)]
    return any(not torch.equal(tensor, tensor.to(torch.float8_e4m3fn).float()) for tensor in rounded)


def _refuse_other_shape(name: str, tensor: Tensor, sample: Tensor) -> None:
    if tensor.shape != sample.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, sample {tuple(sample.shape)}")


def _refuse_nonfinite(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} has non-finite values")


def _unexplained(name: str) -> str:
    return (
        f"{name}, timesteps, sample and original_samples do not match, and no usual mistake explains it: check that"
        " they belong to one step and the same images, that sample is x_t before scale_model_input, the target's"
        " sign, and the scheduler's prediction_type"
    )


def _measured(errors: Tensor, counted: Tensor, timesteps: Tensor, limit: float) -> str:
    """Describes the largest error and its timestep."""
    worst = errors.masked_fill(~counted, -1).nan_to_num(nan=torch.inf).argmax()
    return f"error {errors[worst]:.3g} at timestep {timesteps[worst]:g}, limit {limit:g}"
