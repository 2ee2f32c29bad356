"""Sampling from a UNet2DModel: unconditional, by class or by image.

`RegDDPMPipeline` is diffusers' `DDPMPipeline` with every scheduler, conditions, guidance by losses on x0_hat, a score
of each sample under each regularizer, and fields that are not pictures. Both pipelines load what either has saved: on
disk the class is named "DDPMPipeline", and what only this one understands is kept under a private key of
model_index.json.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import PIL.Image
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import HfApi
from torch import Tensor

from .card import CARD_FILE, write_card
from .conditioning import with_condition
from .guidance import Guidance
from .model_index import as_saved, check_components, check_weights, saved_normalization
from .prediction import predict_original_sample, prediction_type
from .regularizers import Regularizer, regularizer_name, score
from .repository import STALE, fetch_evidence, open_repository, remote_card
from .standalone import standalone_source
from .term import Term

__all__ = ["RegDDPMPipeline", "RegDDPMPipelineOutput", "fast_scheduler"]


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
        x0_hat: (steps, B, C, H, W) float32 on the CPU, about [-1, 1]: the image that each step headed for, where it
            was asked for.
    """

    images: list[PIL.Image.Image] | np.ndarray | Tensor
    scores: dict[str, Tensor]
    x0_hat: Tensor | None = None


