"""A text-to-image pipeline of diffusers, sampled like a `RegDDPMPipeline`: with guidance by losses, scores, x0_hat."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..autoencoder import downsampling
from ..hub.lora_card import push_text_to_image
from ..sampling.call_inputs import refuse_keywords
from ..sampling.conditioned_network import checked_guidance_scale
from ..sampling.sampler import add_weights
from .families import FAMILIES, Embeddings, Family
from .latent_pipeline import LatentPipeline
from .lora import lora_file_arguments

__all__ = ["RegTextToImagePipeline", "text_encoder_sha256"]

_EMBEDDINGS_KEPT = 32
_SHIFTS, _PATCH = ("image_seq_len", "shift"), 2  # entries of the schedule; latents per token, along each axis


class RegTextToImagePipeline(LatentPipeline):
    """Generates images from texts, steered by losses on the decoded image.

        pipeline = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
        pipeline.load_lora_weights("reg-ddpm-model")
        regularized = RegTextToImagePipeline.of(pipeline)
        output = regularized(prompt="a cat", num_inference_steps=50, guidance=[Term(total_variation, 0.05)])

    The call is that of `RegDDPMPipeline`, with these arguments in the place of `class_labels` and `condition`:

        prompt: one text for all samples, or one for each.
        negative_prompt: what classifier-free guidance leads away from, likewise; by default no text, as in training
            with --condition_dropout.
        guidance_scale: scale of classifier-free guidance; by default that of the pipeline in diffusers.
        prompt_embeds, ...: embeddings by the names in that pipeline, (B, ...) each, in the place of `prompt`.

    Without guidance by losses, the images equal those of the pipeline in diffusers up to rounding, with the same
    scheduler, steps and generator. Schedulers take the timesteps of `set_timesteps`, for every family.
    """

    typical_batch = 1

    _family: Family
    _encoder: DiffusionPipeline | None = None
    _null: Embeddings | None = None
    _sides: tuple[int, int]
    _save: Callable[[str | Path], None] | None = None

    @classmethod
    def of(
        cls, pipeline: DiffusionPipeline, height: int | None = None, width: int | None = None
    ) -> RegTextToImagePipeline:
        """Wraps a pipeline of diffusers, such as StableDiffusionPipeline; the components are shared.

        Args:
            pipeline: the pipeline, with any LoRA weights.
            height: height of the images in pixels; by default that of the pipeline.
            width: width of the images.

        Raises:
            ValueError: pipelines of this class are not supported, or the size does not suit the network.
        """
        name = type(pipeline).__name__
        family = next((family for family in FAMILIES if family.pipeline == name), None)
        if family is None:
            known = ", ".join(family.pipeline for family in FAMILIES)
            raise ValueError(f"a {name} is not supported: use one of {known}")
        network, factor = getattr(pipeline, family.component), downsampling(pipeline.vae)
        side = factor * default_side(family, network)
        size, multiple = (height or side, width or side), factor * family.multiple(network.config)
        if any(length % multiple for length in size):
            raise ValueError(f"height {size[0]}, width {size[1]}: both must be multiples of {multiple}")
        return cls.assembled(family, network, pipeline.scheduler, pipeline.vae, size, encoder=pipeline)

    @classmethod
    def assembled(
        cls,
        family: Family,
        network: nn.Module,
        scheduler,
        vae: nn.Module,
        size: tuple[int, int],
        *,
        encoder: DiffusionPipeline | None = None,
        null: Embeddings | None = None,
        save: Callable[[str | Path], None] | None = None,
    ) -> RegTextToImagePipeline:
        """Builds one from its parts.

        Args:
            family: family of the pipeline.
            network: the network.
            scheduler: a scheduler of diffusers.
            vae: autoencoder.
            size: height and width of the images in pixels.
            encoder: pipeline that embeds texts; None: calls take embeddings.
            null: embedding of no text, (1, ...) by name; None: that of `encoder`.
            save: saves the whole pipeline to a folder; None: `save_pretrained` saves adapters.
        """
        built = cls(network, scheduler, vqvae=vae)
        built._family, built._sides, built._encoder, built._null = family, size, encoder, null
        built._save = save
        return built

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> RegTextToImagePipeline:
        """Loads a pipeline of diffusers, from safetensors only, and wraps it; see `of`."""
        return cls.of(DiffusionPipeline.from_pretrained(pretrained_model_name_or_path, use_safetensors=True, **kwargs))

    @property
    def default_guidance_scale(self) -> float:
        has_classifier_free = self._family.is_distilled is None
        return self._family.guidance_scale if has_classifier_free or self._is_distilled else 1.0

    @property
    def _is_distilled(self) -> bool:
        by_input = self._family.is_distilled
        return by_input is not None and by_input(self.unet.config)

    @property
    def takes_prompts(self) -> bool:
        return True

    @functools.cached_property
    def conditions_sha256(self) -> str:
        """Hash of the text encoders."""
        return "" if self._encoder is None else text_encoder_sha256(self._encoder, self._family)

    def embeddings(self, texts: Sequence[str]) -> Embeddings:
        """Returns the embeddings of texts, (n, ...) by name, on the device of the network."""
        embedded = [self._embedding(text) for text in texts]
        return {name: torch.cat([one[name] for one in embedded]) for name in embedded[0]}

    @functools.cached_property
    def _embedding(self) -> Callable[[str], Embeddings]:
        """Embeds one text; the latest ones are kept."""
        encoder, family = self._encoder, self._family
        return functools.lru_cache(_EMBEDDINGS_KEPT)(lambda text: family.embed(encoder, [text]))

    def as_in_loss(self) -> Callable:
        """Returns the network as a loss calls it, see `Family.as_called`."""
        return self._family.as_called(self.unet, self.unet.config, self._dtype, downsampling(self.vqvae))

    def to(self, *args, **kwargs) -> RegTextToImagePipeline:
        """Moves the network, the autoencoder and the text encoders."""
        if self._encoder is not None:
            self._encoder.to(*args, **kwargs)
        return super().to(*args, **kwargs)

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs) -> None:
        """Writes pytorch_lora_weights.safetensors, which `load_lora_weights` of the pipeline reads; nothing else.

        In a training of the whole network, writes the whole pipeline.

        Args:
            save_directory: the folder; created if necessary.
            push_to_hub: then upload by `push_to_hub`, to `repo_id` or else the folder's name.
            **kwargs: arguments of the upload.

        Raises:
            ValueError: the network has no LoRA weights, or several, or a text encoder has some.
        """
        if kwargs and not push_to_hub:
            raise TypeError(f"save_pretrained: {', '.join(kwargs)} has no effect without push_to_hub")
        if self._save is not None:
            self._save(save_directory)
        else:
            self._check_text_encoders()
            arguments = lora_file_arguments(self.unet, self._family.component)
            self._family.pipeline_class.save_lora_weights(str(save_directory), **arguments)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", None) or Path(save_directory).resolve().name, **kwargs)

    def _check_text_encoders(self) -> None:
        """Raises `ValueError` if text encoders have LoRA weights, which would be left out."""
        parts = {} if self._encoder is None else self._encoder.components
        adapted = [name for name, part in parts.items() if name.startswith("text") and hasattr(part, "peft_config")]
        if adapted:
            raise ValueError(
                f"{', '.join(adapted)} has LoRA weights, which are not saved here: save them by diffusers"
            )

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Uploads the LoRA weights with a model card, which names their base if it was loaded from the Hub.

        In a training of the whole network, uploads the whole pipeline. Records and measurements of a training are
        uploaded, too, with what `train` returned, as long as its weights are those in the output folder.

        Args:
            repo_id: user/name, or a name of the token's user; created if necessary.
            commit_message: message of the commit.
            private: whether a new repository is private.
            token: Hub token. Default: the stored one.
            create_pr: open a pull request instead of committing.

        Returns:
            The URL of the commit.

        Raises:
            ValueError: the network has no LoRA weights, or several; the repository holds the other kind of model; or
                `private` is True but the existing repository is public.
            HfHubHTTPError: there is no network, or no write access.
        """
        base = self._encoder and self._encoder.name_or_path
        about = {"base_model": None if not base or Path(base).exists() else base}
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            where = repo_id, self.name_or_path, about
            return push_text_to_image(Path(folder), *where, commit_message, private, token, create_pr=create_pr)

    def set_timesteps(self, steps: int, size: tuple[int, int] | None = None) -> None:
        """As in `RegDDPMPipeline`, with the shift for the size of the image that some schedules need."""
        config = self.scheduler.config
        if not config.get("use_dynamic_shifting"):
            super().set_timesteps(steps, size)
            return
        lengths, shifts = ([config[f"{which}_{what}"] for which in ("base", "max")] for what in _SHIFTS)
        slope = (shifts[1] - shifts[0]) / (lengths[1] - lengths[0])
        tokens = math.prod(size or self._size) // _PATCH**2
        shift = shifts[0] + slope * (tokens - lengths[0])
        self.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=shift)  # as FluxPipeline

    @property
    def _dtype(self) -> torch.dtype:
        """Dtype of the weights without adapters."""
        return next(value.dtype for name, value in self.unet.named_parameters() if "lora_" not in name)

    @property
    def _sample_dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def _channels(self) -> int:
        return self._family.channels(self.unet.config)

    @property
    def _size(self) -> tuple[int, int]:
        factor = downsampling(self.vqvae)
        return tuple(side // factor for side in self._sides)

    @property
    def _multiple(self) -> int:
        return self._family.multiple(self.unet.config)

    def _contexts(
        self,
        batch_size: int,
        guidance_scale: float | None,
        size: tuple[int, int] | None = None,
        *,
        class_labels=None,
        condition=None,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        **embeddings: Tensor,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """As in `ConditionedNetwork`, for texts."""
        for name, value in {"class_labels": class_labels, "condition": condition}.items():
            if value is not None:
                raise ValueError(f"{name}: this network is conditioned on texts: pass prompt")
        null = self._no_text()
        refuse_keywords(name for name in embeddings if name not in null)
        if prompt is not None and embeddings:
            raise ValueError("prompt and prompt_embeds are mutually exclusive")
        if prompt is None and embeddings.keys() != null.keys():
            raise ValueError(f"the network is conditioned on texts: pass prompt, or {', '.join(null)}")
        device = self._execution_device
        context = embeddings if prompt is None else self.embeddings(_one_each("prompt", prompt, batch_size))
        without = null
        scale = checked_guidance_scale(self.default_guidance_scale if guidance_scale is None else guidance_scale)
        if self._is_distilled:
            context, without = {**context, "guidance": torch.tensor([scale])}, None
            if negative_prompt is not None:
                raise ValueError("negative_prompt: this network takes the guidance scale as an input; leave it out")
        elif scale == 1:
            without = None
            if negative_prompt is not None:
                raise ValueError("negative_prompt has no effect with guidance_scale 1: leave it out")
        elif negative_prompt is not None:
            without = self.embeddings(_one_each("negative_prompt", negative_prompt, batch_size))
        return tuple(
            given and {name: value.to(device).expand(batch_size, *value.shape[1:]) for name, value in given.items()}
            for given in (context, without)
        )

    def _no_text(self) -> Embeddings:
        if self._null is None:
            self._null = self._family.null(self._encoder)
        return self._null


def default_side(family: Family, network: nn.Module) -> int:
    """Returns the side of the latents that a network was trained with."""
    return network.config.get("sample_size") or family.sample_size


def text_encoder_sha256(encoder: DiffusionPipeline, family: Family) -> str:
    """Returns a hash of everything that affects embeddings: text encoders and tokenizers."""
    digest = hashlib.sha256()
    for name, component in sorted(encoder.components.items()):
        if isinstance(component, nn.Module) and name not in (family.component, "vae"):
            digest.update(f"{name} {component.config.to_json_string()}".encode())
            add_weights(digest, component)
        elif hasattr(component, "get_vocab"):
            digest.update(repr((name, component.model_max_length, sorted(component.get_vocab().items()))).encode())
    return digest.hexdigest()


def _one_each(name: str, texts: str | Sequence[str], batch_size: int) -> list[str]:
    """Returns one text, or one per sample.

    Raises:
        ValueError: they are of another number, or not texts.
    """
    given = [texts] if isinstance(texts, str) else texts
    if not isinstance(given, list | tuple) or not all(isinstance(text, str) for text in given):
        raise ValueError(f"{name} must be a text, or one text per sample")
    if len(given) not in (1, batch_size):
        raise ValueError(f"{name} holds {len(given)} texts for batch_size={batch_size}: pass one per sample, or one")
    return given
