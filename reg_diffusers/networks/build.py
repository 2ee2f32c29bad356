"""Builds or loads the network of a training run, and the noise scheduler saved with it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)

from ..data.training_data import Normalization, TrainingData
from ..hub.lookup import pipeline_index
from ..hub.model_index import check_weights, saved_class_names, saved_normalization, saved_white
from ..prediction import image_channels
from ..runtime.errors import UsageError
from ..settings.machine import MachineSettings
from ..settings.model import ModelSettings
from . import dit
from .classes import check_network, known_families, network_folder
from .families import Family, family_of
from .fit import check_classes, check_sides
from .lora import frozen_dtype, load_with_lora
from .noise_schedule import given_scheduler

__all__ = ["GivenModel", "build_unet", "learning_rate_of", "load_given_model", "new_unet_config"]

LARGE = "large"  # the name of the built-in config
_SMALL = 64  # pixels up to which the default network is small enough for a CPU
_DIT = DiTTransformer2DModel.__name__


@dataclass(frozen=True)
class GivenModel:
    """The model that a run starts from; all None for a new model with the default config.

    Attributes:
        unet: the pretrained network.
        scheduler: the noise scheduler saved with it.
        config: the config of a network to train from scratch.
        normalization: the field normalization of the pipeline.
        white: the white of its pictures, if they have more than 8 bits.
        class_names: the names of the classes that the pipeline records, if any.
        is_large: whether a new network is the large one for the size of the images.
        family: family of the text-to-image pipeline that the network belongs to.
        is_dit: whether the network is a DiTTransformer2DModel.
    """

    unet: UNet2DModel | None = None
    scheduler: DDPMScheduler | FlowMatchEulerDiscreteScheduler | None = None
    config: dict | None = None
    normalization: Normalization | None = None
    white: int | None = None
    class_names: list[str] | None = None
    is_large: bool = False
    family: Family | None = None
    is_dit: bool = False

    def as_called(self, network: Callable, data: TrainingData) -> Callable:
        """Returns the network to call in a loss: one of a text-to-image pipeline takes embeddings by name."""
        if self.is_dit:
            return dit.as_called(network, self.config or self.unet.config, len(data.classes))
        if self.family is None:
            return network
        return self.family.as_called(network, self.unet.config, frozen_dtype(self.unet), data.downsampling)

    @property
    def channels(self) -> int | None:
        """Channels of its images; None if it does not determine them."""
        if self.family is not None:
            return self.family.channels(self.unet.config)
        if self.is_dit:
            return self._entry("in_channels")
        channels = self._entry("out_channels")
        return channels if self.scheduler is None else image_channels(channels, self.scheduler.config)

    @property
    def condition_channels(self) -> int | None:
        """Input channels in addition to those of its images; None for a new model."""
        return None if self.unet is None else self.unet.config.in_channels - self.channels

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of its images; None if it does not determine them."""
        size = self._entry("sample_size") or (self.family and self.family.sample_size)
        return (size, size) if isinstance(size, int) else size and tuple(size)

    def _entry(self, name: str):
        config = self.unet.config if self.unet is not None else self.config
        return None if config is None else config.get(name)


def load_given_model(
    settings: ModelSettings, cache_dir: str | None = None, frozen: torch.dtype = torch.float32
) -> GivenModel:
    """Loads the model that --pretrained_model_name_or_path or --model_config_name_or_path names.

    Args:
        settings: settings of the model.
        cache_dir: folder of downloads.
        frozen: dtype of the weights that adapters leave frozen.

    Raises:
        UsageError: if there is no such model, or if its output seems to hold a learned variance that no config
            declares.
    """
    is_pretrained = settings.pretrained_model_name_or_path is not None
    flag = "--pretrained_model_name_or_path" if is_pretrained else "--model_config_name_or_path"
    path = settings.pretrained_model_name_or_path or settings.model_config_name_or_path
    given = _load(settings, cache_dir, frozen, f"{flag} {path}")
    inputs = given._entry("in_channels")
    if isinstance(inputs, int) and given.channels == 2 * inputs:
        if given.scheduler is not None:
            fix = "if that is right, set variance_type to learned_range in its scheduler_config.json"
        elif is_pretrained:
            fix = "name a pipeline with it, whose scheduler_config.json has variance_type learned_range"
        else:
            fix = "set out_channels to the channels of the images, because a new network is trained without one"
        raise UsageError(
            f"{flag} {path}: {given.channels} output channels for {inputs} input channels indicate a learned variance:"
            f" {fix}"
        )
    return given


