"""From the regularization flags to the terms of the loss."""

from __future__ import annotations

import argparse
from collections import Counter

import torch

from ..objective import X0Regularization
from ..prediction import add_noise, noise_level, prediction_target
from ..regularizers import regularizer_name
from ..specs import load_regularizer, load_weighting
from ..term import Term, TermError, checked_weights
from ..weighting import constant
from .data import FieldData, PictureData
from .errors import UsageError

__all__ = ["build_terms", "check_terms"]


def build_terms(args: argparse.Namespace) -> tuple[Term, ...]:
    """One term for each --regularizer; a name that occurs twice is numbered.

    Raises:
        UsageError: a regularizer or weighting that cannot be found, or one that needs what this script does not have.
    """
    terms = []
    used = Counter()
    for spec, weight, weighting in zip(args.regularizer, args.reg_weight, args.reg_weighting, strict=True):
        regularizer = _load(load_regularizer, spec, "--regularizer")
        name = regularizer_name(regularizer)
        used[name] += 1
        name = f"{name}_{used[name]}" if used[name] > 1 else name
        terms.append(Term(regularizer, weight, _load(load_weighting, weighting, "--reg_weighting"), name))
        available = _context(args)
        if missing := [need for need in getattr(regularizer, "needs", ()) if need not in available]:
            raise UsageError(
                f"--regularizer {spec} needs {', '.join(missing)}; this script has {', '.join(available)}. Use"
                " reg_diffusers.RegularizedLoss in a loop of your own"
            )
    return tuple(terms)


def _context(args: argparse.Namespace) -> list[str]:
    """What train_reg.py hands to regularizers that ask for it by `needs`."""
    optional = {"class_labels": args.class_conditional, "condition": args.conditioning_image_column}
    return ["original_samples", *(name for name, given in optional.items() if given)]


def check_terms(terms: tuple[Term, ...], noise_scheduler, data: PictureData | FieldData) -> None:
    """Runs each regularizer on real images and its weighting on the whole schedule, before the first step.

    Raises:
        UsageError: one raises; a regularizer returns anything but an attached tensor of shape (B,), a weighting
            anything but a finite one.
    """
    number = min(2, len(data))
    batch = data.__getitems__(list(range(number)))
    original_samples = data.normalization.normalize(batch.pop("values"))
    if "condition" in batch:
        batch["condition"] = data.normalization.normalize(batch["condition"])
    timesteps = torch.ones(number, dtype=torch.long)
    noise = torch.randn(original_samples.shape, generator=torch.Generator().manual_seed(0))
    model_output = prediction_target(noise_scheduler, original_samples, noise, timesteps).clone().requires_grad_()
    sample = add_noise(noise_scheduler, original_samples, noise, timesteps)
    steps = noise_scheduler.config.num_train_timesteps
    schedule = torch.arange(1, steps + 1) if "shift" in noise_scheduler.config else torch.arange(steps)
    for term in terms:
        trial = X0Regularization(noise_scheduler, [Term(term.regularizer, 1.0, constant, term.name)])
        try:
            trial(model_output, timesteps, sample, original_samples=original_samples, **batch).loss.backward()
            checked_weights(term, noise_level(noise_scheduler, schedule))
        except TermError as error:
            raise UsageError(f"--regularizer {term.name}: {error}") from error
        except Exception as error:
            raise _own_error(term, error) from error


def _own_error(term: Term, error: Exception) -> UsageError:
    usage_error = UsageError(f"--regularizer {term.name} raised {type(error).__name__} on a batch of images: {error}")
    usage_error.show_cause = True
    return usage_error


def _load(load, spec: str, flag: str):
    try:
        return load(spec)
    except ValueError as error:
        raise UsageError(f"{flag}: {error}") from error
