"""Refuses saved models of classes that are not supported, before their weights are read, and names the right flag."""

from __future__ import annotations

import diffusers
from diffusers import DiffusionPipeline, DiTPipeline, DiTTransformer2DModel, UNet2DModel

from ..autoencoder import AUTOENCODERS
from ..runtime.errors import UsageError
from .families import FAMILIES

__all__ = ["check_network", "check_pipeline", "known_families"]

_SUPPORTED = (UNet2DModel.__name__, DiTTransformer2DModel.__name__)


def check_pipeline(path: str, named: str, *, or_else: str, cache_dir: str | None = None) -> None:
    """Raises UsageError for a pipeline that is neither a DiTPipeline nor one with a UNet2DModel.

    Args:
        path: folder or Hub id of a pipeline.
        named: the flag and its value, for the message.
        or_else: what else may be used.
        cache_dir: folder of downloads.
    """
    name = DiffusionPipeline.load_config(path, cache_dir=cache_dir).get("_class_name")
    if name == DiTPipeline.__name__:
        return
    try:
        network = UNet2DModel.load_config(path, subfolder="unet", cache_dir=cache_dir).get("_class_name")
    except OSError:
        network = None  # such as a pipeline with a transformer
    if network is None or (network != UNet2DModel.__name__ and _is_of_diffusers(network)):
        raise UsageError(
            f"{named}: a {name} is not supported: use a pipeline with a {UNet2DModel.__name__}, a"
            f" {DiTPipeline.__name__}, or {or_else}"
        )


def check_network(config: dict, named: str, *, fix: str) -> None:
    """Raises UsageError for the config of a network of diffusers that is not supported.

    Args:
        config: the config of a network.
        named: the flag and its value, for the message.
        fix: what to do with a network that is not an autoencoder.
    """
    name = config.get("_class_name")
    if name not in _SUPPORTED and _is_of_diffusers(name):
        fix = "name it by --vae" if name in AUTOENCODERS else fix
        raise UsageError(f"{named}: holds {name}, not {' or '.join(_SUPPORTED)}: {fix}")


def known_families() -> str:
    """Returns the classes of the text-to-image pipelines that can be fine-tuned."""
    return ", ".join(family.pipeline for family in FAMILIES)


def _is_of_diffusers(name: str | None) -> bool:
    """Whether a class is one of diffusers; a user's own class may be a kind of UNet2DModel."""
    return hasattr(diffusers, str(name))
