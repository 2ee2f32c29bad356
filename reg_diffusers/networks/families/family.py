"""What a family of text-to-image pipelines provides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import diffusers
from diffusers import DiffusionPipeline
from torch import Tensor

__all__ = ["Family"]


@dataclass(frozen=True)
class Family:
    """What train_reg.py needs to know about a kind of text-to-image pipelines.

    Attributes:
        pipeline: the name of the pipeline class of diffusers, which is imported when it is needed.
        network: the name of the class of the network, in the component `component`.
        component: the name of the network in the pipeline and in its LoRA files.
        target_modules: the default layers of LoRA.
        load_encoder: loads the pipeline without its network, to embed texts: (path, cache_dir) -> pipeline.
        embed: embeds texts by that pipeline, without gradient: (pipeline, texts) -> (n, L, D).
        assemble: builds the pipeline that samples from embeddings: (network, scheduler, vae) -> pipeline.
        lost_tokens: the number of tokens of a text beyond the limit of the tokenizer: (pipeline, text) -> int.
    """

    pipeline: str
    network: str
    component: str
    target_modules: tuple[str, ...]
    load_encoder: Callable[[str, str | None], DiffusionPipeline]
    embed: Callable[[DiffusionPipeline, list[str]], Tensor]
    assemble: Callable[..., DiffusionPipeline]
    lost_tokens: Callable[[DiffusionPipeline, str], int]

    @property
    def pipeline_class(self) -> type[DiffusionPipeline]:
        """The pipeline class."""
        return getattr(diffusers, self.pipeline)

    @property
    def network_class(self) -> type:
        """The class of the network."""
        return getattr(diffusers, self.network)
