"""Draws the samples of given numbers, each from a random generator of its own."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor

from ..pipeline import RegDDPMPipeline
from ..samplers import fitting_samplers
from ..specs import load_regularizer
from ..term import Term
from .settings import Settings

__all__ = ["Sampler", "fingerprint"]


def fingerprint(pipeline: RegDDPMPipeline) -> str:
    """A hash of all that a pipeline brings to a sample: the network and its weights, the scheduler, the units."""
    digest = hashlib.sha256()
    configs = [_public(pipeline.unet.config), _public(pipeline.scheduler.config), pipeline.config.normalization]
    digest.update(json.dumps([type(pipeline.scheduler).__name__, *configs], sort_keys=True, default=str).encode())
    for name, tensor in sorted(pipeline.unet.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _public(config) -> dict:
    """Without where it was loaded from, and by which version."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


class Sampler:
    """Draws sample i of given settings: with the noise of seed + i, the class and the condition that are its turn.

    Args:
        pipeline: the model, on its device; its own scheduler is left alone.
        settings: what decides the samples.
        conditions: the conditioning images, each (K, H, W) in [-1, 1]; a tensor (N, K, H, W) will do.

    Attributes:
        settings: as given.
        is_field: whether the samples have units of their own.
        is_picture: whether they can be shown, by PNG for example.

    Raises:
        ValueError: settings that do not fit the model; the message begins with the name of the one that does not.
    """

    def __init__(self, pipeline: RegDDPMPipeline, settings: Settings, conditions: Sequence[Tensor] | None = None):
        samplers = fitting_samplers(pipeline)
        if settings.scheduler not in samplers:
            raise ValueError(f"scheduler {settings.scheduler}: this model can be sampled with {', '.join(samplers)}")
        unet = _in_bfloat16(pipeline.unet) if settings.mixed_precision == "bf16" else pipeline.unet
        normalization = pipeline.config.normalization
        self._pipeline = RegDDPMPipeline(unet, samplers[settings.scheduler](), normalization)
        self._pipeline.set_progress_bar_config(disable=True)
        self._conditions = conditions
        self.settings = settings
        self.is_field = normalization is not None
        self._channels = self._pipeline._channels
        self.is_picture = not self.is_field and self._channels in (1, 3, 4)
        self._check_steps()
        self._check_class_labels()
        self._check_condition()
        self._guidance = [self._term(spec) for spec in settings.guidance]

    def draw(self, indices: Sequence[int], after_step: Callable | None = None) -> Tensor:
        """The samples of these numbers, (B, C, H, W) float32 on the CPU: pictures in [0, 1], fields in their units.

        Args:
            indices: the numbers, from 0.
            after_step: `callback_on_step_end` of the pipeline.
        """
        settings = self.settings
        labels, conditions = settings.class_labels, self._conditions
        condition = None if conditions is None else torch.stack([conditions[i % len(conditions)] for i in indices])
        images = self._pipeline(
            len(indices),
            [torch.Generator().manual_seed(settings.seed + index) for index in indices],
            settings.num_inference_steps,
            "pt",
            class_labels=[labels[index % len(labels)] for index in indices] if labels else None,
            condition=condition,
            guidance=self._guidance,
            guidance_scale=settings.guidance_scale,
            guidance_method=settings.guidance_method,
            callback_on_step_end=after_step,
        ).images
        return images.float().cpu()

    def _term(self, spec: str) -> Term:
        try:
            regularizer = load_regularizer(spec)
        except ValueError as error:
            raise ValueError(f"guidance: {error}") from error
        has = {"class_labels": bool(self.settings.class_labels), "condition": self._conditions is not None}
        if missing := [need for need in getattr(regularizer, "needs", ()) if not has.get(need)]:
            raise ValueError(f"guidance {spec} needs {', '.join(missing)}, which a sample of this model has not")
        return Term(regularizer, 1.0, name=spec)

    def _check_steps(self) -> None:
        steps = self.settings.num_inference_steps
        try:
            self._pipeline.scheduler.set_timesteps(steps)
        except ValueError as error:
            raise ValueError(f"num_inference_steps {steps}: {' '.join(str(error).split())}") from error

    def _check_class_labels(self) -> None:
        classes, labels = self._pipeline.unet.config.num_class_embeds, self.settings.class_labels
        if classes is None and labels:
            raise ValueError("class_labels are given, but the model has no classes")
        if classes is not None and not labels:
            raise ValueError("class_labels are missing, and the model is class-conditional")
        if classes is not None and not 0 <= min(labels) <= max(labels) < classes:
            raise ValueError(f"class_labels must be from 0 to {classes - 1}, the classes of the model")

    def _check_condition(self) -> None:
        channels = self._pipeline.unet.config.in_channels - self._channels
        if channels and self._conditions is None:
            raise ValueError(f"condition is missing, and the model is conditioned by images of {channels} channels")
        if not channels and self._conditions is not None:
            raise ValueError("condition is given, but the model is not conditioned by images")


def _in_bfloat16(unet):
    """The same network, weights shared, computing in bfloat16 inside and returning float32.

    Schedulers take the type of the network's output over into the sample, so that it must not be a short one.
    """
    unet = copy.copy(unet)
    unet.forward = convert_outputs_to_fp32(torch.autocast(unet.device.type, torch.bfloat16)(unet.forward))
    return unet
