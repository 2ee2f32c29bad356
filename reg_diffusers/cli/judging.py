"""What `evaluate` and `sweep` do with models and data: features, samples in a folder, rows of the table."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from .bench import Bench

__all__ = [
    "Judged",
    "check_regularizers",
    "choose_features",
    "draw_samples_of",
    "judge_models",
    "read_samples",
    "read_settings",
    "recorded_regularizers",
    "regularizers_of",
    "samplers_of",
    "write_settings",
]

_IMAGES_OF_LOSS = 256
_BATCH_SIZE = 64


def recorded_regularizers(names: list[str]) -> list[str]:
    """The built-in regularizers that the models in these folders were trained with, in that order.

    What a reg_config.json names beside them would be imported and run, and a file from somewhere must not decide that.
    """
    from .. import regularizers
    from ..card import CONFIG_FILE

    found = []
    for name in names:
        try:
            record = json.loads((Path(name) / CONFIG_FILE).read_text(encoding="utf-8"))
            found += [term["regularizer"] for term in record["objective"]["terms"]]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return [name for name in dict.fromkeys(found) if name in regularizers.__all__]


def regularizers_of(specs: list[str]) -> dict:
    """The regularizers by their names.

    Raises:
        UsageError: none at all, or one that cannot be loaded.
    """
    from ..specs import load_regularizer
    from ..training.errors import UsageError

    if not specs:
        raise UsageError("--regularizer: the models' reg_config.json names no built-in one: say which loss to measure")
    try:
        return {spec: load_regularizer(spec) for spec in dict.fromkeys(specs)}
    except ValueError as error:
        raise UsageError(f"--regularizer: {error}") from error


def choose_features(args: argparse.Namespace, bench: Bench, device):
    """The features that --features names, and why they are not better ones ("" if there is nothing to say).

    Raises:
        UsageError: features that were asked for and cannot be had.
    """
    from tqdm import tqdm

    from ..evaluation.features import DEFAULT_NETWORK, FeaturesError, named_features, pixels, train_classifier
    from ..training.errors import UsageError

    has_labels = bench.data.classes is not None
    if args.features == "pixels":
        return pixels(), ""
    if args.features == "classifier" and not has_labels:
        raise UsageError("--features classifier needs labels, which these data have not: name them by --label_column")
    why = ""
    if args.features != "classifier":
        name = DEFAULT_NETWORK if args.features == "auto" else args.features
        try:
            if not bench.data.is_picture:
                raise FeaturesError(f"{name} is for pictures, and these data are fields")
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
            lambda steps: tqdm(steps, desc="classifier", unit="step", dynamic_ncols=True),
        )
    except FeaturesError as error:
        if args.features == "classifier":
            raise UsageError(f"--features classifier: {error}") from error
        return pixels(), f"pixels instead of a network's features: {why}; and {error}"
    return features, f"a classifier of these data instead of {DEFAULT_NETWORK}: {why}" if why else ""


def _small_images(bench: Bench):
    import torch

    from ..evaluation.features import classifier_input

    images, labels = [], []
    for places in _batches(bench.searched):
        batch = bench.data.__getitems__([bench.order[place] for place in places])
        images.append(classifier_input(bench.data.normalization.normalize(batch["values"])))
        labels.append(batch["class_labels"])
    return torch.cat(images), torch.cat(labels)


def _batches(number: int, size: int = _BATCH_SIZE) -> list[range]:
    return [range(start, min(start + size, number)) for start in range(0, number, size)]


def check_regularizers(regularizers: dict, bench: Bench, models: dict, device) -> None:
    """Freezes those that are networks and moves them to the device, as a training does; tries each on two images.

    Raises:
        UsageError: it needs what a sample has not, raises, or returns something else than one value for each image.
    """
    from ..objective import Term, X0Regularization
    from ..regularizers import score
    from ..training.errors import UsageError

    some = next(iter(models.values()))
    images = bench.reference[:2].to(device)
    for name, regularizer in regularizers.items():
        X0Regularization(some.scheduler, [Term(regularizer, 1.0, name=name)]).to(device)
        needs = getattr(regularizer, "needs", ())
        if missing := [need for need in needs if need not in bench.conditions]:
            raise UsageError(
                f"--regularizer {name} needs {', '.join(missing)}, which samples of --model {next(iter(models))} have"
                " not"
            )
        try:
            context = {need: bench.conditions[need][:2].to(device) for need in needs}
            values = score(regularizer, images, **context)
        except Exception as error:
            told = UsageError(f"--regularizer {name} raised {type(error).__name__} on two images of the data: {error}")
            told.show_cause = True
            raise told from error
        if tuple(values.shape) != (2,):
            raise UsageError(
                f"--regularizer {name} must return one value per image, (2,) for two, and returned"
                f" {tuple(values.shape)}: average over all dimensions but the first"
            )


def read_settings(output: Path, name: str) -> dict | None:
    """The settings that are kept in a file of this name, None if it is not there.

    Raises:
        UsageError: it cannot be read.
    """
    from ..training.errors import UsageError

    path = output / name
    if not path.is_file():
        return None
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("no object")
    except (OSError, ValueError) as error:
        raise UsageError(f"--output {output}: {name} cannot be read: name another folder") from error
    return settings


def write_settings(output: Path, name: str, settings: dict) -> None:
    """Keeps them there.

    Raises:
        UsageError: the folder cannot be written.
    """
    from ..files import write_whole
    from ..training.errors import UsageError

    text = json.dumps(settings, indent=2) + "\n"
    try:
        write_whole(output / name, lambda part: part.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--output {output} cannot be written: {error.strerror}") from error


def samplers_of(args: argparse.Namespace, models: dict, names: dict, bench: Bench, folder: Path) -> dict:
    """For each model the sampler, the store and what is missing in it.

    Raises:
        UsageError: settings that do not fit the model, or samples of other settings in the folder.
    """
    from ..generation import ArrayFile, Sampler, Settings, find_missing, fingerprint
    from ..pipeline import RegDDPMPipeline
    from ..samplers import fitting_samplers
    from ..training.errors import UsageError

    found = {}
    labels, conditions = bench.conditions.get("class_labels"), bench.conditions.get("condition")
    for title, pipeline in models.items():
        channels = pipeline._channels
        # The identity in place of the picture's or field's own units: samples come as L' takes them, not clipped.
        as_it_is = {"offset": [0.0] * channels, "scale": [1.0] * channels}
        plain = RegDDPMPipeline(pipeline.unet, pipeline.scheduler, as_it_is)
        by_class = pipeline.unet.config.num_class_embeds is not None
        settings = Settings(
            model=names[title],
            model_sha256=fingerprint(plain),
            scheduler=args.scheduler or next(iter(fitting_samplers(pipeline))),
            num_inference_steps=args.num_inference_steps,
            seed=args.seed,
            mixed_precision=args.mixed_precision,
            class_labels=tuple(labels.tolist()) if by_class else (),
            condition_sha256=hashlib.sha256(conditions.numpy()).hexdigest() if conditions is not None else "",
        )
        path = folder / f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', title)}.npz"
        try:
            sampler = Sampler(plain, settings, conditions)
        except ValueError as error:
            raise UsageError(f"--{error}") from error
        try:
            store = ArrayFile(path, is_field=True)
            found[title] = sampler, store, find_missing(store, settings, bench.number)
        except ValueError as error:
            raise UsageError(f"--output {error}") from error
    return found


def draw_samples_of(args: argparse.Namespace, samplers: dict, state) -> None:
    """Draws what is missing, in all processes.

    Raises:
        UsageError: not enough memory, or a folder that cannot be written.
    """
    import torch

    from ..generation import draw_missing
    from ..training.errors import UsageError

    for title, (sampler, store, missing) in samplers.items():
        if not missing:
            continue
        if state.is_main_process:
            print(f"sampling    {title}: {len(missing):,} images", flush=True)
        try:
            draw_missing(sampler, store, missing, args.batch_size, state)
        except torch.OutOfMemoryError as error:
            raise UsageError(f"--batch_size {args.batch_size}: too many for the memory of {state.device}") from error
        except PermissionError as error:
            raise UsageError(f"--output {store.path} cannot be written: {error.strerror}") from error


def read_samples(bench: Bench, samplers: dict) -> dict:
    """The first samples of each model, (N, C, H, W).

    Raises:
        UsageError: some were drawn on a machine that has another disk.
    """
    import numpy as np
    import torch

    from ..training.errors import UsageError

    samples = {}
    for title, (_, store, _) in samplers.items():
        if lacking := set(range(bench.number)) - store.present():
            raise UsageError(
                f"--output {store.path}: {len(lacking):,} samples that other processes have drawn are not here: name a"
                " place that all machines share"
            )
        store.finish(bench.number)
        samples[title] = torch.from_numpy(np.load(store.path)["arr_0"][: bench.number])
    return samples


@dataclass
class Judged:
    """What was found.

    Attributes:
        rows: of the table, the data first.
        copies: near copies, by title.
        features: what images were compared by.
    """

    rows: dict
    copies: dict
    features: object


def judge_models(
    args: argparse.Namespace,
    models: dict,
    samples: dict,
    bench: Bench,
    features,
    regularizers: dict,
    device,
    *,
    with_denoising_loss: bool = False,
) -> Judged:
    """Measures all; in the main process alone."""
    import dataclasses

    from ..evaluation.comparison import denoising_loss
    from ..evaluation.distances import Estimate, nearest
    from ..evaluation.judgement import copies_of, find_copies, judge_samples

    number = bench.number
    searched = _vectors(features, bench.images, bench.searched, device, "data")
    own, neighbours = nearest(searched, searched, same=True)
    reference = bench.reference.to(device)
    conditions, other_conditions = (
        {name: value.to(device) for name, value in given.items()}
        for given in (bench.conditions, bench.other_conditions)
    )
    other = slice(number, 2 * number)
    rows, copies = {}, {"data": copies_of(own[other], neighbours[other], own)}
    rows["data"] = judge_samples(
        bench.other.to(device),
        reference,
        regularizers,
        vectors=(searched[other], searched[:number]),
        features=features,
        copies=copies["data"],
        **other_conditions,
    )
    for title, drawn in samples.items():
        vectors = _vectors(features, lambda places, drawn=drawn: drawn[list(places)], number, device, title)
        copies[title] = find_copies(vectors, searched, own)
        loss = None
        if with_denoising_loss:
            some = {name: value[:_IMAGES_OF_LOSS] for name, value in conditions.items()}
            pipeline = models[title]
            loss = denoising_loss(pipeline.unet, pipeline.scheduler, reference[:_IMAGES_OF_LOSS], args.seed, **some)
        rows[title] = judge_samples(
            drawn.to(device),
            reference,
            regularizers,
            vectors=(vectors, searched[:number]),
            copies=copies[title],
            features=features,
            denoising_loss=loss,
            **conditions,
        )
    if args.fid:
        from ..evaluation.inception import inception_distance

        for title, images in {"data": bench.other, **samples}.items():
            fid = Estimate(inception_distance(images.to(device), reference), float("nan"), float("nan"))
            rows[title] = dataclasses.replace(rows[title], distances={**rows[title].distances, "Inception FID": fid})
    return Judged(rows, copies, features)


def _vectors(features, images, number: int, device, title: str):
    """The features of so many images, `images(places)` being some of them."""
    import torch
    from tqdm import tqdm

    batches = tqdm(_batches(number), desc=f"features of {title}", unit="batch", dynamic_ncols=True, leave=False)
    with torch.no_grad():
        return torch.cat([features.extract(images(places).to(device)) for places in batches])
