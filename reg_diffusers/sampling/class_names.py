"""The classes of a network, by number and by name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

__all__ = ["check_class_names", "label_of", "number_of_classes"]


def check_class_names(names: Sequence[str], embeddings: int | None) -> None:
    """Checks the names of the classes of a network.

    Args:
        names: the name of each class, in the order of the labels.
        embeddings: number of class embeddings of the network: one per class, and possibly one more, of no class; None
            for a network without classes.

    Raises:
        ValueError: the names do not suit the network.
    """
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"class_names must be a list of texts, not {names!r}")
    if not embeddings or len(names) not in (embeddings, embeddings - 1):
        raise ValueError(f"{len(names)} class_names for a network with {embeddings or 'no'} class embeddings")


def number_of_classes(names: Sequence[str] | None, embeddings: int | None) -> int | None:
    """Returns the number of classes of a network; None without classes. Without names, each embedding is a class."""
    return embeddings if names is None or embeddings is None else len(names)


def label_of(name: str, names: Sequence[str] | None) -> int:
    """Returns the label of the class with this name.

    Raises:
        ValueError: no class has this name, or the names are unknown.
    """
    if names is None:
        raise ValueError(f"{name!r} is a name, but this model does not record the names of its classes: use numbers")
    if name in names:
        return list(names).index(name)
    close = difflib.get_close_matches(name, names, n=1)
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    hint = f"did you mean {close[0]!r}?" if close else f"the classes are {shown}"
    raise ValueError(f"no class is named {name!r}; {hint}")
