"""Refuses saved models of classes that are not supported, before their weights are read, and names the right flag."""

from __future__ import annotations

import diffusers
from diffusers import DiTPipeline, DiTTransformer2DModel, UNet2DModel

from ..autoencoder import AUTOENCODERS
from ..hub.lookup import saved_file
from ..runtime.errors import UsageError
from .families import FAMILIES

__all__ = ["check_network", "known_families", "network_folder"]

_SUPPORTED = (UNet2DModel.__name__, DiTTransformer2DModel.__name__)


def network_folder(index: dict, path: str, named: str, *, or_else: str, cache_dir: str | None = None) -> str:
    """Returns the subfolder of the network in a DiTPipeline, or in a pipeline with a UNet2DModel.

    It is "" in pipelines of the first versions of diffusers, such as google/ddpm-cat-256.

    Args:
        index: its model_index.json.
        path: folder or Hub id of the pipeline.
        named: the flag and its value, for messages.
        or_else: what else may be used.
        cache_dir: folder of downloads.

    Raises:
        UsageError: it is another pipeline.
    """
    name = index.get("_class_name")
    if name == DiTPipeline.__name__:
        return "transformer"
    for folder in ("unet", ""):
        config = saved_file(path, f"{folder}/config.json".lstrip("/"), named, cache_dir)
        network = config and UNet2DModel.load_config(config).get("_class_name")
        if config and (network == UNet2DModel.__name__ or not _is_of_diffusers(network)):
            return folder
    raise UsageError(
        f"{named}: a {name} is not supported: use a pipeline with a {UNet2DModel.__name__}, a"
        f" {DiTPipeline.__name__}, or {or_else}"
    )


def check_network(config: dict, named: str, *, fix: str) -> None:
    """Raises UsageError for the config of a network of diffusers that is not supported, or of one of transformers.

    Args:
        config: the config of a network.
        named: the flag and its value, for the message.
        fix: what to do with a network that is not an autoencoder.
    """
    name = config.get("_class_name")
    of_transformers = config.get("architectures") if name is None else None
    if of_transformers or (name not in _SUPPORTED and _is_of_diffusers(name)):
        name = name or " or ".join(map(str, of_transformers))
        fix = "name it by --vae" if name in AUTOENCODERS else fix
        raise UsageError(f"{named}: holds {name}, not {' or '.join(_SUPPORTED)}: {fix}")


def known_families() -> str:
    """Returns the classes of the text-to-image pipelines that can be fine-tuned."""
    return ", ".join(family.pipeline for family in FAMILIES)


def _is_of_diffusers(name: str | None) -> bool:
    """Whether a class is one of diffusers; a user's own class may be a kind of UNet2DModel."""
    return hasattr(diffusers, str(name))
