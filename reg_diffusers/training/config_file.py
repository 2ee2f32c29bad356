"""Settings of a run in a YAML file, read as if they were flags."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path

import yaml

from .errors import UsageError

__all__ = ["flags_of_file"]


def flags_of_file(path: str, parser: argparse.ArgumentParser) -> list[str]:
    """A YAML file's entries as command-line flags, so that one parser checks both."""
    try:
        settings = yaml.safe_load(Path(path).read_text()) or {}
    except OSError as error:
        raise UsageError(f"{path!r} is neither a flag nor a YAML file that can be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise UsageError(f"{path}: must hold entries like 'resolution: 32'")
    known = {name.lstrip("-"): action for action in parser._actions for name in action.option_strings}
    flags = []
    for name, value in settings.items():
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            raise UsageError(f"{path}: unknown entry {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
        flags += _as_flag(known[name], value)
    return flags


def _as_flag(action: argparse.Action, value) -> list[str]:
    flag = action.option_strings[0]
    if value is None:
        return []
    if isinstance(action, argparse.BooleanOptionalAction):
        return [flag if value else action.option_strings[1]]
    if action.nargs == 0:
        return [flag] if value else []
    if isinstance(value, list):
        return [flag, *map(str, value)]
    return [f"{flag}={value}"]
