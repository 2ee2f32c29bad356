"""Checks of the arguments that a training loop passes to the loss. Each error names the line to change."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .prediction import NoiseLevel, tensor_of
from .term import Term, checked_weights

__all__ = ["checked_loss_weight", "checked_mask", "handed_over", "one_per_image"]
__all__ += ["refuse_unknown", "weightings_of"]

_PARAMETERS = ("x0_hat", "model", "model_kwargs", "noise", "loss_weight", "image_mask", "training_step")


def refuse_unknown(context: dict, terms: Iterable[Term]) -> None:
    """Raises TypeError for a keyword that is neither a parameter nor used by a term, with the closest match.

    `original_images` are used by a term with a view that needs `original_samples`.
    """
    known = {"original_samples"}
    for term in terms:
        known.update(term.needs)
        if term.view is not None and "original_samples" in term.needs:
            known.add("original_images")
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
        TypeError: `model_output` contains no tensor.
    """
    if (model_output is None) == (x0_hat is None):
        raise ValueError("pass either model_output, in the scheduler's prediction_type, or x0_hat=")
    if timesteps is None:
        raise ValueError("timesteps are missing: pass the timestep of each image, (B,)")
    if sample is None and (x0_hat is None or needs_sample):
        raise ValueError("sample is missing: pass the noisy images x_t, the input of the network, (B, C, ...)")
    name, given = ("model_output", tensor_of(model_output)) if x0_hat is None else ("x0_hat", x0_hat)
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
    terms: Iterable[Term], level: NoiseLevel, image_mask: Tensor | None, factors: Mapping[str, float]
) -> dict[str, Tensor]:
    """Computes the weighting of each image by term, (B,), 0 where `image_mask` or a schedule leaves it out.

    Args:
        terms: terms of a loss.
        level: noise levels of the batch.
        image_mask: (B,) bool, or None for all images.
        factors: by term with a schedule, its factor; a term with factor 0 is left out without calling its weighting.

    Raises:
        TermError: a weighting does not return a finite (B,) tensor.
        ValueError: the mask has another dtype or shape.
    """
    lambdas = {
        term.name: torch.zeros_like(level.snr) if factors.get(term.name) == 0 else checked_weights(term, level)
        for term in terms
    }
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