def _load(settings: ModelSettings, cache_dir: str | None, frozen: torch.dtype, named: str) -> GivenModel:
    path = settings.pretrained_model_name_or_path
    try:
        if path is not None:
            index = pipeline_index(path, named, cache_dir)
            if (family := family_of(index)) is not None:
                if settings.lora_rank is None:
                    network = family.load_network(path, cache_dir, torch.float32)
                else:
                    network = load_with_lora(family, settings, cache_dir, frozen)
                return GivenModel(unet=network, scheduler=given_scheduler(path, cache_dir), family=family)
            if index is None:
                config = UNet2DModel.load_config(path, cache_dir=cache_dir)
                check_network(config, named, fix="name the folder of its pipeline")
                is_dit = config.get("_class_name") == _DIT
                unet = dit.load(path, cache_dir) if is_dit else _given_unet(path, cache_dir)
                return GivenModel(unet=unet, is_dit=is_dit)
            is_dit = index.get("_class_name") == DiTPipeline.__name__
            folder = network_folder(index, path, named, or_else=f"one of {known_families()}", cache_dir=cache_dir)
            scheduler = given_scheduler(path, cache_dir)
            return GivenModel(
                unet=(dit.load if is_dit else _given_unet)(path, cache_dir, folder),
                scheduler=dit.of_image_alone(scheduler) if is_dit else scheduler,
                normalization=_given_normalization(index),
                white=saved_white(index),
                class_names=saved_class_names(index),
                is_dit=is_dit,
            )
        path = settings.model_config_name_or_path
        if path == LARGE and not Path(path).exists():
            return GivenModel(is_large=True)
        if path is not None and Path(path).is_file():
            config = json.loads(Path(path).read_text())
            if not isinstance(config, dict):
                raise ValueError("it holds no JSON object")
            return _new_model(config, named)
        if path is not None:
            if pipeline_index(path, named, cache_dir) is not None:
                raise UsageError(
                    f"{named}: holds a pipeline: name the folder of its network to train such a network from scratch,"
                    " or fine-tune it by --pretrained_model_name_or_path"
                )
            return _new_model(dict(UNet2DModel.load_config(path, cache_dir=cache_dir)), named)
    except UsageError:
        raise
    except Exception as error:  # of any type, because the files may be corrupt
        reason = " ".join(str(error).split()) or type(error).__name__
        what = "no readable UNet2DModel" if Path(path).exists() else "no such folder, and no readable model on the Hub"
        raise UsageError(f"{named}: {what}: {reason}") from error
    return GivenModel()


def _new_model(config: dict, named: str) -> GivenModel:
    check_network(config, named, fix="use the config of a UNet2DModel or DiTTransformer2DModel")
    is_dit = config.get("_class_name") == _DIT
    return GivenModel(config=dit.new_config(config) if is_dit else config, is_dit=is_dit)


