"""Declares a setting once, as a field of a frozen dataclass and as a flag of the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import field, fields
from typing import Any

__all__ = ["add_flags", "flag", "names", "section_of"]


def flag(
    default,
    help: str,
    *,
    parse: Callable[[str], Any] | None = None,
    many: bool = False,
    switch: bool = False,
    mathematics: bool = True,
    kept: bool = True,
    **argument,
):
    """Declares a setting as a dataclass field with its flag.

    Args:
        default: the value without the flag.
        help: the text in `--help`.
        parse: converts the text of the flag to a value; raises `argparse.ArgumentTypeError` or ValueError.
        many: whether the flag takes one or more values, and the setting is a tuple.
        switch: whether the flag has a negative form, --no-NAME.
        mathematics: whether the value changes the results of a run, so that a resumed run must have the same.
        kept: whether the settings file of a run repeats the value.
        **argument: further arguments of `add_argument`, such as choices and metavar.
    """
    argument["help"] = help
    if default is False and not switch:
        argument["action"] = "store_true"
    if switch:
        argument["action"] = argparse.BooleanOptionalAction
    if many:
        argument["nargs"] = "+"
    if parse is not None:
        argument["type"] = parse
    return field(default=default, metadata={"argument": argument, "mathematics": mathematics, "kept": kept})


def add_flags(group, section: type) -> None:
    """Adds a flag for each field of a settings dataclass to an argparse parser or group."""
    for setting in fields(section):
        group.add_argument(f"--{setting.name}", default=setting.default, **setting.metadata["argument"])


def section_of(section: type, values: Mapping[str, Any]):
    """Builds a settings dataclass from parsed flags; ignores flags that it does not declare."""
    taken = {setting.name: values[setting.name] for setting in fields(section)}
    return section(**{name: tuple(value) if isinstance(value, list) else value for name, value in taken.items()})


def names(section: type, attribute: str) -> list[str]:
    """Returns the settings of a dataclass that are declared with `mathematics` or with `kept`."""
    return [setting.name for setting in fields(section) if setting.metadata[attribute]]
