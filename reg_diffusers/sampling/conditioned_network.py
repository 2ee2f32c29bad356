"""The network of a pipeline under conditions, with classifier-free guidance.

Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598) samples with

    o = o_without + guidance_scale (o_with - o_without),

the outputs of the network with its condition and without it. It needs a network that was also trained without: for
classes, one more embedding than there are classes, the last one, which stands for no class.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..conditioning import with_condition
from .call_inputs import checked_class_labels, checked_condition, refuse_keywords
from .class_names import number_of_classes

__all__ = ["ConditionedNetwork", "classifier_free"]


def classifier_free(conditional: Callable, unconditional: Callable, scale: float) -> Callable:
    """Combines two networks of the sample alone by classifier-free guidance; a learned variance is not combined."""

    def network(sample: Tensor) -> Tensor:
        given, without = conditional(sample), unconditional(sample)
        guided = without + scale * (given - without)
        channels = sample.shape[1]
        return guided if given.shape[1] == channels else torch.cat([guided[:, :channels], given[:, channels:]], dim=1)

    return network


class ConditionedNetwork:
    """The part of `RegDDPMPipeline` that knows what its network is conditioned on."""

    typical_batch = 64  # samples that usually fit into memory at a time

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None for a network without classes."""
        return number_of_classes(self.config.class_names, self._class_embeddings)

    @property
    def condition_channels(self) -> int:
        """Input channels of the network in addition to those of its samples."""
        return self.unet.config.in_channels - self._channels

    @property
    def default_guidance_scale(self) -> float | None:
        """The guidance_scale of calls without one."""
        return None

    @property
    def takes_prompts(self) -> bool:
        """Whether the network is conditioned on texts."""
        return False

    @property
    def conditions_sha256(self) -> str:
        """Hash of what turns conditions into inputs of the network; empty if they are the inputs."""
        return ""

    def as_in_loss(self) -> Callable:
        """Returns the network as a loss calls it: (noisy_samples, timesteps, **conditions)."""
        return self.unet

    @property
    def _sample_dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def _class_embeddings(self) -> int | None:
        return getattr(self.unet.config, "num_class_embeds", None)

    def _contexts(
        self,
        batch_size: int,
        guidance_scale: float | None,
        size: tuple[int, int] | None = None,
        *,
        class_labels=None,
        condition=None,
        **kwargs,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """Returns the conditions of the network by name, and those of the unconditional call, for samples of a size.

        The latter are None if the call is not needed, because guidance_scale is 1 or None.
        """
        refuse_keywords(kwargs)
        device, shape = self._execution_device, (self.condition_channels, *(size or self._size))
        labels = checked_class_labels(class_labels, self.num_classes, batch_size, device, self.config.class_names)
        condition = checked_condition(condition, shape, batch_size, device)
        given = {"class_labels": labels, "condition": condition}
        context = {name: value for name, value in given.items() if value is not None}
        if guidance_scale is None:
            return context, None
        if labels is None:
            raise ValueError(
                "guidance_scale is that of classifier-free guidance, which needs a model with class labels or texts:"
                " the factor of the losses in guidance= is regularizer_scale="
            )
        if checked_guidance_scale(guidance_scale) == 1:
            return context, None
        if self._class_embeddings == self.num_classes:
            raise ValueError(
                "guidance_scale needs a network that was also trained without labels: train it with"
                " --class_conditional --condition_dropout 0.1"
            )
        return context, {**context, "class_labels": torch.full_like(labels, self.num_classes)}

    def _network(self, t, class_labels: Tensor | None = None, condition: Tensor | None = None) -> Callable:
        """Returns the network at one timestep, as a function of the sample alone."""
        unet = with_condition(self.unet, condition)

        def network(sample: Tensor) -> Tensor:
            scale = getattr(self.scheduler, "scale_model_input", None)  # flow-matching schedulers lack it
            return unet(sample if scale is None else scale(sample, t), t, class_labels=class_labels).sample

        return network

    def _guided_network(self, t, context: dict, without: dict | None, guidance_scale: float | None) -> Callable:
        """Returns the network at one timestep as a function of the sample alone; arguments from `_contexts`."""
        network = self._network(t, **context)
        return network if without is None else classifier_free(network, self._network(t, **without), guidance_scale)


def checked_guidance_scale(scale: float) -> float:
    """Returns the scale.

    Raises:
        ValueError: it is not finite, or below 0.
    """
    if not (math.isfinite(scale) and scale >= 0):
        raise ValueError(f"guidance_scale must be finite and at least 0, not {scale}")
    return scale
