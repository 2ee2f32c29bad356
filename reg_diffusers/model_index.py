"""What model_index.json holds of a RegDDPMPipeline: a form that every pipeline class of diffusers loads silently."""

from __future__ import annotations

__all__ = ["as_saved", "saved_normalization"]

_PRIVATE_KEY = "_reg_diffusers"


def as_saved(config: dict) -> dict:
    """A pipeline's config, its class named "DDPMPipeline", with what that class does not know under a private key."""
    own = {"normalization": config.get("normalization")}
    known = {name: value for name, value in config.items() if name not in own}
    return {**known, "_class_name": "DDPMPipeline", _PRIVATE_KEY: own}


def saved_normalization(config: dict) -> dict | None:
    """The normalization in the content of a model_index.json, if it has one."""
    return (config.get(_PRIVATE_KEY) or {}).get("normalization")
