"""Loads the autoencoder of a latent model, in the coordinates that diffusers' LDMPipeline reads."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL
from torch import nn

from ..autoencoder import AUTOENCODERS
from ..hub.lookup import pipeline_index
from ..hub.model_index import check_weights
from ..runtime.errors import UsageError, warn
from ..sampling.sampler import add_weights
from ..settings.model import ModelSettings
from ..views import DecodedImage

__all__ = ["autoencoder_of", "autoencoder_sha256", "decoded_view", "load_autoencoder"]

_BASE = "--pretrained_model_name_or_path"
_COMPONENTS = ("vqvae", "vae")  # names of an autoencoder in diffusers' pipelines
_COORDINATES = ("shift_factor", "latents_mean", "latents_std")  # LDMPipeline reads none of them


def load_autoencoder(
    settings: ModelSettings, cache_dir: str | None = None, entries: tuple[str, ...] = ()
) -> nn.Module | None:
    """Loads the autoencoder of --vae, or that of the pipeline to fine-tune; None for a model of images.

    Args:
        settings: settings of the model.
        cache_dir: folder of downloads.
        entries: entries that the pipeline reads in the config of the autoencoder, besides scaling_factor.

    Raises:
        UsageError: there is no readable autoencoder, its class is not supported, or both flags name one.
    """
    given, base = settings.vae, settings.pretrained_model_name_or_path
    own = None if base is None else autoencoder_of(pipeline_index(base, f"{_BASE} {base}", cache_dir))
    if given is not None and own is not None:
        raise UsageError(f"--vae {given}: the pipeline {base} has an autoencoder of its own; drop the flag")
    if given is None and own is None:
        return None
    flag = f"--vae {given}" if own is None else f"{_BASE} {base}"
    if own is None:
        own = autoencoder_of(pipeline_index(given, flag, cache_dir))
    try:
        vae = _load(base if given is None else given, own, cache_dir)
    except UsageError as error:
        raise UsageError(f"{flag}: {error}") from None
    except Exception as error:  # of any type, because the files may be corrupt
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"{flag}: no readable autoencoder: {reason}") from error
    if dropped := [name for name in _COORDINATES if vae.config.get(name) and name not in entries]:
        vae.register_to_config(**dict.fromkeys(dropped))
        read = ", ".join(("scaling_factor", *entries))
        warn(f"{flag}: {', '.join(dropped)} is left out, because diffusers' pipeline reads {read} only")
    return vae.requires_grad_(False).eval()


def decoded_view(vae: nn.Module, mixed_precision: str) -> DecodedImage:
    """Returns the view of the losses: images decoded in the precision of the training.

    A decoder that overflows in float16 (force_upcast) stays in its own precision there.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision, "auto")
    return DecodedImage(vae, dtype="auto" if _overflows(vae, dtype) else dtype)


def cast_decoder(vae: nn.Module, dtype: torch.dtype) -> None:
    """Converts an autoencoder that only decodes from now on, and is not saved; one that would overflow is kept."""
    if not _overflows(vae, dtype):
        nn.Module.to(vae, dtype)


def _overflows(vae: nn.Module, dtype: torch.dtype | str) -> bool:
    return dtype == torch.float16 and bool(vae.config.get("force_upcast"))


def autoencoder_sha256(vae: nn.Module) -> str:
    """Returns a hash of everything in an autoencoder that affects latents: class, configuration, weights."""
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    digest = hashlib.sha256(json.dumps([type(vae).__name__, config], sort_keys=True, default=str).encode())
    add_weights(digest, vae)
    return digest.hexdigest()


def autoencoder_of(index: dict | None) -> str | None:
    """Returns the name of the autoencoder in a model_index.json; None for no pipeline, or one without."""
    return next((name for name in _COMPONENTS if ((index or {}).get(name) or [None])[0] is not None), None)


def _load(path: str, subfolder: str | None, cache_dir: str | None) -> nn.Module:
    if not path:
        raise UsageError("not a folder or Hub id: name the folder that holds config.json and the weights")
    where = {"subfolder": subfolder or "", "cache_dir": cache_dir}
    name = AutoencoderKL.load_config(path, **where).get("_class_name")
    if name not in AUTOENCODERS:
        raise UsageError(f"an autoencoder of class {name} is not supported: use one of {', '.join(AUTOENCODERS)}")
    check_weights(Path(path, subfolder or ""))
    return getattr(diffusers, name).from_pretrained(path, **where, use_safetensors=True)
