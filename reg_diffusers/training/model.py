"""The network and the noise scheduler of a training run, new or given."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, UNet2DModel

from ..attention import attention_bytes, prefers_explicit_attention
from ..model_index import check_weights, saved_normalization
from ..prediction import prediction_type, refuse_zero_terminal_snr
from .data import Normalization, TrainingData
from .errors import UsageError

__all__ = ["GivenModel", "build_noise_scheduler", "build_unet", "choose_attention", "load_given_model"]
__all__ += ["new_unet_config"]


@dataclass(frozen=True)
class GivenModel:
    """What a run starts from: all None for a new model with the default config.

    Attributes:
        unet: pretrained network.
        scheduler: the noise scheduler saved with it.
        config: config of a network to be trained from scratch.
        normalization: of the fields that the pipeline was trained on.
    """

    unet: UNet2DModel | None = None
    scheduler: DDPMScheduler | FlowMatchEulerDiscreteScheduler | None = None
    config: dict | None = None
    normalization: Normalization | None = None

    @property
    def channels(self) -> int | None:
        """Channels of its images, or None if it has no say."""
        return self._entry("out_channels")

    @property
    def condition_channels(self) -> int | None:
        """Input channels beside those of its images; None for a model that is yet to be made."""
        return None if self.unet is None else self.unet.config.in_channels - self.unet.config.out_channels

    @property
    def resolution(self) -> int | None:
        """Side of its square images, or None if it has no say."""
        size = self._entry("sample_size")
        return size if isinstance(size, int) else None

    def _entry(self, name: str):
        config = self.unet.config if self.unet is not None else self.config
        return None if config is None else config.get(name)


def load_given_model(args: argparse.Namespace) -> GivenModel:
    """The model that --pretrained_model_name_or_path or --model_config_name_or_path names.

    Raises:
        UsageError: nothing of the kind is there.
    """
    path, cache_dir = args.pretrained_model_name_or_path, args.cache_dir
    try:
        if path is not None:
            if not _is_pipeline(path, cache_dir):
                return GivenModel(unet=_given_unet(path, cache_dir))
            return GivenModel(
                unet=_given_unet(path, cache_dir, subfolder="unet"),
                scheduler=_given_scheduler(path, cache_dir),
                normalization=_given_normalization(path, cache_dir),
            )
        path = args.model_config_name_or_path
        if path is not None and Path(path).is_file():
            config = json.loads(Path(path).read_text())
            if not isinstance(config, dict):
                raise ValueError("it holds no settings")
            return GivenModel(config=config)
        if path is not None:
            return GivenModel(config=dict(UNet2DModel.load_config(path, cache_dir=cache_dir)))
    except Exception as error:  # any kind, for the files are anybody's
        is_pretrained = args.pretrained_model_name_or_path is not None
        flag = "--pretrained_model_name_or_path" if is_pretrained else "--model_config_name_or_path"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"{flag} {path}: no UNet2DModel there that can be read: {reason}") from error
    return GivenModel()


def build_noise_scheduler(args: argparse.Namespace, given: GivenModel):
    """The scheduler of the training: the given pipeline's schedule, else one by flags.

    Raises:
        UsageError: --prediction_type contradicts the given pipeline.
    """
    if given.scheduler is not None:
        kind = prediction_type(given.scheduler)
        if args.prediction_type not in (None, kind):
            raise UsageError(
                f"--prediction_type {args.prediction_type}: the given pipeline was trained with {kind}; drop the flag"
            )
        for flag in ("ddpm_num_steps", "ddpm_beta_schedule", "rescale_betas_zero_snr"):
            if getattr(args, flag):
                raise UsageError(f"--{flag}: the given pipeline keeps its own noise schedule; drop the flag")
        if kind == "epsilon":
            try:
                refuse_zero_terminal_snr(given.scheduler)
            except ValueError as error:
                raise UsageError(f"--pretrained_model_name_or_path: {error}") from None
        return given.scheduler
    steps = args.ddpm_num_steps or 1000
    if args.prediction_type == "flow_prediction":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=steps)
    return DDPMScheduler(
        num_train_timesteps=steps,
        beta_schedule=args.ddpm_beta_schedule or "linear",
        prediction_type=args.prediction_type or "epsilon",
        rescale_betas_zero_snr=args.rescale_betas_zero_snr,
        timestep_spacing="trailing" if args.rescale_betas_zero_snr else "leading",
    )


def build_unet(args: argparse.Namespace, given: GivenModel, data: TrainingData) -> UNet2DModel:
    """The network: the given one, or a new one for the shape of the data.

    Raises:
        UsageError: the data do not fit the network.
    """
    channels, height, width = data.shape
    size = height if height == width else (height, width)
    if given.unet is not None:
        unet = given.unet
        _check_classes(unet.config.num_class_embeds, data)
        unet.register_to_config(sample_size=size)  # it samples at the size it was last trained at
    else:
        config = dict(given.config) if given.config is not None else new_unet_config(min(height, width))
        config.update(in_channels=channels + data.condition_channels, out_channels=channels, sample_size=size)
        config["num_class_embeds"] = None if data.classes is None else len(data.classes)
        try:
            unet = UNet2DModel.from_config(config)
        except (ValueError, TypeError, AttributeError) as error:
            raise UsageError(f"--model_config_name_or_path: not a config of UNet2DModel: {error}") from error
    _check_halving(unet, height, width)
    if args.enable_xformers_memory_efficient_attention:
        try:
            unet.enable_xformers_memory_efficient_attention()
        except (ImportError, ValueError) as error:
            raise UsageError(f"--enable_xformers_memory_efficient_attention: {error}") from error
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet


def choose_attention(
    args: argparse.Namespace, unet: UNet2DModel, device: torch.device, mixed_precision: str
) -> tuple[str, str]:
    """ "explicit" or "sdpa", and why, in a few words; by a rule, so that a run goes on as it began.

    Args:
        args: the settings.
        unet: the network, of `build_unet`.
        device: that is trained on.
        mixed_precision: of the training.

    Raises:
        UsageError: --attention and xformers' attention, which exclude each other.
    """
    if args.enable_xformers_memory_efficient_attention:
        if args.attention is not None:
            raise UsageError("--enable_xformers_memory_efficient_attention and --attention exclude each other")
        return "sdpa", "xformers in its place"
    if args.attention is not None:
        return args.attention, "as asked"
    if prefers_explicit_attention(unet, args.train_batch_size, device.type, mixed_precision):
        return "explicit", "faster in bf16 on a CPU"
    if device.type != "cpu" or mixed_precision != "bf16":
        return "sdpa", "PyTorch's own"
    return "sdpa", f"explicit would keep {attention_bytes(unet, args.train_batch_size) / 2**20:.0f} MB a layer"


def new_unet_config(resolution: int) -> dict:
    """A UNet2DModel config for images of a size: attention at the coarsest but one level, heads of 64 channels.

    Up to 16 pixels it is small enough for a CPU; from 64 on the channels are those of diffusers' training script.
    """
    if resolution <= 16:
        channels, layers = (32, 64), 1
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


def _is_pipeline(path: str, cache_dir: str | None) -> bool:
    if Path(path).is_dir():
        return (Path(path) / "model_index.json").is_file()
    try:
        DiffusionPipeline.load_config(path, cache_dir=cache_dir)
    except OSError:
        return False
    return True


def _given_unet(path: str, cache_dir: str | None, subfolder: str = "") -> UNet2DModel:
    check_weights(Path(path, subfolder))
    return UNet2DModel.from_pretrained(path, subfolder=subfolder, cache_dir=cache_dir, use_safetensors=True)


def _given_scheduler(path: str, cache_dir: str | None):
    """The saved schedule as one to train with: a pipeline may have been saved with any sampler."""
    config = DDPMScheduler.load_config(path, subfolder="scheduler", cache_dir=cache_dir)
    if "prediction_type" not in config and "shift" in config:
        return FlowMatchEulerDiscreteScheduler.from_config(config)
    return DDPMScheduler.from_config(config)


def _given_normalization(path: str, cache_dir: str | None) -> Normalization | None:
    saved = saved_normalization(DiffusionPipeline.load_config(path, cache_dir=cache_dir))
    if saved is None:
        return None
    offset, scale = (tuple(map(float, saved[name])) for name in ("offset", "scale"))
    if not (all(map(math.isfinite, offset + scale)) and all(number > 0 for number in scale)):
        raise ValueError("model_index.json: its normalization must be finite, its scale above 0")
    return Normalization(offset, scale)


def _check_classes(classes: int | None, data: TrainingData) -> None:
    wanted = None if data.classes is None else len(data.classes)
    if classes != wanted:
        fix = "pass --class_conditional with data of as many classes" if classes else "drop --class_conditional"
        raise UsageError(f"the given model has {classes or 'no'} classes, the data {wanted or 'none'}: {fix}")


def _check_halving(unet: UNet2DModel, height: int, width: int) -> None:
    factor = 2 ** (len(unet.config.block_out_channels) - 1)
    if height % factor or width % factor:
        side = height if height % factor else width
        below, above = max(side // factor, 1) * factor, -(-side // factor) * factor
        near = f"{below} or {above}" if below != above else f"{above}"
        size = f"--resolution {height}" if height == width else f"fields of {height} x {width}"
        raise UsageError(
            f"{size}: the network halves its images {factor.bit_length() - 1} times, so the sides must be multiples of"
            f" {factor}, such as {near}; or give a shallower network by --model_config_name_or_path"
        )