def build_unet(
    machine: MachineSettings, given: GivenModel, data: TrainingData, *, has_no_class: bool = False
) -> UNet2DModel:
    """Returns the given network, or a new one for the shape of the data.

    Args:
        machine: the settings of the machine.
        given: the model to start from.
        data: the data of the training.
        has_no_class: whether the network needs, beside an embedding for each class, one for images without a label.

    Raises:
        UsageError: if the data do not fit the network.
    """
    if given.is_dit:
        return _prepared(dit.build(given.unet, given.config, data), machine)
    channels, height, width = data.shape
    size = height if height == width else (height, width)
    if given.family is not None:
        unet = given.unet
        check_classes(None, None, data)
        multiple = given.family.multiple(unet.config)
        check_sides(multiple, data, f"the network divides the resolution by {multiple}")
        return _prepared(unet, machine)
    if given.unet is not None:
        unet = given.unet
        check_classes(unet.config.num_class_embeds, given.class_names, data, has_no_class)
        unet.register_to_config(sample_size=size)  # samples get the size of the latest training
    else:
        new = new_unet_config(min(height, width), given.is_large)
        config = new if given.config is None else dict(given.config)
        config.update(in_channels=channels + data.condition_channels, out_channels=channels, sample_size=size)
        config["num_class_embeds"] = None if data.classes is None else len(data.classes) + has_no_class
        try:
            unet = UNet2DModel.from_config(config)
        except (ValueError, TypeError, AttributeError) as error:
            raise UsageError(f"--model_config_name_or_path: not a config of UNet2DModel: {error}") from error
    if unet.config.class_embed_type is not None:
        flag = "pretrained_model" if given.unet is not None else "model_config"
        raise UsageError(
            f"--{flag}_name_or_path: class_embed_type {unet.config.class_embed_type!r} is not supported: remove it"
            " from the config; --class_conditional trains with class labels"
        )
    halvings = len(unet.config.block_out_channels) - 1
    reason = f"the network halves the resolution {halvings} time{'s' if halvings != 1 else ''}"
    check_sides(2**halvings, data, reason, "; or name a shallower network by --model_config_name_or_path")
    return _prepared(unet, machine)


def _prepared(unet, machine: MachineSettings):
    if machine.enable_xformers_memory_efficient_attention:
        try:
            unet.enable_xformers_memory_efficient_attention()
        except (ImportError, ValueError) as error:
            raise UsageError(f"--enable_xformers_memory_efficient_attention: {error}") from error
    if machine.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet


def new_unet_config(resolution: int, is_large: bool = False) -> dict:
    """Returns a UNet2DModel config for a resolution, with attention at the second coarsest level and 64-channel heads.

    Up to 64 pixels, the network is small enough for a CPU. From 65 pixels on, the channels are those of diffusers'
    training script; the large network has them from 64 pixels on.

    Args:
        resolution: the side of the images.
        is_large: whether to return the network of --model_config_name_or_path large.
    """
    if resolution <= 16:
        channels, layers = (32, 64), 1
    elif resolution <= _SMALL and not is_large:
        channels, layers = (32, 64, 128) if resolution <= 32 else (32, 64, 128, 256), 1
    elif resolution <= 32:
        channels, layers = (64, 128, 128), 2
    elif resolution < 64:
        channels, layers = (128, 128, 256, 256), 2
    else:
        channels, layers = (128, 128, 256, 256, 512, 512), 2
    levels = len(channels)
    attention = max(levels - 2, 1)
    return {
        "layers_per_block": layers,
        "block_out_channels": channels,
        "down_block_types": tuple(
            "AttnDownBlock2D" if level == attention else "DownBlock2D" for level in range(levels)
        ),
        "up_block_types": tuple(
            "AttnUpBlock2D" if level == attention else "UpBlock2D" for level in reversed(range(levels))
        ),
        "attention_head_dim": 64,
    }


def learning_rate_of(given: GivenModel, data: TrainingData) -> float:
    """Returns the default learning rate: 1e-4, as in diffusers' training script, but 1e-3 for a small new network.

    Adam's rate for a network of few channels may be larger. After the 1,000 steps of README's second example, the
    denoising loss is 2.4 times as large with 1e-4 (docs/benchmarks/learning_rate.txt).

    Args:
        given: the model to start from.
        data: the data of the training.
    """
    is_new = given.unet is None and given.config is None and not given.is_large
    return 1e-3 if is_new and min(data.shape[1:]) <= _SMALL else 1e-4


def _given_unet(path: str, cache_dir: str | None, subfolder: str = "") -> UNet2DModel:
    check_weights(Path(path, subfolder))
    return UNet2DModel.from_pretrained(path, subfolder=subfolder, cache_dir=cache_dir, use_safetensors=True)


def _given_normalization(index: dict) -> Normalization | None:
    saved = saved_normalization(index)
    if saved is None:
        return None
    offset, scale = (tuple(map(float, saved[name])) for name in ("offset", "scale"))
    if not (all(map(math.isfinite, offset + scale)) and all(number > 0 for number in scale)):
        raise ValueError("model_index.json: the normalization must be finite, with a scale above 0")
    return Normalization(offset, scale)
