"""The steps that `evaluate` and `sweep` share before they measure: choose features, check regularizers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..runtime.messages import bars_are_hidden
from .bench import Bench

__all__ = [
    "PREDICTED",
    "axis_of",
    "check_regularizers",
    "choose_features",
    "columns_of",
    "describe_predicted",
    "recorded_regularizers",
    "recorded_units",
    "regularizers_of",
]

PREDICTED = " of x0_hat"  # ends the name of a loss that is measured on predictions of the data
_BATCH_SIZE = 64


def recorded_regularizers(names: list[str]) -> list[str]:
    """Returns the built-in regularizers that the models in these folders were trained with, in order.

    Ignores other names in a reg_config.json: they would be imported and run, or a file or a network would be read,
    which a downloaded file must not cause.
    """
    from .. import regularizers
    from ..specs import built_in_regularizers, name_of

    reading = {regularizers.RadialSpectrum.__name__, "perceptual", "classifier", "prompt_similarity"}
    safe = built_in_regularizers().keys() - reading
    terms = [term for name in names for term in _objective(name).get("terms", ())]
    found = [term.get("regularizer") for term in terms]
    return [spec for spec in dict.fromkeys(found) if name_of(spec) in safe]


def recorded_units(names: list[str]) -> tuple[str, str]:
    """Returns the units of fields in L' during training, "user" or "model", and the model that records them.

    Both are "" if no model records its units.

    Raises:
        UsageError: if the models were trained in different units.
    """
    from ..runtime.errors import UsageError

    found = {name: units for name in names if (units := _objective(name).get("units")) in ("user", "model")}
    if len(set(found.values())) > 1:
        recorded = ", ".join(f"--model {name} with --reg_units {units}" for name, units in found.items())
        raise UsageError(f"L' of fields was trained in different units ({recorded}): choose them by --reg_units")
    return next(((units, name) for name, units in found.items()), ("", ""))


def _objective(name: str) -> dict:
    """Reads the losses from the reg_config.json in a folder; empty if they cannot be read."""
    from ..runs.run_folder import CONFIG_FILE

    try:
        objective = json.loads((Path(name) / CONFIG_FILE).read_text(encoding="utf-8"))["objective"]
        terms = [term for term in objective.get("terms", ()) if isinstance(term.get("regularizer"), str)]
        return {"units": objective.get("units"), "terms": terms}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def regularizers_of(specs: list[str]) -> dict:
    """Loads the regularizers, by name.

    Raises:
        UsageError: if there are none, or if one cannot be loaded.
    """
    from ..runtime.errors import UsageError
    from ..specs import load_regularizer

    if not specs:
        raise UsageError("--regularizer: the models' reg_config.json names no built-in loss: name the loss to measure")
    try:
        return {spec: load_regularizer(spec) for spec in dict.fromkeys(specs)}
    except ValueError as error:
        raise UsageError(f"--regularizer: {error}") from error


def choose_features(args: argparse.Namespace, bench: Bench, device):
    """Returns the features that --features names, and the reason for a fallback ("" without one).

    Raises:
        UsageError: if the features that the user chose are unavailable.
    """
    from tqdm import tqdm

    from ..evaluation.features import DEFAULT_NETWORK, FeaturesError, named_features, pixels, train_classifier
    from ..runtime.errors import UsageError

    has_labels = bench.data.classes is not None
    if args.features == "pixels":
        return pixels(), ""
    if args.features == "classifier" and not has_labels:
        raise UsageError("--features classifier needs labels, but this data set has none: name a --label_column")
    why = ""
    if args.features != "classifier":
        name = DEFAULT_NETWORK if args.features == "auto" else args.features
        try:
            if not bench.data.is_picture:
                raise FeaturesError(f"{name} needs images, but these data are fields")
            return named_features(name, device), ""
        except FeaturesError as error:
            if args.features != "auto":
                raise UsageError(f"--features {error}") from error
            why = str(error)
    if not has_labels:
        return pixels(), f"pixels instead of a network's features: {why}; and there are no labels"
    images, labels = _small_images(bench)
    try:
        features = train_classifier(
            images.to(device),
            labels,
            len(bench.data.classes),
            args.seed,
            lambda steps: tqdm(steps, desc="classifier", unit="step", dynamic_ncols=True, disable=bars_are_hidden()),
        )
    except FeaturesError as error:
        if args.features == "classifier":
            raise UsageError(f"--features classifier: {error}") from error
        return pixels(), f"pixels instead of a network's features: {why}; and {error}"
    return features, f"a classifier of these data instead of {DEFAULT_NETWORK}: {why}" if why else ""


def _small_images(bench: Bench):
    import torch

    from ..regularizers.classifier import classifier_input

    images, labels = [], []
    for places in _batches(bench.searched):
        batch = bench.data.__getitems__([bench.order[place] for place in places])
        images.append(classifier_input(bench.data.normalization.normalize(batch["values"])))
        labels.append(batch["class_labels"])
    return torch.cat(images), torch.cat(labels)


def _batches(number: int, size: int = _BATCH_SIZE) -> list[range]:
    return [range(start, min(start + size, number)) for start in range(0, number, size)]


def columns_of(regularizers: dict, args: argparse.Namespace, *, is_recorded: bool = False) -> list:
    """Returns the columns of the data that the regularizers need.

    Args:
        regularizers: the regularizers by name.
        args: the flags.
        is_recorded: whether --reg_columns is that of the models, where other losses may have needed more: `args` then
            keeps only those that the regularizers need.

    Raises:
        UsageError: --reg_columns names what no regularizer needs.
    """
    from ..settings.data import DataSettings
    from ..term import Term
    from ..training.terms import wanted_columns

    terms = tuple(Term(regularizer, 1.0, name=name) for name, regularizer in regularizers.items())
    texts = {name: getattr(args, name) for name in ("caption_column", "prompt")}
    if is_recorded:
        needs = {need for term in terms for need in term.needs}
        args.reg_columns = [one for one in args.reg_columns or () if one.partition("=")[0] in needs]
    return wanted_columns(terms, DataSettings(reg_columns=args.reg_columns, **texts))


def check_regularizers(regularizers: dict, bench: Bench, models: dict, device, reg_units: str | None) -> dict:
    """Freezes the regularizers that are networks, moves them to the device, and tries each on two images.

    Returns their terms by the same names. The terms see fields in the units of --reg_units.

    Raises:
        UsageError: if a regularizer needs what data lack, too, raises, or does not return one value per image.
    """
    from accelerate.utils import send_to_device

    from ..objective import X0Regularization
    from ..regularizers.contract import is_built_in
    from ..runtime.errors import UsageError
    from ..term import Term, TermError, score
    from ..training.terms import in_units

    terms = (Term(regularizer, 1.0, name=name) for name, regularizer in regularizers.items())
    terms = in_units(tuple(terms), bench.data, reg_units or "user")
    some = next(iter(models.values()))
    images, given = bench.reference[:2].to(device), bench.conditions
    if any(bench.lacking(term) for term in terms):
        given = {**given, **bench.belonging(2)}
    for name, term in zip(regularizers, terms, strict=True):
        X0Regularization(some.scheduler, [term]).to(device)
        if missing := [need for need in term.needs if need not in given]:
            raise UsageError(
                f"--regularizer {name} needs {', '.join(missing)}, which neither samples of --model"
                f" {next(iter(models))} nor the data have: train with --validation_split, which measures L' on"
                " held-out images"
            )
        try:
            score(term, images, send_to_device({need: given[need][:2] for need in term.needs}, device))
        except Exception as error:
            if isinstance(error, TermError) or (isinstance(error, ValueError) and is_built_in(term.regularizer)):
                raise UsageError(f"--regularizer {name}: {error}") from error
            raised = f"--regularizer {name} raised {type(error).__name__} on two images of the data: {error}"
            usage_error = UsageError(raised)
            usage_error.show_cause = True
            raise usage_error from error
    return dict(zip(regularizers, terms, strict=True))


def describe_predicted(terms: dict, bench: Bench) -> list[str]:
    """Returns a line for each loss that is measured on predictions of the data, because samples lack what it needs."""
    return [
        f"loss        {name} needs {', '.join(lacking)}, which samples lack: measured on x0_hat of images of the data"
        for name, term in terms.items()
        if (lacking := bench.lacking(term))
    ]


def axis_of(row) -> str:
    """Returns the label of the axis of L' in a figure."""
    if any(name.endswith(PREDICTED) for name in row.terms):
        return "loss: mean over samples, or over images of the data (of x0_hat)"
    return f"loss: mean over {row.images} samples"
