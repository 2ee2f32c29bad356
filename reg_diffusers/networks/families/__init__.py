"""Families of text-to-image pipelines, one module each; the class of a saved pipeline selects its family."""

from __future__ import annotations

from . import flux, stable_diffusion, stable_diffusion_3, stable_diffusion_xl
from .family import Embeddings, Family, loaded_in

__all__ = ["FAMILIES", "Embeddings", "Family", "family_of", "loaded_in"]

FAMILIES = (stable_diffusion.FAMILY, stable_diffusion_xl.FAMILY, stable_diffusion_3.FAMILY, flux.FAMILY)


def family_of(index: dict | None) -> Family | None:
    """Returns the family of a pipeline by its model_index.json; None for no pipeline, or one of no family."""
    name = (index or {}).get("_class_name")
    return next((family for family in FAMILIES if family.pipeline == name), None)
