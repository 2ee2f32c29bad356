"""Sampling from an unconditional or class-conditional UNet2DModel.

`RegDDPMPipeline` is diffusers' `DDPMPipeline` with every scheduler, class labels, a score of each sample under each
regularizer, and fields that are not pictures. Both pipelines load what either has saved: on disk the class is named
"DDPMPipeline", and what only this one understands is kept under a private key of model_index.json.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .prediction import prediction_type
from .regularizers import Regularizer, regularizer_name, score

__all__ = ["RegDDPMPipeline", "RegDDPMPipelineOutput", "fast_scheduler"]

_PRIVATE_KEY = "_reg_diffusers"


def saved_normalization(config: dict) -> dict | None:
    """The normalization in the content of a model_index.json, if it has one."""
    return (config.get(_PRIVATE_KEY) or {}).get("normalization")


def fast_scheduler(scheduler) -> DDIMScheduler | FlowMatchEulerDiscreteScheduler:
    """A deterministic sampler for tens of steps, with the noise schedule and prediction type of `scheduler`.

    DDIM (Song et al. 2021, arXiv:2010.02502) with trailing timesteps; Euler's method for flow matching.
    """
    if prediction_type(scheduler) == "flow_prediction":
        return FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    return DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing")


@dataclass
class RegDDPMPipelineOutput(BaseOutput):
    """Samples with their scores.

    Attributes:
        images: a list of PIL images, an array (B, H, W, C) or a tensor (B, C, H, W), by `output_type`.
        scores: for every regularizer its value on each sample, (B,), by name.
    """

    images: list[PIL.Image.Image] | np.ndarray | Tensor
    scores: dict[str, Tensor]


class RegDDPMPipeline(DiffusionPipeline):
    """Generates images with a UNet2DModel and any diffusers scheduler.

        pipeline = RegDDPMPipeline.from_pretrained("folder or Hub id")
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        output = pipeline(batch_size=4, num_inference_steps=50, regularizers=[total_variation])
        output.images[0], output.scores["total_variation"]

    With the same scheduler, steps and generator the images are those of `DDPMPipeline`, bit for bit.

    Args:
        unet: the denoising network.
        scheduler: a diffusers scheduler whose prediction_type is the network's.
        normalization: for fields that are not pictures, {"offset": [C numbers], "scale": [C numbers]} with
            field = offset + scale * sample; None for pictures.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet, scheduler, normalization: dict | None = None):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(normalization=normalization)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 1000,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        regularizers: Sequence[Regularizer] | Mapping[str, Regularizer] = (),
        class_labels: Tensor | Sequence[int] | int | None = None,
        eta: float = 0.0,
    ) -> RegDDPMPipelineOutput | tuple:
        """Draws a batch of samples.

        Args:
            batch_size: number of samples.
            generator: source of randomness; a list of one per image makes each image independent of the batch.
            num_inference_steps: calls of the network.
            output_type: "pil"; "np" for an array (B, H, W, C); "pt" for a tensor (B, C, H, W). Pictures are in [0, 1];
                fields of a model with `normalization` are in their own units as "np" and "pt".
            return_dict: return a `RegDDPMPipelineOutput`; otherwise (images, scores).
            regularizers: losses to score the samples with, in [-1, 1] before clipping; a sequence, or by name.
            class_labels: (B,) or one for all, for a class-conditional network.
            eta: DDIM's eta, 0 deterministic to 1 ancestral; other schedulers have no use for it.

        Raises:
            ValueError: class labels missing, not wanted, out of range or of a wrong number; an unknown output_type, or
                one that cannot show the samples; a regularizer with `needs`, or two of one name.
        """
        config = self.unet.config
        if output_type not in ("pil", "np", "numpy", "pt"):
            raise ValueError(f"output_type must be 'pil', 'np' or 'pt', not {output_type!r}")
        if output_type == "pil" and config.out_channels not in (1, 3, 4):
            raise ValueError(f"a field of {config.out_channels} channels is no picture: use output_type='np' or 'pt'")
        regularizers = self._by_name(regularizers)
        size = config.sample_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        device = self._execution_device
        class_labels = self._class_labels(class_labels, batch_size)
        shape = (batch_size, config.in_channels, *size)
        sample = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        self.scheduler.set_timesteps(num_inference_steps)
        sample = sample * self.scheduler.init_noise_sigma if hasattr(self.scheduler, "init_noise_sigma") else sample
        step_kwargs = self._step_kwargs(generator, eta)
        for t in self.progress_bar(self.scheduler.timesteps):
            scale = getattr(self.scheduler, "scale_model_input", None)  # flow matching has none
            model_input = sample if scale is None else scale(sample, t)
            model_output = self.unet(model_input, t, class_labels=class_labels).sample
            sample = self.scheduler.step(model_output, t, sample, **step_kwargs).prev_sample
        scores = {name: score(regularizer, sample) for name, regularizer in regularizers.items()}
        images = self._images(sample, output_type)
        self.maybe_free_model_hooks()
        return RegDDPMPipelineOutput(images=images, scores=scores) if return_dict else (images, scores)

    def to_json_string(self) -> str:
        """model_index.json in a form that `DDPMPipeline` and `DiffusionPipeline` load without a warning."""
        config = json.loads(super().to_json_string())
        config["_class_name"] = DDPMPipeline.__name__
        config[_PRIVATE_KEY] = {"normalization": config.pop("normalization", None)}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> RegDDPMPipeline:
        """As in diffusers, for what this class or `DDPMPipeline` saved; `normalization` is restored."""
        folder_or_id = str(pretrained_model_name_or_path)
        hub_options = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision")
        config = cls.load_config(folder_or_id, **{name: kwargs[name] for name in hub_options if name in kwargs})
        kwargs.setdefault("normalization", saved_normalization(config))
        return super().from_pretrained(folder_or_id, **kwargs)

    @staticmethod
    def _by_name(regularizers) -> dict[str, Regularizer]:
        if not isinstance(regularizers, Mapping):
            names = [regularizer_name(regularizer) for regularizer in regularizers]
            if len(set(names)) < len(names):
                raise ValueError(f"regularizers need different names, got {names}: pass {{name: regularizer, ...}}")
            regularizers = dict(zip(names, regularizers, strict=True))
        for name, regularizer in regularizers.items():
            if needs := getattr(regularizer, "needs", ()):
                raise ValueError(f"{name} cannot score samples: it needs {', '.join(needs)}, which a sample has not")
        return dict(regularizers)

    def _class_labels(self, class_labels, batch_size: int) -> Tensor | None:
        classes = self.unet.config.num_class_embeds
        if classes is None:
            if class_labels is not None:
                raise ValueError("class_labels were given, but the network is not class-conditional")
            return None
        if class_labels is None:
            raise ValueError(f"the network is class-conditional: class_labels (0 to {classes - 1}) are needed")
        class_labels = torch.as_tensor(class_labels, device=self._execution_device).reshape(-1)
        if len(class_labels) not in (1, batch_size):
            raise ValueError(f"{len(class_labels)} class_labels for batch_size={batch_size}")
        if class_labels.min() < 0 or class_labels.max() >= classes:
            raise ValueError(f"class_labels must be 0 to {classes - 1}")
        return class_labels.expand(batch_size)

    def _step_kwargs(self, generator, eta: float) -> dict:
        accepted = inspect.signature(self.scheduler.step).parameters
        return {name: value for name, value in (("generator", generator), ("eta", eta)) if name in accepted}

    def _images(self, sample: Tensor, output_type: str):
        normalization = self.config.normalization
        if normalization is None or output_type == "pil":
            images = (sample / 2 + 0.5).clamp(0, 1)
        else:
            offset, scale = (
                torch.tensor(normalization[name], dtype=sample.dtype, device=sample.device).reshape(1, -1, 1, 1)
                for name in ("offset", "scale")
            )
            images = offset + scale * sample
        if output_type == "pt":
            return images
        images = images.float().cpu().permute(0, 2, 3, 1).numpy()
        return self.numpy_to_pil(images) if output_type == "pil" else images
