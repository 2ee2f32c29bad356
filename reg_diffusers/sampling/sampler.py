"""Draws samples by index, each from its own random generator."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from accelerate.utils import convert_to_fp32
from diffusers import UNet2DModel
from diffusers.utils import logging
from torch import Tensor, nn

from ..pipeline import RegDDPMPipeline
from ..settings.size import sides
from ..specs import load_regularizer
from ..term import Term, needs_of
from ..views import Affine
from .inference_steps import available_steps
from .schedulers import fitting_samplers
from .settings import SampleSettings

__all__ = ["Sampler", "add_tensors", "add_weights", "model_sha256"]

_logger = logging.get_logger(__name__)


def model_sha256(pipeline: RegDDPMPipeline) -> str:
    """Returns a hash of everything in a pipeline that affects samples: network, weights, scheduler, units."""
    digest = hashlib.sha256()
    configs = [_public(pipeline.unet.config), _public(pipeline.scheduler.config), pipeline.config.normalization]
    if normalization := pipeline.config.normalization:
        units = Affine(normalization["scale"], normalization["offset"])
        dtype = units(torch.zeros(1, len(units.scale), 1, 1)).dtype
        configs += [str(dtype)] if dtype != torch.float32 else []  # earlier versions rounded them to float32
    digest.update(json.dumps([type(pipeline.scheduler).__name__, *configs], sort_keys=True, default=str).encode())
    if pipeline.config.white:
        digest.update(str(pipeline.config.white).encode())
    add_weights(digest, pipeline.unet)
    digest.update(pipeline.conditions_sha256.encode())
    if pipeline.vqvae is not None:
        digest.update(json.dumps(_public(pipeline.vqvae.config), sort_keys=True, default=str).encode())
        add_weights(digest, pipeline.vqvae)
    return digest.hexdigest()


def add_weights(digest, network: nn.Module) -> None:
    """Adds the names, types and values of all weights to a hash."""
    add_tensors(digest, network.state_dict())


def add_tensors(digest, tensors: Mapping[str, Tensor]) -> None:
    """Adds the names, types and values of tensors to a hash."""
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _public(config) -> dict:
    """Removes private entries of a config, such as the path and version it was loaded with."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


