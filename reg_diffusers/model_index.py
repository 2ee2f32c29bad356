"""What model_index.json holds of a RegDDPMPipeline: a form that every pipeline class of diffusers loads silently."""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["as_saved", "check_components", "check_weights", "saved_normalization"]

_PRIVATE_KEY = "_reg_diffusers"


def as_saved(config: dict) -> dict:
    """A pipeline's config, its class named "DDPMPipeline", with what that class does not know under a private key."""
    own = {"normalization": config.get("normalization")}
    known = {name: value for name, value in config.items() if name not in own}
    return {**known, "_class_name": "DDPMPipeline", _PRIVATE_KEY: own}


def saved_normalization(config: dict) -> dict | None:
    """The normalization in the content of a model_index.json, if it has one."""
    return (config.get(_PRIVATE_KEY) or {}).get("normalization")


def check_components(config: dict) -> None:
    """Raises ValueError where a model_index.json names a module that would have to be imported, and so run."""
    for name, value in config.items():
        library = value[0] if isinstance(value, list | tuple) and len(value) == 2 else None
        if isinstance(library, str) and library not in ("diffusers", "transformers", *sys.modules):
            raise ValueError(
                f"model_index.json: {name} is of {library!r}, a module that is not imported because a file says so:"
                " import it yourself if you trust it"
            )


def check_weights(folder: Path) -> None:
    """Raises ValueError for weights as pickles alone, which may run code when they are loaded."""
    pickled = sorted(path for kind in ("bin", "ckpt", "pt", "pth", "pkl") for path in folder.glob(f"*.{kind}"))
    if pickled and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{pickled[0]}: pickled weights may run code and are not loaded: convert them to safetensors, by"
            " safetensors.torch.save_file"
        )
