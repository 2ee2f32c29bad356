"""Families of text-to-image pipelines, one module each; the class of a saved pipeline selects its family."""

from __future__ import annotations

from pathlib import Path

from diffusers import DiffusionPipeline

from . import flux, stable_diffusion, stable_diffusion_3, stable_diffusion_xl
from .family import Embeddings, Family, loaded_in

__all__ = ["FAMILIES", "Embeddings", "Family", "family_of", "loaded_in", "pipeline_name"]

FAMILIES = (stable_diffusion.FAMILY, stable_diffusion_xl.FAMILY, stable_diffusion_3.FAMILY, flux.FAMILY)


def family_of(path: str, cache_dir: str | None = None) -> Family | None:
    """Returns the family of a saved pipeline; None if the path names no pipeline of a family."""
    name = pipeline_name(path, cache_dir)
    return next((family for family in FAMILIES if family.pipeline == name), None)


def pipeline_name(path: str, cache_dir: str | None = None) -> str | None:
    """Returns the name of the class of a saved pipeline; None if the path names no pipeline."""
    if Path(path).is_dir() and not (Path(path) / "model_index.json").is_file():
        return None
    try:
        return DiffusionPipeline.load_config(path, cache_dir=cache_dir).get("_class_name")
    except (OSError, ValueError, AttributeError):
        return None
