"""From the regularization flags to the terms of the loss."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import replace

from ..regularizers import regularizer_name
from ..specs import load_regularizer, load_weighting
from ..term import Term
from .checks import OnData
from .errors import UsageError
from .weight_rules import AutoWeight, Target

__all__ = ["build_terms", "check_rules", "weight_rules", "with_weights"]


def build_terms(args: argparse.Namespace) -> tuple[Term, ...]:
    """One term for each --regularizer; a name that occurs twice is numbered. Where a rule sets the weight, it is 0.

    Raises:
        UsageError: a regularizer or weighting that cannot be found, or one that needs what this script does not have;
            a target for another name.
    """
    terms = []
    targets = [target.name for target in args.reg_target or ()]
    used = Counter()
    for spec, weight, weighting in zip(args.regularizer, args.reg_weight, args.reg_weighting, strict=True):
        regularizer = _load(load_regularizer, spec, "--regularizer")
        name = regularizer_name(regularizer)
        used[name] += 1
        name = f"{name}_{used[name]}" if used[name] > 1 else name
        is_ruled = isinstance(weight, AutoWeight) or name in targets
        weighting = _load(load_weighting, weighting, "--reg_weighting")
        terms.append(Term(regularizer, 0.0 if is_ruled else weight, weighting, name))
        available = _context(args)
        if missing := [need for need in getattr(regularizer, "needs", ()) if need not in available]:
            raise UsageError(
                f"--regularizer {spec} needs {', '.join(missing)}; this script has {', '.join(available)}. Use"
                " reg_diffusers.RegularizedLoss in a loop of your own"
            )
    _check_targets(args, [term.name for term in terms])
    return tuple(terms)


def weight_rules(args: argparse.Namespace, terms: tuple[Term, ...]) -> dict[str, float | AutoWeight | Target]:
    """What sets the weight of each term: its --reg_target, or else its --reg_weight."""
    weights = dict(zip([term.name for term in terms], args.reg_weight, strict=False))  # no terms: a plain training
    targets = {target.name: target for target in args.reg_target or ()}
    return {term.name: targets.get(term.name, weights[term.name]) for term in terms}


def with_weights(terms: tuple[Term, ...], weights: dict[str, float]) -> tuple[Term, ...]:
    """The terms with the weights that their rules have come to."""
    return tuple(replace(term, weight=weights[term.name]) for term in terms)


def check_rules(rules: dict[str, float | AutoWeight | Target], on_data: dict[str, OnData]) -> None:
    """Raises `UsageError` for a target relative to data whose L' is not above 0."""
    for name, rule in rules.items():
        if isinstance(rule, Target) and rule.bound(on_data[name].mean) <= 0:
            raise UsageError(
                f"--reg_target {rule}: {name} of the data is {on_data[name].mean:.3g}, which gives no scale: name the"
                f" value itself, such as {name}=0.05"
            )


def _check_targets(args: argparse.Namespace, names: list[str]) -> None:
    seen = set()
    for target in args.reg_target or ():
        if target.name not in names:
            raise UsageError(f"--reg_target {target}: no regularizer of this name; there is {', '.join(names)}")
        if target.name in seen:
            raise UsageError(f"--reg_target {target}: {target.name} has another target already")
        seen.add(target.name)


def _context(args: argparse.Namespace) -> list[str]:
    """What train_reg.py hands to regularizers that ask for it by `needs`."""
    optional = {"class_labels": args.class_conditional, "condition": args.conditioning_image_column}
    return ["original_samples", *(name for name, given in optional.items() if given)]


def _load(load, spec: str, flag: str):
    try:
        return load(spec)
    except ValueError as error:
        raise UsageError(f"{flag}: {error}") from error
