"""From the regularization flags to the terms of the loss."""

from __future__ import annotations

import argparse
from collections import Counter

from ..regularizers import regularizer_name
from ..specs import load_regularizer, load_weighting
from ..term import Term
from .errors import UsageError

__all__ = ["build_terms"]


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


def _load(load, spec: str, flag: str):
    try:
        return load(spec)
    except ValueError as error:
        raise UsageError(f"{flag}: {error}") from error
