"""What a family of text-to-image pipelines provides."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

from ...hub.model_index import check_weights
from ...runtime.messages import say

__all__ = ["Embeddings", "Family", "loaded_in"]

# Of n texts, by the pipeline's arguments: prompt_embeds (n, L, D), and in most also pooled_prompt_embeds (n, P).
Embeddings = dict[str, Tensor]


def loaded_in(dtype: torch.dtype, kind: type, path: str, **kwargs):
    """Loads a pipeline or network of diffusers in this precision."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about torch_dtype; older versions of diffusers lack `dtype`
        return kind.from_pretrained(path, torch_dtype=dtype, **kwargs)


@dataclass(frozen=True)
class _OnlyConfig:
    """Stands for a network of which a pipeline reads the config, to know the shape of its embeddings."""

    config: FrozenDict


@dataclass(frozen=True)
class Family:
    """What train_reg.py needs to know about a kind of text-to-image pipelines.

    Attributes:
        pipeline: name of the pipeline class of diffusers, which is imported when it is needed.
        network: name of the class of the network.
        component: name of the network in the pipeline and in its LoRA files.
        target_modules: default layers of LoRA, as in diffusers' training script.
        guidance_scale: default of the pipeline, which previews use.
        embed: embeds texts: (pipeline without its network, texts) -> embeddings.
        null: embedding of no text, as in classifier-free guidance: (that pipeline) -> embeddings of n = 1.
        token_limits: number of tokens that each tokenizer keeps, by its name: (that pipeline) -> numbers.
        call: predicts from noisy samples (n, c, h, w): (network, its config, noisy_samples, timesteps, embeddings,
            pixels per latent pixel) -> model_output (n, c, h, w).
        channels: channels of the latents: (config of the network) -> c.
        multiple: the sides of the latents must be multiples of it: (config of the network) -> number.
        is_distilled: for pipelines without classifier-free guidance, whether a network takes the guidance scale as an
            input, "guidance" (n,) among the embeddings: (config of the network) -> bool.
        sample_size: side of the latents if the config of the network lacks it.
        vae_entries: entries that this pipeline reads in the config of its autoencoder, besides scaling_factor.
        takes_sizes: whether the network takes the sizes of each image, "time_ids" (n, 6) among the embeddings.
        optional: text encoders and tokenizers that a saved pipeline may lack: the pipeline embeds texts without them.
        without: arguments that load or build the pipeline without parts that a training never uses.
    """

    pipeline: str
    network: str
    component: str
    target_modules: tuple[str, ...]
    guidance_scale: float
    embed: Callable[[DiffusionPipeline, list[str]], Embeddings]
    null: Callable[[DiffusionPipeline], Embeddings]
    token_limits: Callable[[DiffusionPipeline], dict[str, int]]
    call: Callable[[Callable, Mapping, Tensor, Tensor, Embeddings, int], Tensor]
    channels: Callable[[Mapping], int]
    multiple: Callable[[Mapping], int]
    is_distilled: Callable[[Mapping], bool] | None = None
    sample_size: int | None = None
    vae_entries: tuple[str, ...] = ()
    takes_sizes: bool = False
    optional: tuple[str, ...] = ()
    without: Mapping[str, Any] = field(default_factory=dict)

    @property
    def pipeline_class(self) -> type[DiffusionPipeline]:
        """The pipeline class."""
        return getattr(diffusers, self.pipeline)

    @property
    def network_class(self) -> type:
        """The class of the network."""
        return getattr(diffusers, self.network)

    def load_network(self, path: str, cache_dir: str | None, dtype: torch.dtype) -> nn.Module:
        """Loads the network of a pipeline, from safetensors only."""
        check_weights(Path(path, self.component))
        of_network = {"subfolder": self.component, "cache_dir": cache_dir, "use_safetensors": True}
        return loaded_in(dtype, self.network_class, path, **of_network)

    def load_encoder(self, path: str, cache_dir: str | None, dtype: torch.dtype) -> DiffusionPipeline:
        """Loads the pipeline without its network and autoencoder, to embed texts."""
        lacking = self._absent(self.optional, path, cache_dir)
        left_out = {self.component: None, "vae": None, **self.without, **dict.fromkeys(lacking)}
        encoder = loaded_in(dtype, self.pipeline_class, path, cache_dir=cache_dir, use_safetensors=True, **left_out)
        if lacking:
            say(f"texts       {path} has no {' and no '.join(lacking)}: embedded without, as its pipeline does")
            config = self.network_class.load_config(path, subfolder=self.component, cache_dir=cache_dir)
            encoder.register_modules(**{self.component: _OnlyConfig(FrozenDict(config))})
        return encoder

    def missing_parts(self, path: str, cache_dir: str | None) -> list[str]:
        """Returns the text encoders and tokenizers that a saved pipeline lacks, but needs."""
        wanted = (name for name in self._required if name.startswith(("text_encoder", "tokenizer")))
        return sorted(self._absent((name for name in wanted if name not in self.optional), path, cache_dir))

    @staticmethod
    def _absent(names: Iterable[str], path: str, cache_dir: str | None) -> list[str]:
        """Returns the parts that a saved pipeline lacks."""
        saved = DiffusionPipeline.load_config(path, cache_dir=cache_dir)
        return [name for name in names if (saved.get(name) or [None])[0] is None]

    @property
    def _required(self) -> list[str]:
        """The arguments of the pipeline class without a default."""
        parameters = inspect.signature(self.pipeline_class).parameters.items()
        return [name for name, one in parameters if one.default is one.empty]

    def lost_tokens(self, pipeline: DiffusionPipeline, text: str) -> dict[str, int]:
        """Returns how many tokens of a text each tokenizer cuts off, without those that cut off none."""
        lost = {}
        for name, limit in self.token_limits(pipeline).items():
            tokens = getattr(pipeline, name)(text, truncation=False, verbose=False).input_ids
            if len(tokens) > limit:
                lost[name] = len(tokens) - limit
        return lost

    def as_called(self, network: Callable, config: Mapping, dtype: torch.dtype, downsampling: int) -> Callable:
        """Returns the network as a loss calls it: (noisy_samples, timesteps, **embeddings) -> (model_output,).

        Args:
            network: a network of this family.
            config: its config.
            dtype: dtype of its frozen weights.
            downsampling: pixels per latent pixel, along each axis.
        """

        def called(sample: Tensor, timesteps: Tensor, *, return_dict: bool = False, **embeddings: Tensor):
            # Integers, such as sizes in pixels, would be rounded in bfloat16.
            embeddings = {
                name: values.to(dtype) if values.is_floating_point() else values for name, values in embeddings.items()
            }
            return (self.call(network, config, sample.to(dtype), timesteps, embeddings, downsampling),)

        return called
