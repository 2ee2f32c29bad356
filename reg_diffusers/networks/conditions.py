"""The conditions of a network: read from a batch of the data, flipped with the images, bound to the network.

Each kind of condition is a class and an entry of `KINDS`. No other part of a training depends on the kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..conditioning import takes_condition
from ..data.normalization import PICTURES
from ..data.training_data import TrainingData
from ..settings.data import DataSettings

__all__ = ["KINDS", "Condition", "Conditions"]


class Condition:
    """One kind of condition. By default, the network gets the stored values as an argument.

    Attributes:
        name: its key in a batch of the data and in the regularizers' `needs`, and its argument name in the pipeline.
        flag: the flag of train_reg.py that requests it.
        is_of_samples: whether pipelines take it; if not, all samples have the default of their pipeline.
    """

    name: str
    flag: str
    is_of_samples = True

    def is_taken_by(self, network: Mapping[str, Any], channels: int) -> bool:
        """Whether a network takes it.

        Args:
            network: the config of the network.
            channels: of the network's images.
        """
        raise NotImplementedError

    def is_wanted(self, settings: DataSettings) -> bool:
        """Whether the settings of a run request it."""
        return bool(getattr(settings, self.flag.removeprefix("--")))

    def from_batch(self, stored: Tensor, data: TrainingData) -> Tensor:
        """Converts the stored values of a batch to those (B, ...) that a network and a regularizer see."""
        return stored

    def for_previews(self, data: TrainingData, number: int) -> Tensor | None:
        """Returns the values for `number` samples; None if they must come from images of the data."""
        return None

    def absent(self, data: TrainingData) -> Tensor | None:
        """Returns the value of an image without this condition, (1, ...); None if networks have no such value."""
        return None

    def flipped(self, values: Tensor, mask: Tensor) -> Tensor:
        """Returns the values after the images in `mask` (B, 1, 1, 1) are flipped left to right."""
        return values

    def bind(self, network: Callable, values: Tensor) -> tuple[Callable, dict[str, Tensor]]:
        """Returns the network to call instead, and its additional arguments."""
        return network, {self.name: values}


class ClassLabels(Condition):
    """The class of each image, (B,)."""

    name, flag = "class_labels", "--class_conditional"

    def is_taken_by(self, network: Mapping[str, Any], channels: int) -> bool:
        return any(network.get(entry) is not None for entry in ("num_class_embeds", "num_embeds_ada_norm"))

    def for_previews(self, data: TrainingData, number: int) -> Tensor | None:
        """Cycles through all classes."""
        return None if data.classes is None else torch.arange(number) % len(data.classes)

    def absent(self, data: TrainingData) -> Tensor | None:
        """One class more than the data have."""
        return None if data.classes is None else torch.tensor([len(data.classes)])


class ConditioningImage(Condition):
    """A conditioning image for each image, (B, K, H, W) in [-1, 1]."""

    name, flag = "condition", "--conditioning_image_column"

    def is_taken_by(self, network: Mapping[str, Any], channels: int) -> bool:
        return network["in_channels"] > channels

    def from_batch(self, stored: Tensor, data: TrainingData) -> Tensor:
        return PICTURES.normalize(stored)

    def flipped(self, values: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, values.flip(-1), values)

    def bind(self, network: Callable, values: Tensor) -> tuple[Callable, dict[str, Tensor]]:
        return takes_condition(network), {self.name: values}


class PromptEmbeddings(Condition):
    """The embedding of the text of each image, (B, L, D), for a network as its family of pipelines calls it."""

    name, flag = "prompt_embeds", "--caption_column"

    def is_taken_by(self, network: Mapping[str, Any], channels: int) -> bool:
        return network.get("cross_attention_dim") is not None

    def is_wanted(self, settings: DataSettings) -> bool:
        return settings.caption_column is not None or settings.prompt is not None

    def absent(self, data: TrainingData) -> Tensor | None:
        """The embedding of no text."""
        prompts = getattr(data, "prompts", None)
        return None if prompts is None else prompts.null.get(self.name)


class PooledPromptEmbeddings(PromptEmbeddings):
    """The pooled embedding of the text of each image, (B, P), which most families have in addition."""

    name = "pooled_prompt_embeds"

    def is_wanted(self, settings: DataSettings) -> bool:
        return False  # not every family gives it to a regularizer


class TimeIds(Condition):
    """The sizes of each image, (B, 6), which Stable Diffusion XL takes, see `data.image_sizes`."""

    name, flag = "time_ids", "--pretrained_model_name_or_path"
    is_of_samples = False

    def is_taken_by(self, network: Mapping[str, Any], channels: int) -> bool:
        return network.get("addition_embed_type") == "text_time"

    def is_wanted(self, settings: DataSettings) -> bool:
        return False  # not every family has it


_OF_TEXTS = (PromptEmbeddings(), PooledPromptEmbeddings())
KINDS: tuple[Condition, ...] = (ClassLabels(), ConditioningImage(), *_OF_TEXTS, TimeIds())


class Conditions(Mapping[str, Tensor]):
    """The conditions of some images by name; a mapping, so a pipeline or a loss can take it as keywords.

    Args:
        values: tensors (B, ...) by name; names of other values are ignored.
    """

    def __init__(self, values: Mapping[str, Tensor]):
        self._values = {kind.name: values[kind.name] for kind in KINDS if kind.name in values}

    @classmethod
    def of_batch(cls, data: TrainingData, batch: Mapping[str, Tensor]) -> Conditions:
        """Reads the conditions of a batch of the data."""
        return cls({kind.name: kind.from_batch(batch[kind.name], data) for kind in KINDS if kind.name in batch})

    @classmethod
    def for_previews(cls, data: TrainingData, number: int) -> Conditions:
        """Returns conditions for `number` samples: cycles through all classes, or uses those of the first images."""
        if data.condition_channels or getattr(data, "prompts", None) is not None:
            examples = data.examples
            return cls.of_batch(data, examples.__getitems__([index % len(examples) for index in range(number)]))
        found = {kind.name: kind.for_previews(data, number) for kind in KINDS}
        return cls({name: values for name, values in found.items() if values is not None})

    @classmethod
    def absent(cls, data: TrainingData) -> Conditions:
        """Returns the value of each condition of an image without it, (1, ...), for those that can be missing."""
        found = {kind.name: kind.absent(data) for kind in KINDS}
        return cls({name: value for name, value in found.items() if value is not None})

    def __getitem__(self, name: str) -> Tensor:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def of_samples(self) -> Conditions:
        """Returns those that pipelines take."""
        return Conditions({kind.name: self[kind.name] for kind in KINDS if kind.name in self and kind.is_of_samples})

    def of_images(self, index) -> Conditions:
        """Returns the conditions of some of the images, by a slice, a mask or indices."""
        return Conditions({name: values[index] for name, values in self.items()})

    def flipped(self, mask: Tensor) -> Conditions:
        """Returns the conditions after the images in `mask` (B, 1, 1, 1) are flipped left to right."""
        return Conditions({kind.name: kind.flipped(self[kind.name], mask) for kind in KINDS if kind.name in self})

    def without_some(self, absent: Mapping[str, Tensor], probability: float) -> Conditions:
        """Returns the conditions after each image loses, with a probability, all those that can be missing.

        Args:
            absent: the value of each condition of an image without it, (1, ...), see `absent`.
            probability: from 0 to below 1.
        """
        first = self[next(iter(absent))]
        dropped = torch.rand(len(first), device=first.device) < probability
        kept = {
            name: torch.where(dropped.reshape(-1, *(1,) * (value.ndim - 1)), value.to(self[name]), self[name])
            for name, value in absent.items()
        }
        return Conditions({**self, **kept})

    def taken_by(self, networks: Iterable[tuple[Mapping[str, Any], int]]) -> Conditions:
        """Those that any of some networks takes; each is given by its config and the channels of its images."""
        networks = list(networks)
        taken = [kind.name for kind in KINDS if any(kind.is_taken_by(*network) for network in networks)]
        return Conditions({name: values for name, values in self.items() if name in taken})

    def bind(self, network: Callable) -> tuple[Callable, dict[str, Tensor]]:
        """Returns the network to call in the loss, and its `model_kwargs`."""
        arguments: dict[str, Tensor] = {}
        for kind in KINDS:
            if kind.name in self:
                network, more = kind.bind(network, self[kind.name])
                arguments |= more
        return network, arguments