class Sampler:
    """Draws samples by index: sample i has the noise of seed + i and cycles through class labels and conditions.

    Args:
        pipeline: the model, on its device; its own scheduler is not changed.
        settings: the settings of the samples.
        conditions: the conditioning images, each (K, H, W) in [-1, 1], as a sequence or a tensor (N, K, H, W).

    Attributes:
        settings: the settings, with the steps limited to the number of noise levels of the schedule.
        is_field: whether samples are arrays in physical units or in those of the network, not images.
        is_picture: whether samples can be saved as image files, such as PNG.
        white: the stored value of white of such images.

    Raises:
        ValueError: if a setting does not fit the model; the message begins with the name of the setting.
    """

    def __init__(
        self, pipeline: RegDDPMPipeline, settings: SampleSettings, conditions: Sequence[Tensor] | None = None
    ):
        samplers = fitting_samplers(pipeline)
        if settings.scheduler not in samplers:
            raise ValueError(f"scheduler {settings.scheduler}: this model can be sampled with {', '.join(samplers)}")
        steps = available_steps(pipeline.scheduler, settings.num_inference_steps, _logger.warning)
        settings = replace(settings, num_inference_steps=steps)
        unet = _InBfloat16(pipeline.unet) if settings.mixed_precision == "bf16" else pipeline.unet
        normalization = pipeline.config.normalization
        self._pipeline = pipeline.with_parts(unet=unet, scheduler=samplers[settings.scheduler]())
        self._pipeline.set_progress_bar_config(disable=True)
        self._conditions = conditions
        self.settings = settings
        self.is_field = normalization is not None or settings.output_type == "latent"
        self.is_picture = not self.is_field and self._pipeline.image_shape[0] in (1, 3, 4)
        self.white = pipeline.config.white or 255
        self._check_size()
        self._check_steps()
        self._check_class_labels()
        self._check_condition()
        self._check_prompts_and_guidance_scale()
        self._guidance = [self._term(spec) for spec in settings.guidance]

    @property
    def typical_batch(self) -> int:
        """A number of samples that usually fits into memory at a time."""
        return self._pipeline.typical_batch

    def draw(self, indices: Sequence[int], after_step: Callable | None = None) -> Tensor:
        """Draws the samples with these indices, (B, C, H, W) on the CPU, in the units of `settings.output_type`.

        With "latent", they are neither clipped nor converted to units, but decoded if the model has an autoencoder.

        They are float32, or float64 if float32 would round away the offset of a field.

        Args:
            indices: the indices, from 0.
            after_step: `callback_on_step_end` of the pipeline.
        """
        settings = self.settings
        images = self._pipeline(
            len(indices),
            [torch.Generator().manual_seed(settings.seed + index) for index in indices],
            settings.num_inference_steps,
            settings.output_type,
            **self._size,
            **self._conditions_of(indices),
            guidance_scale=settings.guidance_scale,
            guidance=self._guidance,
            regularizer_scale=settings.regularizer_scale,
            guidance_method=settings.guidance_method,
            callback_on_step_end=after_step,
        ).images
        if settings.output_type == "latent":
            images = self._pipeline.decode(images)
        return images.to(torch.promote_types(images.dtype, torch.float32)).cpu()

    def seconds_per_step(self, indices: Sequence[int]) -> float:
        """Times one of the first steps of a batch with these indices, after a warm-up."""
        times = [time.perf_counter()]

        def note(pipeline, index: int, timestep, tensors: dict) -> None:
            times.append(time.perf_counter())
            if index == 1:
                raise _EnoughStepsError

        with contextlib.suppress(_EnoughStepsError):
            self.draw(indices, note)
        return times[-1] - times[-2]

    def _conditions_of(self, indices: Sequence[int]) -> dict[str, Tensor | list[str] | str]:
        """What the samples of these numbers are conditioned on, by argument of the pipeline; what is given in turn."""
        labels, images, prompts = self.settings.class_labels, self._conditions, self.settings.prompts
        found = {}
        if prompts:
            found["prompt"] = [prompts[index % len(prompts)] for index in indices]
        if self.settings.negative_prompt is not None:
            found["negative_prompt"] = self.settings.negative_prompt
        if labels:
            found["class_labels"] = torch.tensor([labels[index % len(labels)] for index in indices])
        if images is not None:
            found["condition"] = torch.stack([images[index % len(images)] for index in indices])
        return found

    def _term(self, spec: str) -> Term:
        try:
            regularizer = load_regularizer(spec)
        except ValueError as error:
            raise ValueError(f"guidance: {error}") from error
        given = self._conditions_of([0])
        if missing := [need for need in needs_of(regularizer) if need not in given]:
            raise ValueError(f"guidance {spec} needs {', '.join(missing)}, which samples of this model lack")
        is_in_model_units = self._pipeline.config.normalization and self.settings.reg_units == "model"
        return Term(regularizer, 1.0, name=spec, view=Affine(1.0) if is_in_model_units else None)

    @property
    def _size(self) -> dict[str, int]:
        size = self.settings.size
        return {} if size is None else dict(zip(("height", "width"), sides(size), strict=True))

    def _check_size(self) -> None:
        try:
            self._pipeline._size_of(**self._size)
        except ValueError as error:
            raise ValueError(f"size {self.settings.size}: {error}") from error

    def _check_steps(self) -> None:
        steps = self.settings.num_inference_steps
        try:
            self._pipeline.set_timesteps(steps)
        except ValueError as error:
            raise ValueError(f"num_inference_steps {steps}: {' '.join(str(error).split())}") from error

    def _check_class_labels(self) -> None:
        classes, labels = self._pipeline.num_classes, self.settings.class_labels
        if classes is None and labels:
            raise ValueError("class_labels are given, but the model has no classes")
        if classes is not None and not labels:
            raise ValueError("class_labels are missing, but the model is class-conditional")
        if classes is not None and not 0 <= min(labels) <= max(labels) < classes:
            raise ValueError(f"class_labels must be from 0 to {classes - 1}, the last class of the model")

    def _check_condition(self) -> None:
        channels = self._pipeline.condition_channels
        if channels and self._conditions is None:
            raise ValueError(f"condition is missing, but the model is conditioned on images of {channels} channels")
        if not channels and self._conditions is not None:
            raise ValueError("condition is given, but the model is not conditioned on images")

    def _check_prompts_and_guidance_scale(self) -> None:
        settings, pipeline = self.settings, self._pipeline
        if settings.prompts and not pipeline.takes_prompts:
            raise ValueError("prompts are given, but the model is not conditioned on texts")
        if pipeline.takes_prompts and not settings.prompts:
            raise ValueError("prompts are missing, but the model is conditioned on texts: give one or more")
        if settings.guidance_scale is not None or settings.negative_prompt is not None:
            pipeline._contexts(1, settings.guidance_scale, **self._conditions_of([0]))


class _EnoughStepsError(Exception):
    """Ends a timed batch."""


class _InBfloat16(nn.Module):
    """Wraps a network to compute in bfloat16 and return float32; the weights keep their dtype.

    Schedulers convert the sample to the dtype of the network's output, so the output must be float32.
    """

    def __init__(self, unet: UNet2DModel):
        super().__init__()
        self.unet = unet
        self.config = unet.config

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def device(self) -> torch.device:
        return self.unet.device

    def forward(self, *args, **kwargs):
        with torch.autocast(self.device.type, torch.bfloat16):
            output = self.unet(*args, **kwargs)
        return convert_to_fp32(output)
