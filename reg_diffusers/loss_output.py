"""The result of the objective: a loss and its parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Denoising", "LossOutput", "Records", "alias"]


class Records(Mapping):
    """Tensors by name, each computed when it is first read, because most steps of a training read none.

    Args:
        makers: function that computes the tensor, by name.
    """

    def __init__(self, makers: Mapping[str, Callable[[], Tensor]]):
        self._makers = dict(makers)
        self._made: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._made:
            self._made[name] = self._makers[name]()
            self._makers[name] = None  # releases what it was computed from
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)

    def __repr__(self) -> str:
        return repr(dict(self))


class Denoising(NamedTuple):
    """The denoising loss of a batch.

    Attributes:
        loss: scalar.
        per_image: computes its value for each image, (B,), detached.
        count: number of images in the mean.
    """

    loss: Tensor
    per_image: Callable[[], Tensor]
    count: int


@dataclass(frozen=True)
class LossOutput:
    """A loss and its parts.

    Attributes:
        loss: scalar to call `backward` on.
        terms: scalars by name, attached to the graph: "denoising" as it enters the loss, if the objective has it, and
            for every `Term` the mean of weighting * L', before `weight`.
        per_image: by the same names, detached values per image, (B,): "denoising" as it enters the loss, and L' for
            every `Term`, nan for an image that was left out or dropped. Computed when read: read it before images or
            noise of the step are overwritten.
        weightings: by term, the weighting of each image, (B,), on the device of the timesteps; 0 for an image that
            `image_mask` leaves out.
        snr: (B,) signal-to-noise ratio of each image, on the device of the timesteps.
        model_output: (B, C, ...) output of the network; `balancing.balance` differentiates with respect to it.
        counts: by the names of `terms`, the number of images in the mean.
        separate: names of the terms whose estimator calls the network again, so that their gradient does not reach
            its parameters through `model_output` alone.
        weights: by term, its weight in the loss: a number, or a scalar on the device where a rule sets it; times the
            factor of its schedule.
        factors: by term with a schedule, the factor of its weight in this step.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    per_image: Mapping[str, Tensor] = field(default_factory=dict)
    weightings: dict[str, Tensor] = field(default_factory=dict)
    snr: Tensor | None = None
    model_output: Tensor | None = None
    counts: dict[str, int | Tensor] = field(default_factory=dict)
    separate: tuple[str, ...] = ()
    weights: dict[str, float | Tensor] = field(default_factory=dict)
    factors: dict[str, float] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """Returns the loss and its parts as plain numbers, for a logger; waits for the device.

        "loss"; for each part, by its name, the mean as in `terms` (for a term named "loss", the total stays); and for
        each term, by "raw/" and its name, the mean of L' over the images that took part, without weighting, nan where
        none did, and by "weight/" its weight.
        """
        parts = {name: term.item() for name, term in self.terms.items() if name != "loss"}
        found = {"loss": self.loss.item(), **parts}
        for name in self.weightings:
            found[f"raw/{name}"] = self.per_image[name].nanmean().item()
            found[f"weight/{name}"] = float(self.weights[name])
        return found


def alias(model_output: Tensor) -> Tensor:
    """Returns a view of the output, so `balance` can differentiate without triggering hooks on the output itself.

    float16 becomes float32: a gradient of a mean over many values, before a gradient scaler multiplies it, is below
    the smallest float16.
    """
    return model_output.float() if model_output.dtype == torch.float16 else model_output.view_as(model_output)
