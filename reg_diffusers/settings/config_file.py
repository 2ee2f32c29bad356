"""Reads the settings of a run from a YAML file, as flags."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import yaml

from ..runtime.errors import UsageError
from .parser import did_you_mean

__all__ = ["flags_of_file", "split_file"]

_FLAG = "--config"


def split_file(argv: list[str]) -> tuple[str | None, list[str]]:
    """Returns the YAML file of a command line, named by --config or as its first word, and the other words."""
    words = list(argv)
    files = [words.pop(0)] if words and not words[0].startswith("-") else []
    kept = []
    while words:
        word = words.pop(0)
        if word == _FLAG:
            if not words:
                raise UsageError(f"{_FLAG}: name a YAML file after it")
            files.append(words.pop(0))
        elif word.startswith(f"{_FLAG}="):
            files.append(word.removeprefix(f"{_FLAG}="))
        else:
            kept.append(word)
    if len(files) > 1:
        raise UsageError(f"{_FLAG} {files[1]}: one YAML file only, and {files[0]} is given")
    return next(iter(files), None), kept


def flags_of_file(path: str, parser: argparse.ArgumentParser) -> list[str]:
    """Converts the entries of a YAML file to command-line flags, so one parser checks both."""
    try:
        text = Path(path).read_text()
        settings = yaml.safe_load(text) or {}
    except OSError as error:
        raise UsageError(f"{path!r} is neither a flag nor a readable YAML file: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise UsageError(f"{path}: must hold entries like 'resolution: 32'")
    if repeated := _repeated(text):
        raise UsageError(f"{path}: {repeated[0]!r} is given twice: keep one of the two")
    known = {name.lstrip("-"): action for action in parser._actions for name in action.option_strings if name != _FLAG}
    flags = []
    for name, value in settings.items():
        if name not in known:
            raise UsageError(f"{path}: unknown entry {name!r}{did_you_mean(str(name), list(known))}")
        try:
            flags += _as_flag(known[name], value)
        except ValueError as error:
            raise UsageError(f"{path}: {name}: {error}") from None
    return flags


def _as_flag(action: argparse.Action, value) -> list[str]:
    flag = action.option_strings[0]
    if value is None:
        return []
    if isinstance(action, argparse.BooleanOptionalAction):
        return [flag if _switch(value) else action.option_strings[1]]
    if action.nargs == 0:
        return [flag] if _switch(value) else []
    if isinstance(value, bool) and "no" in (action.choices or ()):  # YAML 1.1 reads no, unquoted, as false
        value = value or "no"
    if isinstance(value, bool | dict):
        raise ValueError(f"{str(value).lower()} is not a valid value of {flag}")
    if isinstance(value, list):
        return [flag, *map(_word, value)]
    return [f"{flag}={_word(value)}"]


def _word(value) -> str:
    """Converts a value to a word of a command line, with the home folder in the place of ~/ as by a shell."""
    word = str(value)
    return os.path.expanduser(word) if word.startswith("~/") else word


def _repeated(text: str) -> list[str]:
    """Returns the names that occur more than once in YAML, whose reader keeps only the last value of each."""
    entries = yaml.compose(text, Loader=yaml.SafeLoader)
    names = [name.value for name, _ in entries.value] if entries is not None else []
    return [name for name in names if names.count(name) > 1]


def _switch(value) -> bool:
    """Parses a boolean, also from a quoted word."""
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    word = str(value).lower()
    if word not in words:
        raise ValueError(f"{value!r} is neither true nor false")
    return words[word]
