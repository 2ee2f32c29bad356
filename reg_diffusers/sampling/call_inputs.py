"""Checks of the arguments of a pipeline call. Each error names the argument to change."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..regularizers.contract import Regularizer, regularizer_name
from ..term import needs_of
from .class_names import label_of

__all__ = [
    "at_least_one",
    "by_name",
    "check_needs",
    "check_output_type",
    "checked_class_labels",
    "checked_condition",
    "checked_generator",
    "refuse_keywords",
]


def refuse_keywords(keywords: Iterable[str]) -> None:
    """Raises for unknown keywords: ValueError for the texts of a text-to-image pipeline, else TypeError."""
    for name in keywords:
        if name in ("prompt", "negative_prompt"):
            raise ValueError(f"{name} is for text-to-image pipelines: this network is not conditioned on texts")
        raise TypeError(f"RegDDPMPipeline.__call__() got an unexpected keyword argument {name!r}")


def at_least_one(name: str, value) -> int:
    """Returns `value` as an int.

    Raises:
        ValueError: the value is not a whole number, or below 1.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
    return number


def checked_generator(generator, batch_size: int) -> torch.Generator | list[torch.Generator] | None:
    """Returns one generator for all images, or a list with one per image.

    Raises:
        ValueError: the type is wrong, or the list does not have one generator per image.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    if not isinstance(generator, list | tuple) or not all(isinstance(one, torch.Generator) for one in generator):
        raise ValueError(
            "generator must be a torch.Generator or a list of them, such as torch.Generator().manual_seed(0), not"
            f" {generator!r}"
        )
    if len(generator) != batch_size:
        raise ValueError(f"generator is a list of {len(generator)} for batch_size={batch_size}: pass one per image")
    return list(generator)


def check_output_type(output_type: str, channels: int) -> None:
    """Raises ValueError for an unknown output type, and for "pil" if the samples are not pictures."""
    if output_type not in ("pil", "np", "numpy", "pt", "latent"):
        raise ValueError(f"output_type must be 'pil', 'np', 'pt' or 'latent', not {output_type!r}")
    if output_type == "pil" and channels not in (1, 3, 4):
        raise ValueError(f"a field of {channels} channels is not a picture: use output_type='np' or 'pt'")


def checked_condition(
    condition: Tensor | None, shape: tuple[int, int, int], batch_size: int, device: torch.device
) -> Tensor | None:
    """Returns the condition on the device, (B, K, H, W).

    Args:
        condition: (B, K, H, W) or (1, K, H, W), or None.
        shape: (K, H, W) expected by the network; K is 0 if it takes no condition.
        batch_size: B.
        device: device of the network.

    Raises:
        ValueError: the condition is missing, not supported by the network, or has a wrong shape.
    """
    channels, height, width = shape
    if channels == 0:
        if condition is not None:
            raise ValueError("a condition was given, but the network has no channels for one")
        return None
    if condition is None:
        raise ValueError(f"the network is conditioned on an image: pass a condition of {channels} channels")
    if condition.ndim != 4 or tuple(condition.shape[1:]) != shape or len(condition) not in (1, batch_size):
        raise ValueError(
            f"condition must have shape ({batch_size}, {channels}, {height}, {width}), not {tuple(condition.shape)}"
        )
    return condition.to(device).expand(batch_size, -1, -1, -1)


def checked_class_labels(
    class_labels, classes: int | None, batch_size: int, device: torch.device, names: Sequence[str] | None = None
) -> Tensor | None:
    """Returns the class labels on the device, (B,).

    Args:
        class_labels: (B,) or one for all images, as numbers or names, or None.
        classes: number of classes of the network; None if it is not class-conditional.
        batch_size: B.
        device: device of the network.
        names: names of the classes, if they are known.

    Raises:
        ValueError: the labels are missing, not supported by the network, out of range, not whole numbers, unknown
            names, or not one per image.
    """
    if classes is None:
        if class_labels is not None:
            raise ValueError("class_labels were given, but the network is not class-conditional")
        return None
    if class_labels is None:
        raise ValueError(f"the network is class-conditional: pass class_labels, 0 to {classes - 1}")
    if isinstance(class_labels, str):
        class_labels = [class_labels]
    if isinstance(class_labels, list | tuple):
        class_labels = [label_of(label, names) if isinstance(label, str) else label for label in class_labels]
    class_labels = torch.as_tensor(class_labels, device=device).reshape(-1)
    if len(class_labels) not in (1, batch_size):
        raise ValueError(
            f"{len(class_labels)} class_labels for batch_size={batch_size}: pass one per image, or one for all"
        )
    if class_labels.is_floating_point() or class_labels.min() < 0 or class_labels.max() >= classes:
        raise ValueError(f"class_labels must be whole numbers from 0 to {classes - 1}")
    return class_labels.expand(batch_size)


def by_name(regularizers: Sequence[Regularizer] | Mapping[str, Regularizer]) -> dict[str, Regularizer]:
    """Returns regularizers by name: the given names, or those of the regularizers.

    Raises:
        ValueError: two regularizers have the same name.
    """
    if isinstance(regularizers, Mapping):
        return dict(regularizers)
    names = [regularizer_name(regularizer) for regularizer in regularizers]
    if len(set(names)) < len(names):
        raise ValueError(f"regularizers need different names, got {names}: pass {{name: regularizer, ...}}")
    return dict(zip(names, regularizers, strict=True))


def check_needs(regularizers: Iterable[tuple[str, Regularizer]], context: dict) -> None:
    """Raises ValueError if a regularizer needs an argument that is not available in sampling."""
    for name, regularizer in regularizers:
        if missing := [need for need in needs_of(regularizer) if need not in context]:
            raise ValueError(f"{name} needs {', '.join(missing)}, which is not available in sampling")
