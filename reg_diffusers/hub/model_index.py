"""The model_index.json of a RegDDPMPipeline, which every pipeline class of diffusers loads without a warning."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path

from diffusers import DDIMScheduler

__all__ = [
    "MOST_TIMESTEPS",
    "as_saved",
    "check_components",
    "check_saved_schedule",
    "check_schedule",
    "check_weights",
    "own_entries",
    "saved_class_names",
    "saved_normalization",
    "saved_white",
    "with_own_entries",
]

_PRIVATE_KEY = "_reg_diffusers"
_OWN_ENTRIES = ("normalization", "class_names", "white")
_NOT_SAVED = (*_OWN_ENTRIES, "_name_or_path")  # the latter may be a path on this machine
MOST_TIMESTEPS = 1_000_000  # of a training schedule: a thousand times the usual number, with tables of 4 MB


def as_saved(config: dict) -> dict:
    """Renames the class in a pipeline's config to one of diffusers, with entries unknown to it under a private key.

    The class is "LDMPipeline" with an autoencoder, else "DDPMPipeline".
    """
    in_latents = (config.get("vqvae") or [None])[0] is not None
    known = {
        name: value for name, value in config.items() if name not in _NOT_SAVED and (in_latents or name != "vqvae")
    }
    saved = {**known, "_class_name": "LDMPipeline" if in_latents else "DDPMPipeline"}
    return with_own_entries(saved, config)


def with_own_entries(saved: dict, config: Mapping) -> dict:
    """Returns a model_index.json with the entries of a pipeline's config that diffusers does not know."""
    return {**saved, _PRIVATE_KEY: {name: config.get(name) for name in _OWN_ENTRIES}}


def own_entries(config: dict) -> dict:
    """Returns the entries of a model_index.json that diffusers does not know; None for those that are missing."""
    return {name: (config.get(_PRIVATE_KEY) or {}).get(name) for name in _OWN_ENTRIES}


def saved_normalization(config: dict) -> dict | None:
    """Returns the normalization in a model_index.json, or None."""
    return own_entries(config)["normalization"]


def saved_class_names(config: dict) -> list[str] | None:
    """Returns the names of the classes in a model_index.json, or None."""
    of_dit = config.get("id2label") or {}  # as DiTPipeline names them
    return own_entries(config)["class_names"] or [of_dit[label] for label in sorted(of_dit, key=int)] or None


def saved_white(config: dict) -> int | None:
    """Returns the white value of pictures of more than 8 bits in a model_index.json, or None.

    Raises:
        ValueError: the entry is not a white value.
    """
    white = own_entries(config)["white"]
    if white is not None and not (isinstance(white, int) and 255 < white < 2**16):
        raise ValueError(f"model_index.json: white must be from 256 to 65535, not {white!r}")
    return white


def check_components(config: dict) -> None:
    """Raises ValueError if a model_index.json names a module that is not imported yet, because an import runs code."""
    for name, value in config.items():
        library = value[0] if isinstance(value, list | tuple) and len(value) == 2 else None
        if isinstance(library, str) and library not in ("diffusers", "transformers", *sys.modules):
            raise ValueError(
                f"model_index.json: {name} is of {library!r}, a module that is not imported automatically, because"
                " that runs its code: import it yourself if you trust it"
            )


def check_schedule(config: dict) -> None:
    """Raises ValueError if the config of a scheduler requires tables of gigabytes."""
    steps = config.get("num_train_timesteps", 1)
    if not isinstance(steps, int | float) or not 1 <= steps <= MOST_TIMESTEPS:
        raise ValueError(
            f"scheduler_config.json: num_train_timesteps must be from 1 to {MOST_TIMESTEPS:,}, not {steps!r}"
        )


def check_saved_schedule(path: str | Path, kwargs: dict) -> None:
    """Runs `check_schedule` on a saved pipeline; does nothing if it has no scheduler, which loading reports.

    Args:
        path: a folder or Hub id.
        kwargs: keyword arguments of `from_pretrained`.

    Raises:
        ValueError: the scheduler requires tables of gigabytes.
    """
    names = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
    given = {name: kwargs[name] for name in names if name in kwargs}
    for subfolder in ("scheduler", ""):  # the latter in pipelines of the first versions of diffusers
        with contextlib.suppress(OSError):
            return check_schedule(DDIMScheduler.load_config(str(path), subfolder=subfolder, **given))


def check_weights(folder: Path) -> None:
    """Raises ValueError if the weights exist only as pickles, which may run code when loaded."""
    pickled = sorted(path for kind in ("bin", "ckpt", "pt", "pth", "pkl") for path in folder.glob(f"*.{kind}"))
    if pickled and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{pickled[0]}: pickled weights may run code and are not loaded: convert them to safetensors with"
            " safetensors.torch.save_file"
        )
