"""Sampling from a UNet2DModel: unconditional, by class or by image.

`RegDDPMPipeline` extends diffusers' `DDPMPipeline` to every scheduler, conditions, guidance by losses on x0_hat,
scores of the samples, latents, and fields that are not pictures. Each of the two loads models saved by the other. On
disk the class is named "DDPMPipeline", or "LDMPipeline" with an autoencoder; other entries are under a private key of
model_index.json.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin, UNet2DModel
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .guidance import Guidance
from .hub.model_index import as_saved, check_components, check_saved_schedule, check_weights, own_entries
from .hub.repository import upload_pipeline
from .prediction import output_for_step, predict_original_sample
from .regularizers.contract import Regularizer
from .sampling.call_inputs import (
    at_least_one,
    by_name,
    check_needs,
    check_output_type,
    checked_generator,
)
from .sampling.class_names import check_class_names
from .sampling.conditioned_network import ConditionedNetwork
from .sampling.fast_scheduler import fast_scheduler
from .sampling.image_space import ImageSpace
from .sampling.inference_steps import available_steps
from .sampling.pipeline_output import RegDDPMPipelineOutput, rendered
from .sampling.step_callback import CALLBACK_TENSORS, StepCallback
from .standalone import standalone_source
from .term import Term, score

__all__ = ["RegDDPMPipeline", "RegDDPMPipelineOutput", "fast_scheduler"]

_logger = logging.get_logger(__name__)


class RegDDPMPipeline(ImageSpace, ConditionedNetwork, DiffusionPipeline):
    """Generates images with a UNet2DModel and any diffusers scheduler.

        pipeline = RegDDPMPipeline.from_pretrained("folder or Hub id")
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        output = pipeline(batch_size=4, num_inference_steps=50, regularizers=[total_variation])
        output.images[0], output.scores["total_variation"]

    With the same scheduler, steps and generator, the images equal those of `DDPMPipeline` bit for bit, and in latents
    those of `LDMPipeline` up to rounding. Losses see images: latents are decoded for scores and guidance.

    Args:
        unet: the denoising network; input channels in addition to those of its images are for a `condition`.
        scheduler: a diffusers scheduler with the prediction_type of the network.
        normalization: for fields that are not pictures, {"offset": [C numbers], "scale": [C numbers]} with field =
            offset + scale * sample; None for pictures.
        vqvae: the autoencoder of a network for latents, such as an AutoencoderKL, named as in `LDMPipeline`; None for
            a network for images. It is frozen.
        class_names: name of each class of a class-conditional network, in the order of its labels. If the network has
            one class embedding more than names, the last one stands for no class, for classifier-free guidance.
        white: for pictures of more than 8 bits, the stored value of white, such as 65535: the depth in which
            `reg-diffusers sample` writes them. The samples here are in [0, 1] as for all pictures, and "pil" has 8
            bits.
    """

    model_cpu_offload_seq = "unet->vqvae"
    _optional_components: ClassVar[list[str]] = ["vqvae"]
    _callback_tensor_inputs = CALLBACK_TENSORS

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: SchedulerMixin,
        normalization: dict | None = None,
        vqvae: ModelMixin | None = None,
        class_names: list[str] | None = None,
        white: int | None = None,
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vqvae=vqvae)
        self.register_to_config(normalization=normalization, class_names=class_names, white=white)
        if class_names is not None:
            check_class_names(class_names, self._class_embeddings)
        self._interrupt = False
        self._num_timesteps = 0

    @property
    def interrupt(self) -> bool:
        """Whether the call ends after the current step: a callback may set `pipeline._interrupt = True`."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the current call, or of the last one."""
        return self._num_timesteps

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 1000,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        height: int | None = None,
        width: int | None = None,
        regularizers: Sequence[Regularizer] | Mapping[str, Regularizer] = (),
        class_labels: Tensor | Sequence[int | str] | int | str | None = None,
        condition: Tensor | None = None,
        guidance_scale: float | None = None,
        eta: float = 0.0,
        guidance: Sequence[Term | Regularizer] = (),
        regularizer_scale: float = 1.0,
        guidance_method: str = "mpgd",
        guidance_samples: int = 8,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_x0_hat: bool = False,
        **kwargs,
    ) -> RegDDPMPipelineOutput | tuple:
        """Draws a batch of samples.

        Args:
            batch_size: number of samples.
            generator: random generator; with a list of one per image, each image is independent of the batch.
            num_inference_steps: number of network calls; reduced, with a log message, to the number of noise levels.
            output_type: "pil"; "np" for an array (B, H, W, C); "pt" for a tensor (B, C, H, W); "latent" for the tensor
                (B, C, H, W) after the last step, not clipped, not decoded and without units. Pictures are in [0, 1] as
                "np" and "pt". Fields of a model with `normalization` are in their own units, see `views.Affine`.
            return_dict: return a `RegDDPMPipelineOutput`; otherwise (images, scores), and x0_hat with `return_x0_hat`.
            height: height of the images in pixels; by default, that of the training. Networks trained on buckets suit
                several sizes.
            width: width of the images, likewise.
            regularizers: sequence or dictionary of losses that score the samples before clipping (fields: own units).
            class_labels: (B,) or one for all, as numbers or `class_names`, for a class-conditional network.
            condition: (B, K, H, W) or (1, K, H, W) in [-1, 1], for a network with K additional input channels.
            guidance_scale: scale of classifier-free guidance, at least 0: 1, the default, is the network alone; more
                follows the class more closely at the cost of variety. It needs a network that was also trained without
                labels, and takes two network calls per step.
            eta: eta of DDIM, from 0 (deterministic) to 1 (ancestral); ignored by other schedulers.
            guidance: losses that steer the sampler, as `Term` with a weight and a weighting; see `guidance`. They see
                fields in their own units, which the weight refers to. A `Term` with its own view keeps it;
                `view=views.Affine(1.0)` selects the model's units.
            regularizer_scale: common factor of the guidance losses. With "mpgd" and 1, x0_hat moves, to first order,
                as training with the same terms would move that of a perfect network (with `matched`, up to SNR 99).
            guidance_method: "mpgd", without a gradient through the network; "dps", with it; "lgd", with it and
                averaged over noisy copies of x0_hat.
            guidance_samples: number of noisy copies for "lgd".
            callback_on_step_end: called as `callback(pipeline, step_index, timestep, tensors)` after each step, as in
                diffusers; "latents" in its result replace those of the step. To end the call after this step, it sets
                `pipeline._interrupt = True`. `pipeline.num_timesteps` is the number of steps.
            callback_on_step_end_tensor_inputs: tensors passed to it: latents (the sample after the step), model_output
                (after guidance), x0_hat.
            return_x0_hat: also return the predicted image of each step, after guidance, neither clipped nor decoded.
            **kwargs: rejected.

        Raises:
            ValueError: a number is out of range; the number of generators differs from batch_size; the size, class
                labels, a condition, a guidance_scale or texts do not suit the network; output_type is unknown or does
                not suit the samples; a regularizer needs an argument that is not available, or two have the same name;
                a tensor for the callback is unknown.
            TypeError: an argument is unknown.
        """
        batch_size = at_least_one("batch_size", batch_size)
        num_inference_steps = at_least_one("num_inference_steps", num_inference_steps)
        generator = checked_generator(generator, batch_size)
        check_output_type(output_type, self.image_shape[0])
        size, view = self._size_of(height, width), self._view
        steering = Guidance(guidance, regularizer_scale, guidance_method, guidance_samples, view)
        guidance_scale = self.default_guidance_scale if guidance_scale is None else guidance_scale
        context, without = self._contexts(
            batch_size, guidance_scale, size, class_labels=class_labels, condition=condition, **kwargs
        )
        regularizers = by_name(regularizers)
        check_needs([*regularizers.items(), *((term.name, term.regularizer) for term in steering.terms)], context)
        callback = StepCallback(callback_on_step_end, callback_on_step_end_tensor_inputs)

        shape = (batch_size, self._channels, *size)
        sample = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=self._sample_dtype)
        self.set_timesteps(available_steps(self.scheduler, num_inference_steps, _logger.warning), size)
        sample = sample * self.scheduler.init_noise_sigma if hasattr(self.scheduler, "init_noise_sigma") else sample
        step_kwargs = self._step_kwargs(generator, eta)
        wants_x0_hat = return_x0_hat or callback.wants("x0_hat")
        intermediate = []
        self._interrupt = False
        self._num_timesteps = len(self.scheduler.timesteps)
        for index, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            model = self._guided_network(t, context, without, guidance_scale)
            model_output = steering.model_output(
                model, self.scheduler, t, sample, generator=generator, context=context
            )
            x0_hat = predict_original_sample(self.scheduler, model_output, t, sample) if wants_x0_hat else None
            if return_x0_hat:
                intermediate.append(x0_hat.float().cpu())
            model_output = output_for_step(self.scheduler, model_output, sample)
            sample = self.scheduler.step(model_output, t, sample, **step_kwargs).prev_sample
            sample = callback.latents(self, index, t, latents=sample, model_output=model_output, x0_hat=x0_hat)
            if self.interrupt:
                break
        terms = {name: Term(regularizer, 1.0, view=view) for name, regularizer in regularizers.items()}
        scores = {name: score(term, sample, context) for name, term in terms.items()}
        shown = sample if output_type == "latent" else self.decode(sample)
        images = rendered(shown, output_type, self.config.normalization)
        self.maybe_free_model_hooks()
        trajectory = torch.stack(intermediate) if return_x0_hat else None
        if not return_dict:
            return (images, scores, trajectory) if return_x0_hat else (images, scores)
        return RegDDPMPipelineOutput(images=images, scores=scores, x0_hat=trajectory)

    def set_timesteps(self, steps: int, size: tuple[int, int] | None = None) -> None:
        """Sets the timesteps of the scheduler for a number of steps, and samples of a size that is not the usual."""
        self.scheduler.set_timesteps(steps)

    def with_parts(self, **parts) -> RegDDPMPipeline:
        """Returns a copy with other components, such as `scheduler=`; the remaining ones are shared."""
        other = copy.copy(self)
        other.register_modules(**parts)
        return other

    def to_json_string(self) -> str:
        """Returns model_index.json in a form that the pipelines of diffusers load."""
        return json.dumps(as_saved(json.loads(super().to_json_string())), indent=2, sort_keys=True) + "\n"

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """Saves the pipeline as in diffusers, with a pipeline.py to load this class without reg_diffusers.

        diffusers runs that file only with `custom_pipeline=` the folder or Hub id and `trust_remote_code=True`.

        Args:
            save_directory: the folder; created if necessary.
            safe_serialization: save as safetensors.
            variant: inserted in the names of the weight files, such as "fp16".
            max_shard_size: largest size of a weight file, such as "5GB".
            push_to_hub: then upload by `push_to_hub`, to `repo_id` or else the folder's name.
            **kwargs: `repo_id`, `commit_message`, `private`, `token`, `create_pr` for the upload.
        """
        self._save_files(Path(save_directory), safe_serialization, variant, max_shard_size)
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", None) or Path(save_directory).resolve().name
            self.push_to_hub(repo_id, safe_serialization=safe_serialization, variant=variant, **kwargs)

    def _save_files(self, folder: Path, *how) -> None:
        """Saves the pipeline to a folder; `how` are the arguments of `save_pretrained` of diffusers."""
        super().save_pretrained(str(folder), *how)
        (folder / "pipeline.py").write_text(standalone_source(), encoding="utf-8")

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
    ) -> str:
        """Uploads the pipeline with a model card, and the evidence of its training if it was loaded from a run.

        The owner's text in an existing card is kept outside the marks. If the weights differ from the loaded ones, no
        evidence is uploaded, and that in the repository is deleted.

        Args:
            repo_id: user/name, or a name of the token's user; created if necessary.
            commit_message: message of the commit.
            private: whether a new repository is private.
            token: Hub token. Default: the stored one.
            create_pr: open a pull request instead of committing.
            safe_serialization: save as safetensors.
            variant: inserted in the names of the weight files.
            subfolder: folder in the repository; if given, no card is uploaded.

        Returns:
            The URL of the commit.

        Raises:
            ValueError: `private` is True but the existing repository is public, the existing card cannot be read, a
                link leads out of the folder that the pipeline was loaded from, or the repository holds LoRA weights.
            HfHubHTTPError: there is no network, or no write access.
        """
        return upload_pipeline(
            lambda folder: self.save_pretrained(folder, safe_serialization, variant),
            self.name_or_path,
            repo_id,
            commit_message or "Upload RegDDPMPipeline",
            private,
            token,
            create_pr=create_pr,
            subfolder=subfolder,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> RegDDPMPipeline:
        """Loads a pipeline as in diffusers, but only from safetensors unless `use_safetensors=False` is passed.

        Raises:
            ValueError: the weights are pickled, the noise schedule requires tables of gigabytes, or model_index.json
                names a module that is not imported yet.
        """
        if kwargs.setdefault("use_safetensors", True) and Path(pretrained_model_name_or_path).is_dir():
            check_weights(Path(pretrained_model_name_or_path, "unet"))
        if "scheduler" not in kwargs:
            check_saved_schedule(pretrained_model_name_or_path, kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        """Reads the arguments of a saved pipeline as in diffusers, with those under the private key."""
        check_components(config_dict)
        return super().extract_init_dict({**config_dict, **own_entries(config_dict)}, **kwargs)

    def _step_kwargs(self, generator, eta: float) -> dict:
        accepted = inspect.signature(self.scheduler.step).parameters
        return {name: value for name, value in (("generator", generator), ("eta", eta)) if name in accepted}


# diffusers reads the components' classes from these annotations, and up to 0.35 does not resolve strings.
RegDDPMPipeline.__init__.__annotations__.update(
    unet=UNet2DModel, scheduler=SchedulerMixin, normalization=dict, vqvae=ModelMixin, class_names=list, white=int
)
