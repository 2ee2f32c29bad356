"""Builds the terms of the loss from the settings."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

from ..data.training_data import TrainingData, Wanted
from ..estimators import calls_model
from ..networks.conditions import KINDS
from ..regularizers import regularizer_name
from ..regularizers.contract import masks_of
from ..runtime.errors import UsageError
from ..settings.data import DataSettings
from ..settings.loss import LossSettings
from ..specs import load_estimator, load_regularizer, load_schedule, load_weighting
from ..term import Term, TermError, needs_of, seen_through
from ..trial.checks import OnData
from ..views import DecodedImage
from ..weight_rules import WeightRule, rule_of
from ..weight_schedules import factors_of
from .metrics import LOG_NAMES

__all__ = ["build_terms", "check_rules", "check_schedules", "describe_schedules", "in_units", "of_images"]
__all__ += ["units_note", "wanted_columns", "weight_rules", "with_weights"]

_FROM_THE_LOOP = ("original_samples", "noise", "timesteps")


def build_terms(loss: LossSettings, data: DataSettings) -> tuple[Term, ...]:
    """Builds a term for each --regularizer; repeated names are numbered. A weight set by a rule starts at 0.

    Raises:
        UsageError: a regularizer, weighting, estimator or schedule cannot be found; a regularizer needs what this
            script does not pass; a target has the name of no term, or is combined with a schedule.
    """
    terms, renamed = [], data.renamed_columns
    targets = [target.name for target in loss.reg_target or ()]
    used = set()
    settings = zip(loss.regularizer, loss.reg_weight, loss.reg_weighting, loss.estimators, loss.schedules, strict=True)
    for spec, weight, weighting, estimator, schedule in settings:
        regularizer = _load(load_regularizer, spec, "--regularizer")
        name = _unused(_log_name(spec, regularizer), used)
        used.add(name)
        start = 0.0 if name in targets else rule_of(weight).start
        weighting = _load(load_weighting, weighting, "--reg_weighting")
        is_measured = name in targets or rule_of(weight).is_measured
        estimator = _estimator(estimator, is_measured, loss.reg_balance)
        schedule = _schedule(schedule, name, loss)
        terms.append(Term(regularizer, start, weighting, name, estimator, schedule=schedule))
        flags = {kind.name: kind.flag for kind in KINDS if not kind.is_wanted(data) and kind.name not in renamed}
        if missing := [need for need in needs_of(regularizer) if need in flags]:
            fix = ", ".join(flags[need] for need in missing)
            raise UsageError(f"--regularizer {spec} needs {', '.join(missing)}: add {fix}")
    _check_targets(loss, [term.name for term in terms])
    return tuple(terms)


def wanted_columns(terms: tuple[Term, ...], data: DataSettings) -> list[Wanted]:
    """Returns what the regularizers need in addition to images, noise, timesteps and conditions: columns of the data.

    `prompt` is the text of --caption_column or --prompt, unless --reg_columns names a column.

    Raises:
        UsageError: --reg_columns has a name that no regularizer needs.
    """
    renamed, found = data.renamed_columns, {}
    given = {*_FROM_THE_LOOP, *(kind.name for kind in KINDS)} - renamed.keys()
    for term in terms:
        masks = masks_of(term.regularizer)
        for need in term.needs:
            if need in given:
                continue
            column = renamed.get(need) or (data.caption_column if need == "prompt" else None) or need
            text = data.prompt if need == "prompt" and column == need else None
            is_mask = need in masks or (need in found and found[need].is_mask)
            found[need] = Wanted(need, column, is_mask, text, term.name)
    for name in renamed:
        if name in _FROM_THE_LOOP:
            raise UsageError(f"--reg_columns {name}: every run provides {name} itself; a column cannot replace it")
        if name not in found:
            needed = f"they need {', '.join(found)}" if found else "they need no column"
            raise UsageError(f"--reg_columns {name}: no --regularizer needs {name}; {needed}")
    return list(found.values())


def _estimator(spec: str, is_measured: bool, reg_balance: str | None) -> Callable:
    """Loads an estimator. The gradient of one that calls the network again does not pass through a single output."""
    estimator = _load(load_estimator, spec, "--reg_estimator")
    if calls_model(estimator) and is_measured:
        raise UsageError(
            f"--reg_estimator {spec} calls the network again, so the weight cannot be measured at its output: give"
            " --reg_weight as a number, and no --reg_target for this term"
        )
    if calls_model(estimator) and reg_balance:
        raise UsageError(
            f"--reg_estimator {spec} calls the network again, which --reg_balance {reg_balance} cannot combine: leave"
            " one of the two out"
        )
    return estimator


def _schedule(spec: str, name: str, loss: LossSettings) -> Callable[[int], float] | None:
    """Loads the schedule of a weight. A target already changes its weight in every step."""
    schedule = _load(load_schedule, spec, "--reg_schedule")
    for target in loss.reg_target or ():
        if schedule is not None and target.name == name:
            raise UsageError(
                f"--reg_schedule {spec}: --reg_target {target} sets the weight of {name} from L' in every step: give"
                f" {name} the schedule constant"
            )
    return schedule


def of_images(terms: tuple[Term, ...]) -> tuple[Term, ...]:
    """Returns the terms for finished images, which are decoded already."""
    return tuple(replace(term, view=None) if isinstance(term.view, DecodedImage) else term for term in terms)


def in_units(
    terms: tuple[Term, ...], data: TrainingData, reg_units: str, decoder: DecodedImage | None = None
) -> tuple[Term, ...]:
    """Returns the terms with L' of fields in the user's units for --reg_units user; pictures remain in [-1, 1].

    Latents are decoded for L' by `decoder`.

    Raises:
        UsageError: --reg_units model, with latents.
    """
    if decoder is not None:
        if reg_units == "model":
            raise UsageError("--reg_units model: L' sees decoded images; a loss on latents is not supported")
        return tuple(seen_through(term, decoder) for term in terms)
    if data.is_picture or reg_units == "model":
        return terms
    return tuple(seen_through(term, data.normalization.units) for term in terms)


def units_note(data: TrainingData, reg_units: str) -> str:
    """Returns a line about the units in which L' sees fields; an empty string for pictures."""
    if data.is_picture:
        return ""
    if reg_units == "model":
        return "L' sees the network's units, about -1 to 1"
    return "L' sees the fields' own units, and its weight refers to them; --reg_units model: about -1 to 1"


