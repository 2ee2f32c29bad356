"""Loads LoRA weights that train_reg.py wrote, with the pipeline that they were trained on."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml
from huggingface_hub import hf_hub_download

from ..hub.lookup import pipeline_index
from ..runs.run_folder import CONFIG_FILE, LORA_FILE, PLAIN_FOLDER, SETTINGS_FILE
from ..runtime.messages import say
from ..settings.model import ModelSettings
from .autoencoders import cast_decoder, load_autoencoder
from .families import family_of
from .noise_schedule import given_scheduler
from .text_to_image import RegTextToImagePipeline

__all__ = ["load_lora_pipeline"]


def load_lora_pipeline(
    model: str, cache_dir: str | None = None, dtype: torch.dtype = torch.float32
) -> RegTextToImagePipeline:
    """Loads LoRA weights, and the pipeline that they record as their base.

    Args:
        model: output folder of a run, or a Hub id to which one was uploaded. The latter may name its base by a Hub id
            only.
        cache_dir: folder of downloads.
        dtype: dtype of the base; the adapters keep theirs.

    Raises:
        OSError: there are no such weights.
        ValueError: no base is recorded, or it cannot be used; or peft is not installed.
        UsageError: there is no such base, or its autoencoder cannot be read.
    """
    record, base = _recorded(model, cache_dir)
    if base is None:
        raise ValueError(f"{model} names no base on the Hub: load it in diffusers, and then its LoRA weights")
    family = family_of(pipeline_index(base, f"its base {base}", cache_dir))
    if family is None:
        raise ValueError(f"its base {base} is not a text-to-image pipeline that can be read here")
    if not Path(model).is_dir():
        say(f"base        {base}, as {model} records")
    encoder = family.load_encoder(base, cache_dir, dtype)
    network = family.load_network(base, cache_dir, dtype)
    encoder.register_modules(**{family.component: network})
    encoder.load_lora_weights(model, weight_name=LORA_FILE, cache_dir=cache_dir)
    settings = ModelSettings(pretrained_model_name_or_path=base)
    vae = load_autoencoder(settings, cache_dir, family.vae_entries)
    cast_decoder(vae, dtype)
    _, height, width = record["data"]["shape"]
    scheduler = given_scheduler(base, cache_dir)
    return RegTextToImagePipeline.assembled(family, network, scheduler, vae, (height, width), encoder=encoder)


def _recorded(model: str, cache_dir: str | None) -> tuple[dict, str | None]:
    """Returns the record of a run, and the base of its weights."""
    folder = Path(model)
    if not folder.is_dir():
        hf_hub_download(model, LORA_FILE, cache_dir=cache_dir)
        path = hf_hub_download(model, CONFIG_FILE, cache_dir=cache_dir)
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        return record, record.get("base_model")
    named = folder.parent if folder.name == PLAIN_FOLDER and not (folder / CONFIG_FILE).is_file() else folder
    try:
        record = json.loads((named / CONFIG_FILE).read_text(encoding="utf-8"))
        settings = yaml.safe_load((named / SETTINGS_FILE).read_text(encoding="utf-8"))
        return record, settings["pretrained_model_name_or_path"]
    except (OSError, KeyError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"{named} does not record how its LoRA weights were trained") from error
