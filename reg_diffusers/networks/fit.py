"""Checks whether the data of a training fit a network."""

from __future__ import annotations

from ..data.parts import parts_of
from ..data.training_data import TrainingData
from ..runtime.errors import UsageError, warn
from ..sampling.class_names import number_of_classes
from ..settings.size import as_setting

__all__ = ["check_classes", "check_sides"]


def check_classes(
    embeddings: int | None, names: list[str] | None, data: TrainingData, has_no_class: bool = False
) -> None:
    """Raises `UsageError` if the classes of a given network are not those of the data; warns of other names.

    Args:
        embeddings: number of class embeddings of the network, or None.
        names: names of its classes, or None.
        data: the data of the training.
        has_no_class: whether an embedding must stand for images without a label.
    """
    wanted = None if data.classes is None else len(data.classes)
    classes = number_of_classes(names, embeddings)
    if names is None and has_no_class and embeddings == (wanted or 0) + 1:
        classes = wanted
    if classes != wanted:
        fix = "pass --class_conditional with data of as many classes" if classes else "drop --class_conditional"
        raise UsageError(f"the given model has {classes or 'no'} classes, but the data have {wanted or 'none'}: {fix}")
    if has_no_class and embeddings == classes:
        raise UsageError(
            "--condition_dropout: the given model has an embedding for each class, but none for images without a"
            " label: drop the flag, or train a new model"
        )
    if names is not None and list(names) != list(data.classes):
        pairs = zip(names, data.classes, strict=True)
        number, (before, now) = next((number, pair) for number, pair in enumerate(pairs) if pair[0] != pair[1])
        warn(f"the data and the given model name classes differently: class {number} was {before!r} and is {now!r}")


def check_sides(multiple: int, data: TrainingData, reason: str, fix: str = "") -> None:
    """Raises `UsageError` for a size that the network cannot divide; the message is in pixels of the images.

    Args:
        multiple: what the sides must be multiples of, as the network sees them.
        data: the data of the training.
        reason: why, for the message.
        fix: what else to do, for the message.
    """
    downsampling = getattr(data, "downsampling", 1)  # of latents
    factor = downsampling * multiple
    parts = parts_of(data)
    flag = "--resolution" if parts == [data] else "--buckets: size"
    for part in parts:
        height, width = (downsampling * side for side in part.shape[1:])
        if not (height % factor or width % factor):
            continue
        side = height if height % factor else width
        below, above = max(side // factor, 1) * factor, -(-side // factor) * factor
        near = f"{below} or {above}" if below != above else f"{above}"
        of_latents = f" after the autoencoder reduces it by {downsampling}" if downsampling > 1 else ""
        named = f"{flag} {as_setting((height, width))}" if data.is_picture else f"fields of {height} x {width}"
        raise UsageError(f"{named}: {reason}{of_latents}, so sides must be multiples of {factor}, such as {near}{fix}")
