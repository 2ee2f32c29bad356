"""Holds images out from a training: a share of its own, or those of --validation_data_dir."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..data.buckets import part_of
from ..data.held_out import digest_of, split_rows, without_twins
from ..data.parts import parts_of
from ..data.training_data import Naming, TrainingData, Wanted, load_training_data
from ..runtime.errors import UsageError, warn
from ..settings.data import DataSettings
from ..settings.validation import ValidationSettings
from .loading import HeldOut, Loaded

__all__ = ["hold_out"]


def hold_out(
    loaded: Loaded, validation: ValidationSettings, data: DataSettings, seed: int, wanted: Sequence[Wanted] = ()
) -> Loaded:
    """Returns what a run starts from, with the held-out images apart from those to train on.

    Held-out images that are also trained on are not measured; one line reports their number.

    Args:
        loaded: model and data.
        validation: settings of the held-out images.
        data: settings of the data.
        seed: seed of the choice.
        wanted: what regularizers need of the data.

    Raises:
        UsageError: no image is left to train on or to measure, or the held-out images do not fit the others.
    """
    if not validation.is_wanted:
        return loaded
    if validation.validation_split is not None:
        flag = f"--validation_split {validation.validation_split:g}"
        if data.streaming:
            raise UsageError(
                f"{flag}: a stream is not split, because its rows are known only while they are read: name other"
                " images by --validation_data_dir, or drop --streaming"
            )
        rows, held_rows = split_rows(len(loaded.images), validation.validation_split, seed)
        held_out, seen = part_of(loaded.images, held_rows), part_of(loaded.data, held_rows)
        images = part_of(loaded.images, rows)
        network_data = images if loaded.data is loaded.images else part_of(loaded.data, rows)
        loaded = replace(loaded, images=images, data=network_data)
    else:
        flag = f"--validation_data_dir {validation.validation_data_dir}"
        held_out = _load(loaded, validation.validation_data_dir, data, wanted)
        seen = loaded.see(held_out)
    if data.streaming:
        warn(f"{flag}: not compared with the training images, because these are streamed")
    else:
        seen, held_out = _without_twins(flag, held_out, seen, loaded.images)
    return replace(loaded, held_out=HeldOut(seen, flag, digest_of(held_out)))


def _without_twins(
    flag: str, held_out: TrainingData, seen: TrainingData, images: TrainingData
) -> tuple[TrainingData, TrainingData]:
    rows = without_twins(held_out, images)
    number = len(held_out) - len(rows)
    if not rows:
        raise UsageError(
            f"{flag}: all {number:,} held-out images are among the training images, too: hold out others, which must"
            " not lie in the folder of the training images"
        )
    if number:
        warn(
            f"{flag}: {number:,} of {len(held_out):,} held-out images are among the training images, too: not measured"
        )
    return part_of(seen, rows), part_of(held_out, rows)


def _load(loaded: Loaded, folder: str, data: DataSettings, wanted: Sequence[Wanted]) -> TrainingData:
    """Loads the images of --validation_data_dir as those of the training, in the same size and channels.

    Raises:
        UsageError: they cannot be read, or do not fit those of the training.
    """
    images, flag = loaded.images, f"--validation_data_dir {folder}"
    field = "train_data_dir" if data.dataset_name is None else "dataset_name"
    named = {"dataset_name": None, "dataset_config_name": None, "train_data_dir": None, field: folder}
    # Size, channels and the range of fields are those of the training.
    alike = {"resolution": None, "channels": None, "field_scale": "channel"}
    settings = replace(data, **named, **alike, streaming=False)
    normalization = None if images.is_picture else images.normalization
    naming = Naming("--validation_data_dir", "the training")
    try:
        model_of = (images.shape[0], images.shape[1:], normalization, images.condition_channels)
        sizes = [part.shape[1:] for part in parts_of(images)]
        more = {"white": images.white, "sizes": sizes, "takes_sizes": loaded.takes_sizes}
        found = load_training_data(settings, *model_of, naming, wanted, **more)
        if not data.buckets and found.shape != images.shape:
            sizes = [" x ".join(map(str, shape)) for shape in (found.shape, images.shape)]
            raise UsageError(f"{flag}: {sizes[0]}, but the training data are {sizes[1]}")
        if found.is_picture != images.is_picture:
            kinds = ["images" if data.is_picture else "fields" for data in (found, images)]
            raise UsageError(f"{flag}: holds {kinds[0]}, but the training data are {kinds[1]}")
        if found.classes is not None and found.classes != images.classes:
            for part in parts_of(found):
                part.number_classes_as(images.classes)
    except ValueError as error:
        text = str(error)
        raise UsageError(text if text.startswith("--validation_data_dir") else f"{flag}: {text}") from error
    return found
