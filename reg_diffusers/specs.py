"""Conversion of names from the command line to regularizers, weightings, estimators and schedules."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial, reduce

from . import regularizers, weighting
from .estimators import Ddim, KnownNoise, MonteCarlo, one_step
from .regularizers import Regularizer
from .weight_schedules import Product, every, linear_decay, warmup

__all__ = ["built_in_regularizers", "load_estimator", "load_regularizer", "load_schedule", "load_weighting", "name_of"]

_ESTIMATORS = {"one_step": one_step, "ddim": Ddim, "known_noise": KnownNoise, "monte_carlo": MonteCarlo}
_SCHEDULES = {"warmup": warmup, "linear_decay": linear_decay, "every": every}


def load_regularizer(spec: str) -> Regularizer:
    """Loads the regularizer named by a string.

    Args:
        spec: a built-in name such as "total_variation" or "physics.divergence", or "module:attribute" of an importable
            module, including modules in the current folder; either with literal arguments:
            "mean_intensity(target=0.2)", "my_losses:Contrast(wanted=0.5)". A class is instantiated with them, the
            keywords of a function are bound. They are parsed as literals, and never evaluated. "perceptual(...)" is
            `Perceptual.from_pretrained(...)`, "classifier(...)" is `Classifier.loss(...)`.

    Raises:
        ValueError: the name is unknown (known names are listed), the module or attribute does not exist, the object
            is not callable, or its arguments are not literals or not its own (the signature is listed).
    """
    return _load(spec, built_in_regularizers(), "regularizer")


def built_in_regularizers() -> dict[str, Regularizer]:
    """Returns what `load_regularizer` knows by name, such as "total_variation" and "physics.divergence"."""
    laws = {f"physics.{name}": law for name, law in _exported(regularizers.physics).items()}
    classes = {
        "RadialSpectrum": regularizers.RadialSpectrum,
        "classifier": regularizers.Classifier.loss,
        "perceptual": regularizers.Perceptual.from_pretrained,
        "prompt_similarity": regularizers.PromptSimilarity.from_pretrained,
    }
    return {**_exported(regularizers), **classes, **laws}


def load_weighting(spec: str) -> Callable:
    """Loads the weighting named by a string.

    Args:
        spec: a built-in name such as "matched", or "module:attribute", with or without arguments such as "gated(3)",
            as in `load_regularizer`.

    Raises:
        ValueError: as in `load_regularizer`.
    """
    return _load(spec, _exported(weighting), "weighting")


def load_estimator(spec: str) -> Callable:
    """Loads the estimator named by a string.

    Args:
        spec: one_step, "ddim(1)", "known_noise(0.5)", "monte_carlo(4)", or "module:attribute", as in
            `load_regularizer`.

    Raises:
        ValueError: as in `load_regularizer`.
    """
    return _load(spec, _ESTIMATORS, "estimator")


def load_schedule(spec: str) -> Callable[[int], float] | None:
    """Loads the schedule of a weight named by a string.

    Args:
        spec: "warmup(500)", "linear_decay(1000, 5000)", "every(4)", or "module:attribute", as in `load_regularizer`; a
            product of these, "warmup(500) * every(4)"; or "constant", which gives None.

    Raises:
        ValueError: as in `load_regularizer`.
    """
    if spec == "constant":
        return None
    return reduce(Product, [_load(factor.strip(), _SCHEDULES, "schedule") for factor in spec.split("*")])


def _exported(module) -> dict[str, Callable]:
    return {name: getattr(module, name) for name in module.__all__}


def _load(spec: str, builtin: Mapping[str, Callable], kind: str):
    if not isinstance(spec, str):
        raise TypeError(f"{kind} must be named by a string, not {spec!r}: use the object itself, without loading it")
    name, values, keywords = _parsed(spec, kind)
    return _bound(_found(name, builtin, kind), values, keywords, kind, spec)


def name_of(spec: str) -> str:
    """Returns a spec without its arguments: "mean_intensity" of "mean_intensity(target=0.2)"."""
    return spec.partition("(")[0].strip()


def _parsed(spec: str, kind: str) -> tuple[str, list, dict]:
    """The name in a spec, and its arguments, which are read as literals and never evaluated."""
    name, parenthesis, _ = spec.partition("(")
    if not parenthesis:
        return spec, [], {}
    try:
        call = ast.parse("f" + spec[len(name) :], mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
            raise ValueError
        values = [ast.literal_eval(value) for value in call.args]
        keywords = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        if None in keywords or len(keywords) < len(call.keywords):  # **, or a name given twice
            raise ValueError
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        raise ValueError(
            f"{kind} {spec!r}: the arguments must be numbers, strings and the like, as in {name.strip()}(target=0.2)"
        ) from None
    return name.strip(), values, keywords


def _bound(found, values: list, keywords: dict, kind: str, spec: str):
    """An instance of a class, also by a class method; or a function with its keywords bound."""
    if isinstance(found, type) or isinstance(getattr(found, "__self__", None), type):
        return _instance(found, values, keywords, kind, spec)
    if not (values or keywords):
        return found
    signature = inspect.signature(found)
    usage = _usage(name_of(spec), signature)
    own = [parameter.name for parameter in signature.parameters.values() if parameter.kind is parameter.KEYWORD_ONLY]
    if values:
        raise ValueError(f"{kind} {spec!r}: give the arguments by name: {usage}")
    if unknown := [keyword for keyword in keywords if keyword not in own]:
        raise ValueError(f"{kind} {spec!r}: no argument {unknown[0]!r}: it is {usage}")
    _check_numbers(signature, keywords, kind, spec)
    return partial(found, **keywords)


def _found(spec: str, builtin: Mapping[str, Callable], kind: str):
    module_name, colon, attribute = spec.partition(":")
    if not colon:
        if spec not in builtin:
            known = ", ".join(name + _parameters(found) for name, found in builtin.items())
            raise ValueError(f"unknown {kind} {spec!r}; known: {known}; your own: module:attribute")
        return builtin[spec]
    found = _module(module_name, spec)
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise ValueError(f"{kind} {spec!r}: {module_name} has no {attribute!r}")
        found = getattr(found, name)
    if not callable(found):
        raise ValueError(f"{kind} {spec!r} is a {type(found).__name__}, which cannot be called")
    return found


def _parameters(found: Callable) -> str:
    """Returns the names of the parameters of a class, such as "(start, end)"; "" for anything else."""
    return f"({', '.join(inspect.signature(found).parameters)})" if isinstance(found, type) else ""


def _usage(name: str, signature: inspect.Signature) -> str:
    """Returns how a spec is written, such as "warmup(steps)"."""
    bare = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
    return f"{name}{inspect.Signature(bare)}"


def _check_numbers(signature: inspect.Signature, given: Mapping, kind: str, spec: str) -> None:
    """Raises ValueError for a text where a number is expected, and the reverse, as far as annotations say so."""
    for name, value in given.items():
        parameter = signature.parameters.get(name)
        annotation = parameter.annotation if parameter is not None else None
        wanted = {part.strip() for part in getattr(annotation, "__name__", str(annotation)).split("|")}
        if wanted & {"int", "float"} and wanted <= {"int", "float", "None"} and isinstance(value, str):
            raise ValueError(f"{kind} {spec!r}: {name} must be a number, not {value!r}")
        if value is None and wanted and wanted <= {"int", "float", "bool", "str"}:
            raise ValueError(f"{kind} {spec!r}: {name} must have a value, not None")
        if wanted <= {"str", "None"} and wanted & {"str"} and isinstance(value, int | float):
            raise ValueError(f"{kind} {spec!r}: {name} must be a text, not {value!r}")


def _instance(found: Callable, values: list, keywords: dict, kind: str, spec: str):
    signature = inspect.signature(found)
    usage = _usage(name_of(spec), signature)
    try:
        bound = signature.bind_partial(*values, **keywords).arguments
    except TypeError as error:
        raise ValueError(f"{kind} {spec!r}: {error}; it is {usage}") from None
    missing = [
        parameter.name
        for parameter in signature.parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and parameter.name not in bound
    ]
    if missing:
        raise ValueError(f"{kind} {spec!r} needs {', '.join(missing)}: it is {usage}")
    _check_numbers(signature, bound, kind, spec)
    try:
        instance = found(*values, **keywords)
    except OSError as error:  # such as a network that is neither a folder nor on the Hub
        if ":" in name_of(spec):  # in the user's own code, whose traceback helps
            raise
        raise ValueError(f"{kind} {spec!r}: {' '.join(str(error).split())}") from error
    if not callable(instance):
        raise ValueError(f"{kind} {spec!r} is a {found.__name__}, which cannot be called")
    return instance


def _module(name: str, spec: str):
    """Imports a module, also from the current folder, which some launchers leave out of the path."""
    folder = os.getcwd()
    if name.endswith(".py") or os.sep in name:
        file = os.path.relpath(name.removesuffix(".py"))
        dotted = os.path.basename(file) if file.startswith("..") else file.replace(os.sep, ".")
        where = f", from within {os.path.dirname(os.path.abspath(name))}" if file.startswith("..") else ""
        raise ValueError(
            f"{spec!r} names a file: name the module as import does, {dotted}:{spec.partition(':')[2]}{where}"
        )
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise  # the user's module exists, but a module that it imports does not
        raise ValueError(f"{spec!r}: no module {name!r} in {folder} or among the installed packages") from None
    except ValueError:  # an empty module name
        raise ValueError(f"{spec!r} is not of the form module:attribute") from None
    finally:
        sys.path.remove(folder)
