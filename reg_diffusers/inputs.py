"""Checks of the arguments that a training loop passes to the loss. Each error names the line to change."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Set
from numbers import Real

import torch
from torch import Tensor

from .prediction import NoiseLevel, tensor_of
from .term import Term, checked_weights

__all__ = ["checked_loss_weight", "checked_mask", "checked_scheduler", "checked_snr_gamma", "handed_over"]
__all__ += ["one_per_image", "refuse_other_images", "refuse_unknown", "used_by", "weightings_of"]

_PARAMETERS = ("model_output", "timesteps", "sample", "x0_hat", "model", "model_kwargs", "noise", "loss_weight")
_PARAMETERS += ("image_mask", "training_step")


def checked_scheduler(scheduler):
    """Returns a scheduler.

    Raises:
        TypeError: it is not an object with a config, such as a scheduler of diffusers or an `AffineSchedule`.
    """
    if isinstance(scheduler, type) or not hasattr(scheduler, "config"):
        raise TypeError(
            f"scheduler must be a scheduler of diffusers, such as DDPMScheduler(), or an AffineSchedule, not"
            f" {scheduler!r}"
        )
    return scheduler


def checked_snr_gamma(snr_gamma: float | None) -> float | None:
    """Returns gamma of min-SNR weighting.

    Raises:
        ValueError: it is not a finite number above 0.
    """
    if snr_gamma is not None and not (isinstance(snr_gamma, Real) and math.isfinite(snr_gamma) and snr_gamma > 0):
        raise ValueError(f"snr_gamma must be a finite number above 0, or None, not {snr_gamma!r}")
    return snr_gamma


def refuse_other_images(original_samples: Tensor, noise: Tensor | None) -> None:
    """Raises an error for images that are not a batch of floating-point numbers, or for noise of another shape.

    Raises:
        TypeError: original_samples is not a floating-point tensor.
        ValueError: the batch is empty, or the shapes differ.
    """
    if not isinstance(original_samples, Tensor) or not original_samples.is_floating_point():
        got = original_samples.dtype if isinstance(original_samples, Tensor) else type(original_samples).__name__
        raise TypeError(f"original_samples must be a floating-point tensor, images (B, C, ...) in [-1, 1], not {got}")
    if original_samples.shape[0] == 0:
        raise ValueError("original_samples is a batch of 0 images: leave this step out")
    if noise is not None and noise.shape != original_samples.shape:
        raise ValueError(f"noise has shape {tuple(noise.shape)}, original_samples {tuple(original_samples.shape)}")


def used_by(terms: Iterable[Term]) -> frozenset[str]:
    """Returns the names of the arguments that the terms of a loss may be given in its context.

    `original_images` are used by a term with a view that needs `original_samples`.
    """
    known = {"original_samples"}
    for term in terms:
        known.update(term.needs)
        if term.view is not None and "original_samples" in term.needs:
            known.add("original_images")
    return frozenset(known)


def refuse_unknown(context: dict, known: Set[str]) -> None:
    """Raises TypeError for a keyword that is neither a parameter nor `used_by` the terms, with the closest match."""
    for name in context:
        if name not in known:
            close = difflib.get_close_matches(name, [*known, *_PARAMETERS], n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"unexpected keyword argument {name!r}, which no term lists in needs{hint}")


def handed_over(
    model_output, timesteps, sample: Tensor | None, x0_hat: Tensor | None, *, needs_sample: bool
) -> tuple[Tensor, Tensor]:
    """Returns the model output or x0_hat, (B, C, ...), and the timesteps, (B,).

    Args:
        model_output, timesteps, sample, x0_hat: as in `X0Regularization.forward`.
        needs_sample: whether `sample` is required with `x0_hat`.

    Raises:
        ValueError: an argument is missing or redundant, or the batch sizes differ.
        TypeError: `model_output` or `x0_hat` contains no tensor, or `sample` is not one.
    """
    if (model_output is None) == (x0_hat is None):
        raise ValueError("pass either model_output, in the scheduler's prediction_type, or x0_hat=")
    if timesteps is None:
        raise ValueError("timesteps are missing: pass the timestep of each image, (B,)")
    if sample is None and (x0_hat is None or needs_sample):
        raise ValueError("sample is missing: pass the noisy images x_t, the input of the network, (B, C, ...)")
    name, given = ("model_output", model_output) if x0_hat is None else ("x0_hat", x0_hat)
    given = tensor_of(given, name)
    if sample is not None and not isinstance(sample, Tensor):
        raise TypeError(f"sample must be a tensor, the noisy images x_t, (B, C, ...), not {type(sample).__name__}")
    if sample is not None and len(sample) != len(given):
        raise ValueError(
            f"{name} has {len(given)} images, sample {len(sample)}: pass both for the same images; to leave images"
            " out of the loss, use image_mask="
        )
    if sample is not None and x0_hat is not None and given.shape != sample.shape:
        raise ValueError(f"x0_hat has shape {tuple(given.shape)}, sample {tuple(sample.shape)}")
    return given, one_per_image(timesteps, len(given))


def one_per_image(timesteps, batch_size: int) -> Tensor:
    """Returns timesteps as (B,), from a scalar, (B,) or (B, 1, ...).

    Raises:
        ValueError: there are neither 1 nor B timesteps.
    """
    timesteps = torch.as_tensor(timesteps)
    if timesteps.shape == (batch_size,):
        return timesteps
    if timesteps.numel() not in (1, batch_size):
        shape = tuple(timesteps.shape)
        raise ValueError(f"timesteps of shape {shape} for a batch of {batch_size}: pass one per image, or a scalar")
    return timesteps.reshape(-1).expand(batch_size)


def weightings_of(
    terms: Iterable[Term],
    level: NoiseLevel,
    image_mask: Tensor | None,
    factors: Mapping[str, float],
    known: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Computes the weighting of each image by term, (B,), 0 where `image_mask` or a schedule leaves it out.

    Args:
        terms: terms of a loss.
        level: noise levels of the batch.
        image_mask: (B,) bool, or None for all images.
        factors: by term with a schedule, its factor; a term with factor 0 is left out without calling its weighting.
        known: by term, weightings that need not be computed.

    Raises:
        TermError: a weighting does not return a finite (B,) tensor.
        ValueError: the mask has another dtype or shape.
    """
    lambdas = {}
    for term in terms:
        if factors.get(term.name) == 0:
            lambdas[term.name] = torch.zeros_like(level.snr)
        else:
            lambdas[term.name] = known[term.name] if term.name in known else checked_weights(term, level)
    if image_mask is None:
        return lambdas
    mask = checked_mask(image_mask, level)
    return {name: torch.where(mask, weights, 0) for name, weights in lambdas.items()}


