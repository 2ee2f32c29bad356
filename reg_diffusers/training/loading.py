"""Loads what a run starts from: the model, and the data as the network sees them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..autoencoder import downsampling, encoded, latent_channels
from ..data.buckets import each_size
from ..data.latents import LatentData, check_deviation, latents_of
from ..data.pictures_data import PictureData
from ..data.prompts import Prompts, PromptsOnDemand
from ..data.training_data import (
    StreamedLatents,
    StreamedPictures,
    TrainingData,
    Wanted,
    cache_folder,
    load_training_data,
)
from ..hub.lookup import pipeline_index
from ..networks import dit
from ..networks.autoencoders import autoencoder_sha256, load_autoencoder
from ..networks.build import GivenModel, load_given_model
from ..networks.families import FAMILIES, Embeddings, Family, family_of
from ..networks.lora import frozen_sha256
from ..networks.text_to_image import text_encoder_sha256
from ..networks.whole_pipeline import base_folder, copied_files
from ..runs.lineage import CONTENT
from ..runtime.errors import UsageError, warn
from ..runtime.messages import errors_only
from ..settings.data import DataSettings
from ..settings.model import ModelSettings
from ..settings.size import sides

__all__ = ["HeldOut", "Loaded", "load_model_and_data"]

_TEXTS_SHOWN = 16  # of the first images, in previews


@dataclass(frozen=True)
class HeldOut:
    """Images that are held out from the training.

    Attributes:
        data: the images as the network sees them.
        source: their origin, such as "--validation_split 0.05".
        digest: hash of their content.
    """

    data: TrainingData
    source: str
    digest: str

    def describe(self) -> str:
        """Describes the images in a line."""
        return f"{len(self.data):,} {'images' if self.data.is_picture else 'fields'} by {self.source}"

    def record(self) -> dict:
        """Describes the images for reg_config.json."""
        return {"images": len(self.data), "source": self.source, "sha256": self.digest}


@dataclass(frozen=True)
class Loaded:
    """What a run starts from.

    Attributes:
        given: model to start from.
        images: images or fields to train on.
        data: data as the network sees them: `images`, or their latents.
        vae: autoencoder of the latents, or None.
        family: family of a text-to-image pipeline, or None.
        previews: embeddings of the texts of the previews, (P, ...) by name; None without texts.
        prompts_shown: these texts.
        see: turns further images, like `images`, into what the network sees; holds the encoders. None later.
        held_out: images that are held out, or None.
        base: folder of the text-to-image pipeline whose other parts are saved with the network; None if none are.
    """

    given: GivenModel
    images: TrainingData
    data: TrainingData
    vae: nn.Module | None = None
    family: Family | None = None
    previews: dict[str, Tensor] | None = None
    prompts_shown: tuple[str, ...] = ()
    see: Callable[[TrainingData], TrainingData] | None = lambda images: images
    held_out: HeldOut | None = None
    base: Path | None = None

    @property
    def takes_sizes(self) -> bool:
        """Whether the network takes the sizes of each image, see `data.image_sizes`."""
        return self.family is not None and self.family.takes_sizes

    @property
    def bytes_beside(self) -> int:
        """Bytes of the files that are saved with the network: autoencoder, or all other parts of a pipeline."""
        if self.base is not None:
            return sum(path.stat().st_size for path in copied_files(self.base, self.family.component))
        return sum(value.numel() * value.element_size() for value in self.vae.parameters()) if self.vae else 0

    def frozen_parts(self) -> dict[str, str]:
        """Returns hashes of what decides the result but is in no checkpoint, by name: files may change in place."""
        found = {
            CONTENT: self.images.content[:16],
            "autoencoder": self.vae and autoencoder_sha256(self.vae),
            "frozen weights": self.given.unet and frozen_sha256(self.given.unet),
            "texts": self.data.prompts and self.data.prompts.fingerprint,
            "held-out images": self.held_out and self.held_out.digest,
        }
        return {name: value for name, value in found.items() if value}


def load_model_and_data(
    model: ModelSettings,
    data: DataSettings,
    device: torch.device,
    validation_prompts: tuple[str, ...] | None = None,
    frozen: torch.dtype = torch.float32,
    wanted: Sequence[Wanted] = (),
    *,
    with_images: bool = False,
) -> Loaded:
    """Loads the model to start from, and the data in its size and channels; encodes them if it works in latents.

    Args:
        model: settings of the model.
        data: settings of the data.
        device: device that encodes.
        validation_prompts: texts of the previews; None: those of the first images.
        frozen: dtype of text encoders, and of the weights that adapters leave frozen. Images are encoded in float32.
        wanted: what regularizers need of the data.
        with_images: whether regularizers compare with the images, which latents do not show exactly.
    """
    base = model.pretrained_model_name_or_path
    index = None if base is None else pipeline_index(base, f"--pretrained_model_name_or_path {base}", data.cache_dir)
    family = family_of(index)
    _check_texts(model, data, family, index, validation_prompts)
    given = load_given_model(model, data.cache_dir, frozen)
    vae = load_autoencoder(model, data.cache_dir, family.vae_entries if family else ())
    if given.is_dit:
        dit.check_settings(data, vae)
    if vae is None and family is not None:
        raise UsageError(f"--pretrained_model_name_or_path {base}: it has no autoencoder: name one by --vae")
    if vae is None:
        channels = None if data.channels and given.unet is None else given.channels  # those of a config are replaced
        model_of = (channels, given.size, given.normalization, given.condition_channels)
        images = load_training_data(data, *model_of, wanted=wanted, white=given.white)
        return Loaded(given, images, images)
    is_whole = family is not None and model.lora_rank is None
    whole = base_folder(base, family.component, data.cache_dir) if is_whole else None
    factor = downsampling(vae)
    _check_data_of_latents(data, factor, f"--vae {model.vae}" if model.vae else f"the autoencoder of {base}")
    if given.unet is not None and given.channels != latent_channels(vae):
        raise UsageError(
            f"the autoencoder gives latents of {latent_channels(vae)} channels, but the given model has"
            f" {given.channels}: use the autoencoder that it was trained with"
        )
    size = given.size and tuple(factor * side for side in given.size)
    of_model = {"white": given.white, "takes_sizes": family is not None and family.takes_sizes}
    images = load_training_data(data, vae.config.in_channels, size, None, 0, wanted=wanted, **of_model)
    if not images.is_picture:
        fix = "drop --vae" if model.vae else f"{base} needs images"
        raise UsageError(f"an autoencoder encodes images, but the data are fields: {fix}")
    key, encode = autoencoder_sha256(vae), partial(encoded, vae.to(device))
    folder = cache_folder(data.cache_dir)
    encoder, null = (None, None) if family is None else _load_encoder(family, base, data.cache_dir, device, frozen)

    def see(images: TrainingData, *, mirrored: bool = False) -> TrainingData:
        prompts = None if family is None else _prompts(images, data, family, encoder, null, folder)
        if isinstance(images, StreamedPictures):
            return StreamedLatents(images, encode, device, prompts, with_images=with_images)

        def of_size(images: PictureData, rows: range) -> LatentData:
            return latents_of(
                *(images, encode, key, folder, device),
                mirrored=mirrored,
                prompts=prompts and prompts.of_images(rows),
                with_images=with_images,
            )

        latents = each_size(images, of_size)
        check_deviation(latents.examples.deviation)
        return latents

    latents, previews, shown = see(images, mirrored=data.random_flip), None, ()
    if family is not None:
        shown = tuple(validation_prompts or dict.fromkeys(latents.prompts.texts[:_TEXTS_SHOWN]))
        if validation_prompts:
            _warn_of_cuts(shown, "--validation_prompts", family, encoder)
        embedded = [_embed(family, encoder, [text]) for text in shown]
        previews = {name: torch.cat([one[name] for one in embedded]).cpu() for name in null}
    return Loaded(given, images, latents, vae, family, previews, shown, see, base=whole)


def _check_texts(
    model: ModelSettings,
    data: DataSettings,
    family: Family | None,
    index: dict | None,
    validation_prompts: tuple[str, ...] | None,
) -> None:
    """Raises `UsageError` for texts without a text-to-image model, and the reverse."""
    has_texts = data.caption_column is not None or data.prompt is not None
    if family is not None and not has_texts:
        raise UsageError(
            f"a {family.pipeline} needs a text for each image: name its column by --caption_column, or give"
            " one text for all by --prompt"
        )
    if family is not None:
        return
    given = {
        "--lora_rank": model.lora_rank,
        "--caption_column": data.caption_column,
        "--prompt": data.prompt,
        "--validation_prompts": validation_prompts,
        "--condition_dropout": None if data.class_conditional else data.condition_dropout,
    }
    if flags := [flag for flag, value in given.items() if value not in (None, 0.0)]:
        known = ", ".join(family.pipeline for family in FAMILIES)
        if flags == ["--condition_dropout"]:
            raise UsageError("--condition_dropout drops class labels or texts: add --class_conditional, or drop it")
        base, name = model.pretrained_model_name_or_path, index and index.get("_class_name")
        raise UsageError(
            f"{flags[0]} needs a text-to-image pipeline ({known}): name one by --pretrained_model_name_or_path"
            f"{f' in the place of {base}, a {name}' if name else ''}"
        )


def _load_encoder(family: Family, base: str, cache_dir: str | None, device: torch.device, dtype: torch.dtype):
    """Returns the pipeline that embeds texts, and its embedding of no text."""
    try:
        if missing := family.missing_parts(base, cache_dir):
            raise ValueError(f"the pipeline was saved without {', '.join(missing)}")
        encoder = family.load_encoder(base, cache_dir, dtype).to(device)
        return encoder, family.null(encoder)  # some missing files are noticed only when they are used
    except Exception as error:  # of any type, because the files may be corrupt
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"--pretrained_model_name_or_path {base}: no readable text encoder: {reason}") from error


def _prompts(
    images: TrainingData, data: DataSettings, family: Family, encoder, null: Embeddings, folder: Path
) -> Prompts | PromptsOnDemand:
    """Reads and embeds the texts of the images; warns of those that a tokenizer cuts off.

    Those of a stream are embedded in each step; the first ones stand for all in the warning.

    Raises:
        UsageError: images have no text.
    """
    is_given, is_stream = data.prompt is not None, isinstance(images, StreamedPictures)
    texts = [data.prompt] * (1 if is_stream else len(images)) if is_given else images.captions
    if not is_given and (missing := [row for row, text in enumerate(texts) if not (text or "").strip()]):
        raise UsageError(
            f"--caption_column {data.caption_column}: {len(missing)} of {len(texts)} images have no text, the first is"
            f" row {missing[0]}: add texts, or give one for all by --prompt"
        )
    _warn_of_cuts(texts, "texts of the first images" if is_stream and not is_given else "texts", family, encoder)
    embed, key = partial(_embed, family, encoder), text_encoder_sha256(encoder, family)
    if is_stream and not is_given:
        return PromptsOnDemand(texts, embed, null, key)
    return Prompts(texts, embed, null, key, folder)


def _embed(family: Family, encoder, texts: list[str]) -> Embeddings:
    with errors_only("diffusers", "transformers"):  # which print a line for each text that is cut off
        return family.embed(encoder, texts)


def _warn_of_cuts(texts: list[str], named: str, family: Family, encoder) -> None:
    """Warns once of all texts that a tokenizer cuts off."""
    lost = {text: cut for text in set(texts) if (cut := family.lost_tokens(encoder, text))}
    if too_long := [text for text in texts if text in lost]:
        limits = family.token_limits(encoder)
        of_each = {name: sum(name in lost[text] for text in too_long) for name in limits}
        counts = ", ".join(f"{name} {number} of them, at {limits[name]} tokens" for name, number in of_each.items())
        warn(
            f"the tokenizer cuts off the end of {len(too_long)} of {len(texts)} {named}, such as"
            f" {too_long[0][:60]!r}, which is {max(lost[too_long[0]].values())} tokens too long"
            f"{f'; {counts}' if len(limits) > 1 else ''}"
        )


def _check_data_of_latents(data: DataSettings, factor: int, autoencoder: str) -> None:
    """Raises `UsageError` for settings of the data that latents of this autoencoder do not support."""
    if data.buckets and data.buckets % factor:
        near = -(-data.buckets // factor) * factor
        raise UsageError(
            f"--buckets {data.buckets}: the autoencoder reduces images by {factor}, so use a multiple of {factor},"
            f" such as {near}"
        )
    if data.random_crop and not data.streaming:
        raise UsageError(
            f"--random_crop: images are encoded once for {autoencoder}, and a window of their latents is not the"
            " latents of a window; drop the flag, or add --streaming, which encodes each window in each step"
        )
    if data.conditioning_image_column:
        raise UsageError(f"--conditioning_image_column is not supported in latents, here of {autoencoder}; drop it")
    size = sides(data.resolution or factor)
    if wrong := [side for side in size if side % factor]:
        near = max(wrong[0] // factor, 1) * factor
        raise UsageError(
            f"--resolution {data.resolution}: the autoencoder reduces images by {factor}, so use multiples of"
            f" {factor}, such as {near} or {near + factor}"
        )