class RegDDPMPipeline(DiffusionPipeline):
    """Generates images with a UNet2DModel and any diffusers scheduler.

        pipeline = RegDDPMPipeline.from_pretrained("folder or Hub id")
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        output = pipeline(batch_size=4, num_inference_steps=50, regularizers=[total_variation])
        output.images[0], output.scores["total_variation"]

    With the same scheduler, steps and generator the images are those of `DDPMPipeline`, bit for bit.

    Args:
        unet: the denoising network; input channels beyond those of its images are for a `condition`.
        scheduler: a diffusers scheduler whose prediction_type is the network's.
        normalization: for fields that are not pictures, {"offset": [C numbers], "scale": [C numbers]} with
            field = offset + scale * sample; None for pictures.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ("sample", "model_output", "x0_hat")

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
        condition: Tensor | None = None,
        eta: float = 0.0,
        guidance: Sequence[Term | Regularizer] = (),
        guidance_scale: float = 1.0,
        guidance_method: str = "mpgd",
        guidance_samples: int = 8,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("sample",),
        return_x0_hat: bool = False,
    ) -> RegDDPMPipelineOutput | tuple:
        """Draws a batch of samples.

        Args:
            batch_size: number of samples.
            generator: source of randomness; a list of one per image makes each image independent of the batch.
            num_inference_steps: calls of the network.
            output_type: "pil"; "np" for an array (B, H, W, C); "pt" for a tensor (B, C, H, W). Pictures are in [0, 1];
                fields of a model with `normalization` are in their own units as "np" and "pt".
            return_dict: return a `RegDDPMPipelineOutput`; otherwise (images, scores), and x0_hat where asked for.
            regularizers: losses to score the samples with, in [-1, 1] before clipping; a sequence, or by name.
            class_labels: (B,) or one for all, for a class-conditional network.
            condition: (B, K, H, W) or (1, K, H, W) in [-1, 1], for a network with K channels beside the image's.
            eta: DDIM's eta, 0 deterministic to 1 ancestral; other schedulers have no use for it.
            guidance: losses that steer the sampler, as `Term` with a weight and a weighting; see `guidance`.
            guidance_scale: factor of them all; with "mpgd" and 1 x0_hat moves, to first order, as training with the
                same terms would move that of a perfect network (with `matched`, up to SNR 99).
            guidance_method: "mpgd", without a gradient through the network; "dps", through it; "lgd", through it and
                averaged over noisy copies of x0_hat.
            guidance_samples: noisy copies that "lgd" takes.
            callback_on_step_end: called as `callback(pipeline, step_index, timestep, tensors)` after each step, as in
                diffusers; what it returns replaces the tensors. Setting `pipeline._interrupt = True` in it ends here.
            callback_on_step_end_tensor_inputs: which tensors it gets: sample, model_output (after guidance), x0_hat.
            return_x0_hat: keep the image that each step headed for, after guidance and before clipping.

        Raises:
            ValueError: class labels or a condition missing, not wanted, out of range or of a wrong number; an unknown
                output_type, or one that cannot show the samples; a regularizer that needs what a sample has not, or
                two of one name; guidance out of range; an unknown tensor for the callback.
        """
        self._check_output_type(output_type)
        steering = Guidance(guidance, guidance_scale, guidance_method, guidance_samples)
        context = self._context(class_labels, condition, batch_size)
        regularizers = _by_name(regularizers)
        _check_needs([*regularizers.items(), *((term.name, term.regularizer) for term in steering.terms)], context)
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            known = ", ".join(self._callback_tensor_inputs)
            raise ValueError(f"callback_on_step_end_tensor_inputs: {', '.join(unknown)} not among {known}")

        size = self.unet.config.sample_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        shape = (batch_size, self._channels, *size)
        sample = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=self.unet.dtype)
        self.scheduler.set_timesteps(num_inference_steps)
        sample = sample * self.scheduler.init_noise_sigma if hasattr(self.scheduler, "init_noise_sigma") else sample
        step_kwargs = self._step_kwargs(generator, eta)
        wants_x0_hat = return_x0_hat or "x0_hat" in callback_on_step_end_tensor_inputs
        intermediate = []
        self._interrupt = False
        for index, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            model = self._network(t, **context)
            model_output = steering.model_output(
                model, self.scheduler, t, sample, generator=generator, context=context
            )
            x0_hat = predict_original_sample(self.scheduler, model_output, t, sample) if wants_x0_hat else None
            if return_x0_hat:
                intermediate.append(x0_hat.float().cpu())
            sample = self.scheduler.step(model_output, t, sample, **step_kwargs).prev_sample
            if callback_on_step_end is not None:
                tensors = {"sample": sample, "model_output": model_output, "x0_hat": x0_hat}
                tensors = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                sample = (callback_on_step_end(self, index, t, tensors) or {}).get("sample", sample)
            if self._interrupt:
                break
        scores = {
            name: score(regularizer, sample, **{need: context[need] for need in getattr(regularizer, "needs", ())})
            for name, regularizer in regularizers.items()
        }
        images = self._images(sample, output_type)
        self.maybe_free_model_hooks()
        trajectory = torch.stack(intermediate) if return_x0_hat else None
        if not return_dict:
            return (images, scores, trajectory) if return_x0_hat else (images, scores)
        return RegDDPMPipelineOutput(images=images, scores=scores, x0_hat=trajectory)

    def to_json_string(self) -> str:
        """model_index.json in a form that `DDPMPipeline` and `DiffusionPipeline` load without a warning."""
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
        """As in diffusers, with a pipeline.py that lets others load this class without reg_diffusers.

        They pass `custom_pipeline=` the folder or Hub id with `trust_remote_code=True` to
        `DiffusionPipeline.from_pretrained`; without these nothing ever runs that file.

        Args:
            save_directory: the folder, made if need be.
            safe_serialization: as safetensors.
            variant: inserted in the names of the weight files, such as "fp16".
            max_shard_size: largest size of a weight file, such as "5GB".
            push_to_hub: then upload by `push_to_hub`, to `repo_id` or else the folder's name.
            **kwargs: `repo_id`, `commit_message`, `private`, `token`, `create_pr` for the upload.
        """
        super().save_pretrained(str(save_directory), safe_serialization, variant, max_shard_size)
        Path(save_directory, "pipeline.py").write_text(standalone_source(), encoding="utf-8")
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", None) or Path(save_directory).resolve().name
            self.push_to_hub(repo_id, safe_serialization=safe_serialization, variant=variant, **kwargs)

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
        """Uploads the pipeline with a card, and with the evidence of its training where it was loaded from a run.

        The card of the repository keeps what its owner wrote outside of the marks. Where the weights are not those
        that were loaded there is no evidence on them, and what the repository has of it is deleted.

        Args:
            repo_id: user/name, or a name of the token's user; made if need be.
            commit_message: of the commit.
            private: whether a new repository is private.
            token: of the Hub; default: the stored one.
            create_pr: open a pull request instead of committing.
            safe_serialization: as safetensors.
            variant: inserted in the names of the weight files.
            subfolder: of the repository; then without a card.

        Returns:
            The URL of the commit.

        Raises:
            ValueError: `private`, but the repository is there and public; a card there that cannot be read.
            HfHubHTTPError: no network, or no right to write there.
        """
        api = HfApi(token=token)
        repo_id = open_repository(api, repo_id, private, write=not create_pr)
        with TemporaryDirectory() as temporary:
            folder = Path(temporary)
            self.save_pretrained(folder, safe_serialization, variant)
            if self.name_or_path:
                fetch_evidence(api, self.name_or_path, folder)
            if subfolder is None:
                write_card(folder, repo_id, remote_card(api, repo_id))
            else:
                (folder / CARD_FILE).unlink(missing_ok=True)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                path_in_repo=subfolder,
                commit_message=commit_message or "Upload RegDDPMPipeline",
                create_pr=create_pr,
                delete_patterns=list(STALE),
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> RegDDPMPipeline:
        """As in diffusers, but from safetensors alone, unless `use_safetensors=False` is passed.

        Raises:
            ValueError: the weights are pickled; or model_index.json names a module that is not imported yet.
        """
        if kwargs.setdefault("use_safetensors", True) and Path(pretrained_model_name_or_path).is_dir():
            check_weights(Path(pretrained_model_name_or_path, "unet"))
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        """As in diffusers, with the normalization taken out of the private key."""
        check_components(config_dict)
        return super().extract_init_dict({**config_dict, "normalization": saved_normalization(config_dict)}, **kwargs)

    @property
    def _channels(self) -> int:
        """Channels of the images: a network that learns the variance returns it in as many more."""
        learned = str(self.scheduler.config.get("variance_type")).startswith("learned")
        return self.unet.config.out_channels // 2 if learned else self.unet.config.out_channels

    def _context(self, class_labels, condition, batch_size: int) -> dict[str, Tensor]:
        """What the network is conditioned on, by name; also what regularizers may list in `needs`."""
        context = {
            "class_labels": self._class_labels(class_labels, batch_size),
            "condition": self._condition(condition, batch_size),
        }
        return {name: value for name, value in context.items() if value is not None}

    def _network(self, t, class_labels: Tensor | None = None, condition: Tensor | None = None) -> Callable:
        """The network at one timestep, as a function of the sample alone."""
        unet = with_condition(self.unet, condition)

        def network(sample: Tensor) -> Tensor:
            scale = getattr(self.scheduler, "scale_model_input", None)  # flow matching has none
            return unet(sample if scale is None else scale(sample, t), t, class_labels=class_labels).sample

        return network

    def _check_output_type(self, output_type: str) -> None:
        if output_type not in ("pil", "np", "numpy", "pt"):
            raise ValueError(f"output_type must be 'pil', 'np' or 'pt', not {output_type!r}")
        if output_type == "pil" and self._channels not in (1, 3, 4):
            raise ValueError(f"a field of {self._channels} channels is no picture: use output_type='np' or 'pt'")

    def _condition(self, condition: Tensor | None, batch_size: int) -> Tensor | None:
        channels = self.unet.config.in_channels - self._channels
        if channels == 0:
            if condition is not None:
                raise ValueError("a condition was given, but the network has no channels for one")
            return None
        if condition is None:
            raise ValueError(f"the network is conditioned by an image: a condition of {channels} channels is needed")
        if condition.ndim != 4 or condition.shape[1] != channels or len(condition) not in (1, batch_size):
            raise ValueError(
                f"condition must have shape ({batch_size}, {channels}, height, width), not {tuple(condition.shape)}"
            )
        return condition.to(self._execution_device).expand(batch_size, -1, -1, -1)

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


def _by_name(regularizers: Sequence[Regularizer] | Mapping[str, Regularizer]) -> dict[str, Regularizer]:
    if isinstance(regularizers, Mapping):
        return dict(regularizers)
    names = [regularizer_name(regularizer) for regularizer in regularizers]
    if len(set(names)) < len(names):
        raise ValueError(f"regularizers need different names, got {names}: pass {{name: regularizer, ...}}")
    return dict(zip(names, regularizers, strict=True))


def _check_needs(regularizers: Iterable[tuple[str, Regularizer]], context: dict) -> None:
    for name, regularizer in regularizers:
        if missing := [need for need in getattr(regularizer, "needs", ()) if need not in context]:
            raise ValueError(f"{name} needs {', '.join(missing)}, which a sample has not")
