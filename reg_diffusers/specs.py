"""Where strings end: command-line names become regularizers or weightings."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable

from . import regularizers, weighting
from .regularizers import Regularizer

__all__ = ["load_regularizer", "load_weighting"]


def load_regularizer(spec: str) -> Regularizer:
    """The regularizer that a string names.

    Args:
        spec: a built-in name such as "total_variation", or "module:attribute" of an importable module; modules of the
            current folder count as importable. A class is instantiated without arguments.

    Raises:
        ValueError: unknown name (the known ones are listed), no such module or attribute, or not callable.
    """
    return _load(spec, regularizers, "regularizer")


def load_weighting(spec: str) -> Callable:
    """The weighting that a string names; see `load_regularizer` for its form and errors."""
    return _load(spec, weighting, "weighting")


def _load(spec: str, builtin, kind: str):
    module_name, colon, attribute = spec.partition(":")
    if not colon:
        if spec not in builtin.__all__:
            known = ", ".join(builtin.__all__)
            raise ValueError(f"unknown {kind} {spec!r}; known: {known}; your own: module:attribute")
        return getattr(builtin, spec)
    found = _module(module_name, spec)
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise ValueError(f"{kind} {spec!r}: {module_name} has no {attribute!r}")
        found = getattr(found, name)
    if isinstance(found, type):
        found = _instance(found, kind, spec)
    if not callable(found):
        raise ValueError(f"{kind} {spec!r} is a {type(found).__name__}, which cannot be called")
    return found


def _instance(found: type, kind: str, spec: str):
    required = [
        parameter.name
        for parameter in inspect.signature(found).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if required:
        raise ValueError(
            f"{kind} {spec!r} needs {', '.join(required)} to be made: name an instance, such as my_{kind} ="
            f" {found.__name__}(...) in the same module"
        )
    return found()


def _module(name: str, spec: str):
    """Imports a module, from the current folder too, where a launcher may not have put it on the path."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise  # the user's module exists and imports something that does not
        raise ValueError(f"{spec!r}: no module {name!r} in {folder} or among the installed packages") from None
    except ValueError:  # an empty module name
        raise ValueError(f"{spec!r} is not of the form module:attribute") from None
    finally:
        sys.path.remove(folder)
