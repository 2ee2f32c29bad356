"""The models that are judged, with the data that they are judged by: what the flags of `evaluate` and `sweep` name."""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from .judging_flags import DATA_FLAGS, NUM_IMAGES

__all__ = ["Bench", "load_models", "open_bench"]

_SEARCHED = 10_000  # images of the data that are looked at: for reference, for near copies, by the classifier


def load_models(names: list[str], device, titles: list[str] | None = None, *, mixed_precision: str = "no") -> dict:
    """The pipelines by their titles, all of images of one size; titles are made from the names by default.

    Raises:
        UsageError: one is not there, one is named twice, or they do not draw the same kind of images.
    """
    from ..training.errors import UsageError
    from .model import load_pipeline

    if doubled := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"--model {doubled[0]} is given twice")
    models = {
        title: load_pipeline(name, device, mixed_precision=mixed_precision)
        for title, name in zip(titles or _titles(names), names, strict=True)
    }
    (first, one), *others = models.items()
    for title, other in others:
        for what, of_one, of_other in zip(
            ("images", "normalization", "condition channels"), _kind(one), _kind(other), strict=True
        ):
            if of_one != of_other:
                raise UsageError(
                    f"--model {title} has {what} {_shape(of_other)}, {first} {_shape(of_one)}: only models of the same"
                    " kind of images can be compared"
                )
    return models


def _titles(names: list[str]) -> list[str]:
    """Each model's shortest name: the folder's, where no other has it."""
    short = [Path(name).resolve().name if Path(name).is_dir() else name for name in names]
    return [
        name if short.count(title) > 1 or title == "data" else title for name, title in zip(names, short, strict=True)
    ]


def _kind(pipeline) -> tuple:
    config = pipeline.unet.config
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    channels = pipeline._channels
    return (channels, height, width), pipeline.config.normalization, config.in_channels - channels


def _shape(what) -> str:
    return " x ".join(map(str, what)) if isinstance(what, tuple) else str(what)


@dataclass
class Bench:
    """The data, made ready for judging models by.

    Attributes:
        data: as a training loads them.
        source: how the user names them.
        order: numbers of the images, shuffled; the first `number` are the reference, the next the other half.
        number: of images in each half, and of samples.
        reference: (N, C, H, W) in [-1, 1].
        other: (N, C, H, W).
        conditions: what each sample is conditioned on, as its reference image: class_labels (N,), condition.
        other_conditions: the same of the other half.
        fingerprint: a hash of both halves.
        searched: how many images of the data are looked at for near copies.
    """

    data: object
    source: str
    order: list[int]
    number: int
    reference: object
    other: object
    conditions: dict = field(default_factory=dict)
    other_conditions: dict = field(default_factory=dict)
    fingerprint: str = ""
    searched: int = 0

    def images(self, places: range):
        """The images of these places in `order`, (n, C, H, W) in [-1, 1]."""
        return _images(self.data, [self.order[place] for place in places])


def open_bench(args: argparse.Namespace, models: dict) -> Bench:
    """The data that the flags name, at the size of the models.

    Raises:
        UsageError: data that cannot be read, are too few, of another size, or without the labels that are needed.
    """
    import torch

    from ..evaluation.distances import GROUPS
    from ..training.errors import UsageError
    from ..training.preview import conditions_of

    title, pipeline = next(iter(models.items()))
    by_class = any(model.unet.config.num_class_embeds is not None for model in models.values())
    data = _load_data(args, title, pipeline, by_class)
    source = args.data or "embedded Fashion-MNIST"
    total = len(data)
    number = min(NUM_IMAGES, total // 2) if args.num_images is None else args.num_images
    if args.num_images is not None and number < 2 * GROUPS:
        raise UsageError(f"--num_images {number}: at least {2 * GROUPS} are needed for confidence intervals")
    if number < 2 * GROUPS or 2 * number > total:
        least = 2 * max(number, 2 * GROUPS)
        fix = f"; --num_images {total // 2} would do" if total >= 4 * GROUPS else ""
        raise UsageError(f"--data {source}: {total:,} images are too few: {least:,} are needed, two halves{fix}")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(args.seed)).tolist()
    bench = Bench(data, source, order, number, None, None)
    bench.searched = min(total, max(2 * number, _SEARCHED))
    bench.reference, bench.other = bench.images(range(number)), bench.images(range(number, 2 * number))
    digest = hashlib.sha256()
    for half in (bench.reference, bench.other):
        digest.update(half.contiguous().numpy())
    bench.fingerprint = digest.hexdigest()
    if by_class or data.condition_channels:
        wanted = {"class_labels": by_class, "condition": bool(data.condition_channels)}
        bench.conditions, bench.other_conditions = (
            {name: value for name, value in conditions_of(data, data.__getitems__(half)).items() if wanted[name]}
            for half in (order[:number], order[number : 2 * number])
        )
    for name, model in models.items():
        classes = model.unet.config.num_class_embeds
        if classes is not None and bench.conditions["class_labels"].max() >= classes:
            raise UsageError(f"--model {name} has {classes} classes, the data have {len(data.classes)}")
    return bench


def _images(data, indices: list[int]):
    return data.normalization.normalize(data.__getitems__(indices)["values"])


def _load_data(args: argparse.Namespace, title: str, pipeline, by_class: bool):
    from ..training.arguments import parse_args
    from ..training.data import Normalization, load_training_data
    from ..training.errors import UsageError

    (channels, height, width), saved, condition_channels = _kind(pipeline)
    normalization = Normalization(tuple(saved["offset"]), tuple(saved["scale"])) if saved else None
    flag, flags = _data_flag(args.data), []
    if args.data:
        flags += [f"{flag}={args.data}"]
    flags += [f"--{name}={getattr(args, name)}" for name in DATA_FLAGS if getattr(args, name)]
    loading = parse_args(flags)
    loading.resolution = None

    def load(class_conditional: bool):
        loading.class_conditional = class_conditional
        return load_training_data(loading, channels, height, normalization, condition_channels)

    try:
        data = _with_labels_if_there(load, by_class or args.label_column or args.features == "classifier")
    except UsageError as error:
        told = str(error).replace(f"{flag} {args.data}", f"--data {args.data}")
        if told.startswith("--class_conditional"):
            why = f"--model {title} is class-conditional" if by_class else f"--features {args.features} needs labels"
            told = f"{why}: {told.partition(': ')[2] or told}"
        raise UsageError(told.replace("the given model", f"--model {title}")) from error
    if tuple(data.shape) != (channels, height, width):
        raise UsageError(
            f"--data: images are {_shape(tuple(data.shape))}, those of --model {title} {channels} x {height} x {width}"
        )
    if data.is_picture == bool(saved):
        kinds = ("fields", "pictures") if saved else ("pictures", "fields")
        raise UsageError(f"--model {title} was trained on {kinds[0]}, --data {args.data} are {kinds[1]}")
    return data


def _with_labels_if_there(load, needed: bool):
    from ..training.errors import UsageError

    if needed:
        return load(True)
    try:
        return load(True)
    except UsageError:
        return load(False)


def _data_flag(name: str | None) -> str:
    """Which of train_reg.py's flags a name belongs to."""
    path = Path(name or "")
    saved = any((path / mark).is_file() for mark in ("dataset_dict.json", "state.json"))
    fields = path.suffix in (".npy", ".npz")
    return "--train_data_dir" if fields or (path.is_dir() and not saved) else "--dataset_name"