def checked_mask(image_mask, level: NoiseLevel) -> Tensor:
    """Returns a mask of images, (B,) bool, on the device of the timesteps.

    Raises:
        ValueError: the dtype is not bool, or the shape is not (B,).
    """
    mask, shape = torch.as_tensor(image_mask), tuple(level.snr.shape)
    if mask.dtype != torch.bool or mask.shape != shape:
        raise ValueError(f"image_mask must be bool of shape {shape}, not {mask.dtype} of shape {tuple(mask.shape)}")
    return mask.to(level.snr.device)


def checked_loss_weight(loss_weight, level: NoiseLevel) -> Tensor:
    """Returns one weight per image, (B,), on the device of the timesteps.

    Raises:
        ValueError: there are neither 1 nor B weights, or one is negative or non-finite (checked on the CPU only).
    """
    loss_weight, batch_size = torch.as_tensor(loss_weight).detach(), len(level.snr)
    if loss_weight.numel() not in (1, batch_size):
        shape = tuple(loss_weight.shape)
        raise ValueError(f"loss_weight must be a number, or one per image, ({batch_size},), not of shape {shape}")
    loss_weight = loss_weight.reshape(-1).to(level.snr).expand(batch_size)
    is_seen = loss_weight.device.type == "cpu"  # elsewhere the check would wait for the device
    if is_seen and not (loss_weight.isfinite() & (loss_weight >= 0)).all():
        raise ValueError("loss_weight must be finite and at least 0")
    return loss_weight