def _unused(name: str, used: set[str]) -> str:
    """Returns the name, or the first unused one of name_2, name_3, ..."""
    numbered = (f"{name}_{number}" for number in itertools.count(2))
    return name if name not in used else next(other for other in numbered if other not in used)


def _log_name(spec: str, regularizer) -> str:
    """Returns the regularizer's own name, with the module name as a prefix if the log uses it for another number."""
    name = regularizer_name(regularizer)
    return f"{spec.partition(':')[0]}.{name}" if name in LOG_NAMES else name


def weight_rules(loss: LossSettings, terms: tuple[Term, ...]) -> dict[str, WeightRule]:
    """Returns the rule that sets the weight of each term: its --reg_target, or else its --reg_weight."""
    weights = dict(zip([term.name for term in terms], loss.reg_weight, strict=False))  # no terms: a plain training
    targets = {named.name: named.target for named in loss.reg_target or ()}
    return {term.name: rule_of(targets.get(term.name, weights[term.name])) for term in terms}


def with_weights(terms: tuple[Term, ...], weights: dict[str, float]) -> tuple[Term, ...]:
    """Returns the terms with these weights, which their rules determined."""
    return tuple(replace(term, weight=weights[term.name]) for term in terms)


def check_rules(rules: dict[str, WeightRule], on_data: dict[str, OnData]) -> None:
    """Raises `UsageError` if a target is relative to the data and L' of the data is not above 0."""
    for name, rule in rules.items():
        bound = rule.bound(on_data[name].mean)
        if bound is not None and bound <= 0:
            raise UsageError(
                f"--reg_target {rule.spec(name)}: {name} of the data is {on_data[name].mean:.3g}, which gives no"
                f" scale: give the value itself, such as {name}=0.05"
            )


def check_schedules(terms: tuple[Term, ...], rules: dict[str, WeightRule], measured_steps: int) -> None:
    """Raises `UsageError` if a schedule fails, or leaves a term out in all steps in which its weight is measured."""
    for step in range(measured_steps):
        _factors(terms, step)
    for term in terms:
        if term.schedule is None or not rules[term.name].is_measured:
            continue
        if not any(term.schedule(step) for step in range(measured_steps)):
            raise UsageError(
                f"--reg_schedule: {term.name} does not run in the first {measured_steps} steps, in which"
                f" --reg_weight {rules[term.name]} is measured: give its weight as a number"
            )


def describe_schedules(terms: tuple[Term, ...], max_train_steps: int) -> list[str]:
    """Returns a warning for each schedule that does nothing in a training of this length, or stays below 1."""
    lines = []
    for term in terms:
        if term.schedule is None:
            continue
        factors = [_factors((term,), step)[term.name] for step in range(max_train_steps)]
        least, largest = min(factors), max(factors)
        if least == largest:
            lines.append(
                f"--reg_schedule of {term.name}: its factor is {least:g} in all of the {max_train_steps} steps"
            )
        elif largest < 1:
            lines.append(
                f"--reg_schedule of {term.name}: its factor is at most {largest:.3g} in {max_train_steps} steps"
            )
    return lines


def _factors(terms: tuple[Term, ...], step: int) -> dict[str, float]:
    try:
        return factors_of(terms, step)
    except TermError as error:
        raise UsageError(f"--reg_schedule: {error}") from error


def _check_targets(loss: LossSettings, names: list[str]) -> None:
    seen = set()
    for target in loss.reg_target or ():
        if target.name not in names:
            raise UsageError(f"--reg_target {target}: no regularizer has this name; available: {', '.join(names)}")
        if target.name in seen:
            raise UsageError(f"--reg_target {target}: {target.name} already has another target")
        seen.add(target.name)


def _load(load, spec: str, flag: str):
    try:
        return load(spec)
    except ValueError as error:
        raise UsageError(f"{flag}: {error}") from error
