"""Loads the models that `evaluate` and `sweep` judge, and the data to judge them by."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .judging_flags import DATA_FLAGS, NUM_IMAGES

__all__ = ["Bench", "check_num_images", "data_flag", "load_data", "load_models", "open_bench"]

_READ_AT_A_TIME = 256
_SEARCHED = 10_000  # images of the data to search: for the reference, for near copies, for the classifier


def load_models(names: list[str], device, titles: list[str] | None = None, *, mixed_precision: str = "no") -> dict:
    """Loads the pipelines by title, all for images of the same size; by default, the titles derive from the names.

    Raises:
        UsageError: if a model is missing or named twice, or if they do not draw the same kind of images.
    """
    from ..runtime.errors import UsageError
    from .model import load_pipeline

    if doubled := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"--model {doubled[0]} is given more than once")
    models = {
        title: load_pipeline(name, device, mixed_precision=mixed_precision)
        for title, name in zip(titles or _titles(names), names, strict=True)
    }
    (first, one), *others = models.items()
    for title, other in others:
        for what, of_one, of_other in zip(
            ("images", "normalization", "condition channels", "white"), _kind(one), _kind(other), strict=True
        ):
            if of_one != of_other:
                raise UsageError(
                    f"--model {title} has {what} {_shape(of_other)}, but {first} has {_shape(of_one)}: only models of"
                    " the same kind of images can be compared"
                )
    return models


def check_num_images(number: int | None) -> None:
    """Raises `UsageError` if --num_images is too small to measure with."""
    from ..evaluation.distances import GROUPS
    from ..runtime.errors import UsageError

    if number is not None and number < 2 * GROUPS:
        raise UsageError(f"--num_images {number}: confidence intervals need at least {2 * GROUPS} images")


def _titles(names: list[str]) -> list[str]:
    """Returns a title for each model: the name of its folder if that is unique, else its full name."""
    short = [Path(name).resolve().name if Path(name).is_dir() else name for name in names]
    return [
        name if short.count(title) > 1 or title == "data" else title for name, title in zip(names, short, strict=True)
    ]


def _kind(pipeline) -> tuple:
    return pipeline.image_shape, pipeline.config.normalization, pipeline.condition_channels, pipeline.config.white


def _shape(what) -> str:
    return " x ".join(map(str, what)) if isinstance(what, tuple) else str(what)


@dataclass
class Bench:
    """The data that models are judged by.

    Attributes:
        data: the data set, loaded as for training.
        source: the user's name for it.
        order: shuffled indices of the images; the first `number` form the reference, the next `number` the other half.
        number: the number of images in each half, and of samples.
        reference: the reference images, (N, C, H, W) in [-1, 1], read when they are needed; see `Images`.
        other: the other half, (N, C, H, W).
        texts: the text of each reference image, (N,), for text-to-image models; else empty.
        conditions: the conditions of each sample, equal to those of its reference image: class_labels (N,), condition.
        other_conditions: the conditions of the other half.
        sha256: a hash of both halves.
        searched: the number of images to search for near copies.
    """

    data: object
    source: str
    order: list[int]
    number: int
    reference: object
    other: object
    texts: list[str] = field(default_factory=list)
    conditions: dict = field(default_factory=dict)
    other_conditions: dict = field(default_factory=dict)
    sha256: str = ""
    searched: int = 0

    @property
    def description(self) -> str:
        """Describes the data in a few words."""
        channels, height, width = self.data.shape
        kind = "images" if self.data.is_picture else "fields"
        return f"{len(self.data):,} {kind} of {channels} x {height} x {width} from {self.source}"

    def lacking(self, term) -> list[str]:
        """Returns what a loss needs and samples lack: columns of the data, or original images."""
        return [need for need in term.needs if need not in self.conditions]

    def belonging(self, number: int) -> dict:
        """Returns what losses may need of the first reference images, and samples lack: N each by name.

        These are conditions that no model takes, columns of the data, and the images themselves as the original ones.
        """
        from ..networks.conditions import Conditions

        batch = self.data.__getitems__(self.order[:number])
        given = {**Conditions.of_batch(self.data, batch), **batch.get("columns", {})}
        return {"original_samples": self.reference[:number], **given}

    def images(self, places: range):
        """Returns the images at these places of `order`, (n, C, H, W) in [-1, 1]."""
        return _images(self.data, [self.order[place] for place in places])


def open_bench(args: argparse.Namespace, models: dict, wanted: Sequence = ()) -> Bench:
    """Loads the data that the flags name, at the size of the models, with the columns that losses need.

    Args:
        args: the flags.
        models: the models by title.
        wanted: the columns, see `training.terms.wanted_columns`.

    Raises:
        UsageError: if the data cannot be read, are too few, differ in size, or lack labels that are needed.
    """
    import torch

    from ..evaluation.distances import GROUPS
    from ..evaluation.images import Images
    from ..networks.conditions import Conditions
    from ..runtime.errors import UsageError

    check_num_images(args.num_images)
    title, pipeline = next(iter(models.items()))
    _check_texts(args, models)
    by_class = any(model.num_classes is not None for model in models.values())
    data = load_data(args, title, pipeline, by_class, wanted)
    source = args.data or "embedded Fashion-MNIST"
    total = len(data)
    number = min(NUM_IMAGES, total // 2) if args.num_images is None else args.num_images
    if number < 2 * GROUPS or 2 * number > total:
        least = 2 * max(number, 2 * GROUPS)
        fix = f"; use --num_images {total // 2}" if total >= 4 * GROUPS else ""
        raise UsageError(f"--data {source}: {total:,} images are too few: two halves need {least:,}{fix}")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(args.seed)).tolist()
    bench = Bench(data, source, order, number, None, None, _texts(args, data, order[:number]))
    bench.searched = min(total, max(2 * number, _SEARCHED))
    bench.reference = Images(number, bench.images)
    bench.other = Images(number, lambda places: bench.images(range(number + places.start, number + places.stop)))
    networks = [(model.unet.config, model._channels) for model in models.values() if not model.takes_prompts]
    digest = hashlib.sha256()
    for half, into in ((order[:number], bench.conditions), (order[number : 2 * number], bench.other_conditions)):
        conditions = []
        for start in range(0, number, _READ_AT_A_TIME):
            batch = data.__getitems__(half[start : start + _READ_AT_A_TIME])
            digest.update(data.normalization.normalize(batch["values"]).contiguous().numpy())
            conditions.append(Conditions.of_batch(data, batch).taken_by(networks))
        into |= {name: torch.cat([part[name] for part in conditions]) for name in conditions[0]}
    bench.sha256 = digest.hexdigest()
    for name, model in models.items():
        classes = model.num_classes
        if classes is not None and bench.conditions["class_labels"].max() >= classes:
            raise UsageError(f"--model {name} has {classes} classes, but the data have {len(data.classes)}")
    return bench


def _check_texts(args: argparse.Namespace, models: dict) -> None:
    """Raises `UsageError` if texts are missing for a text-to-image model, or given without one."""
    from ..runtime.errors import UsageError

    given = next((flag for flag in ("caption_column", "prompt") if getattr(args, flag) is not None), None)
    title = next((title for title, model in models.items() if model.takes_prompts), None)
    if title is not None and given is None:
        raise UsageError(
            f"--model {title} is conditioned on texts: name their column by --caption_column, or give --prompt"
        )
    if title is None and given is not None:
        raise UsageError(f"--{given}: no model is conditioned on texts; drop the flag")


def _texts(args: argparse.Namespace, data, indices: list[int]) -> list[str]:
    """Returns the texts of these images; empty if no flag names them."""
    from ..runtime.errors import UsageError

    if args.prompt is not None:
        return [args.prompt] * len(indices)
    if args.caption_column is None:
        return []
    captions = data.captions
    texts = [captions[index] or "" for index in indices]
    if missing := [index for index, text in zip(indices, texts, strict=True) if not text.strip()]:
        raise UsageError(f"--caption_column {args.caption_column}: image {missing[0]} has no text: add it")
    return texts


def _images(data, indices: list[int]):
    return data.normalization.normalize(data.__getitems__(indices)["values"])


def load_data(args: argparse.Namespace, title: str, pipeline, by_class: bool, wanted: Sequence = ()):
    """Loads the data that --data and the flags about them name, at the size of a model, with labels if there are any.

    Raises:
        UsageError: if the data cannot be read, do not fit the model, or lack labels that are needed.
    """
    from ..data.training_data import LabelsError, Naming, Normalization, load_training_data
    from ..runtime.errors import UsageError
    from ..settings.data import DataSettings

    (channels, height, width), saved, condition_channels, white = _kind(pipeline)
    normalization = Normalization(tuple(saved["offset"]), tuple(saved["scale"])) if saved else None
    naming = Naming("--data", f"--model {title}")
    given = {name: getattr(args, name) for name in DATA_FLAGS if getattr(args, name)}
    if args.data:
        given[data_flag(args.data).removeprefix("--")] = args.data

    def load(class_conditional: bool):
        settings = DataSettings(**given, class_conditional=class_conditional)
        model_of = (channels, (height, width), normalization, condition_channels)
        return load_training_data(settings, *model_of, naming, wanted, white=white)

    try:
        data = _with_labels_if_there(load, by_class or args.label_column or args.features == "classifier")
    except LabelsError as error:
        if error.flag != "--class_conditional":
            raise
        why = f"--model {title} is class-conditional" if by_class else f"--features {args.features} needs labels"
        raise UsageError(f"{why}: {error.reason}") from error
    if tuple(data.shape) != (channels, height, width):
        raise UsageError(
            f"--data: images are {_shape(tuple(data.shape))}, but --model {title} draws"
            f" {channels} x {height} x {width}"
        )
    if data.is_picture == bool(saved):
        kinds = ("fields", "pictures") if saved else ("pictures", "fields")
        raise UsageError(f"--model {title} was trained on {kinds[0]}, but --data {args.data} holds {kinds[1]}")
    return data


def _with_labels_if_there(load, needed: bool):
    from ..data.training_data import LabelsError

    try:
        return load(True)
    except LabelsError:
        if needed:
            raise
        return load(False)


def data_flag(name: str | None) -> str:
    """Returns the flag of train_reg.py that takes this name: --train_data_dir or --dataset_name."""
    path = Path(name or "")
    saved = any((path / mark).is_file() for mark in ("dataset_dict.json", "state.json"))
    fields = path.suffix in (".npy", ".npz")
    return "--train_data_dir" if fields or (path.is_dir() and not saved) else "--dataset_name"
