"""Finds the training data that a model records: the default data for a measurement."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..runs.run_folder import BEST_FOLDER, PLAIN_FOLDER, SETTINGS_FILE
from .judging_flags import DATA_FLAGS

__all__ = ["recorded_data"]

_NAMES = ("dataset_name", "train_data_dir")


def recorded_data(models: list[str], flag: str) -> tuple[str | None, argparse.Namespace]:
    """Returns the name of the training data that the models record (None: the embedded data) and the flags about them.

    Reads the settings in local folders only: a downloaded file must not decide which data are read or fetched.

    Args:
        models: the folders or Hub ids of the command line.
        flag: the flag that names data, for messages.

    Raises:
        UsageError: if a model records no data, if the models differ, or if the data are missing.
    """
    from ..runtime.errors import UsageError

    found = {model: _settings(model, flag) for model in models}
    first, *others = models
    for other in others:
        if found[other] != found[first]:
            raise UsageError(
                f"--model {other} and {first} were trained on different data: name the data to measure against, {flag}"
            )
    settings = found[first]
    name = next((settings[entry] for entry in _NAMES if settings.get(entry)), None)
    local = settings.get("train_data_dir") and not settings.get("dataset_name")
    if local and not Path(name).exists():
        raise UsageError(
            f"--model {first} was trained on {name}, which does not exist here: name its data, {flag} FOLDER_OR_ID"
        )
    return name, argparse.Namespace(**{entry: settings.get(entry) for entry in DATA_FLAGS})


def _settings(model: str, flag: str) -> dict:
    """Reads the settings of a run that are about its data."""
    import yaml

    from ..runtime.errors import UsageError

    path = Path(model, SETTINGS_FILE)
    while path.parent.name in (PLAIN_FOLDER, BEST_FOLDER) and not path.is_file():  # these models of a run share them
        path = path.parent.with_name(SETTINGS_FILE)
    if not path.is_file():
        raise UsageError(f"--model {model} does not record its training data: name them, {flag} FOLDER_OR_ID")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        return {name: settings.get(name) for name in (*_NAMES, *DATA_FLAGS)}
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{path} cannot be read ({reason}): name the data of --model {model}, {flag}") from error
