"""Losses of x0_hat alone by a frozen network: a class it should be recognised as, or a reward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..frozen import FrozenNetworks
from ..precision import input_dtype
from .network_input import NetworkInput, checked_range, in_colour

__all__ = ["Score"]

_KINDS = ("cross_entropy", "reward")


class Score(nn.Module):
    r"""Scores x0_hat with a frozen classifier or reward model.

        Term(Score(classifier), weight=0.01)  # the loop passes class_labels

    | kind          | L'                             | unit                 | zero for                       |
    |---------------|--------------------------------|----------------------|--------------------------------|
    | cross_entropy | -log softmax(net(x0_hat))_y    | nats                 | images recognised with certainty |
    | reward        | max(threshold - net(x0_hat), 0)| those of the reward  | rewards from the threshold on  |

    y is `target`, or the class label of each image. At high noise the network sees a blur, of which it may be certain
    of anything, so use a weighting that leaves high noise out, such as `matched`. Both losses can be lowered by
    patterns that people do not see: judge with another network. The threshold limits this, because rewards above it
    have no gradient.

    The network is frozen, in evaluation mode, moved by `.to(device)` and absent from `parameters` and `state_dict`. It
    runs in its own dtype.

    Args:
        net: maps images to logits (n, K), or to rewards (n,) or (n, 1): a tensor, or a transformers output with
            `logits`. The module itself is used, not a copy.
        target: class that all images should have, from 0 to K - 1. None: that of `class_labels`, which the loop
            passes.
        kind: "cross_entropy" or "reward".
        threshold: reward from which an image is good enough.
        processor: image processor of `net`, as in `Perceptual`. None: the network sees the images as the loss does, of
            any channels.
        input_range: range of the images, "[-1, 1]" or "[0, 1]"; used with a processor.

    Raises:
        ValueError: `kind` or `input_range` is unknown, or "reward" is combined with a target.
    """

    def __init__(
        self,
        net: nn.Module,
        target: int | None = None,
        *,
        kind: str = "cross_entropy",
        threshold: float = 0.7,
        processor=None,
        input_range: str = "[-1, 1]",
    ):
        super().__init__()
        if kind not in _KINDS:
            raise ValueError(f"kind must be one of {', '.join(_KINDS)}, not {kind!r}")
        if kind == "reward" and target is not None:
            raise ValueError(f"a reward has no target class, but target={target}: use threshold")
        self.networks = FrozenNetworks([net])
        self.target = target
        self.kind = kind
        self.threshold = threshold
        self.network_input = None if processor is None else NetworkInput.of(processor)
        self.input_range = checked_range(input_range)
        self.needs = ("class_labels",) if kind == "cross_entropy" and target is None else ()

    @property
    def net(self) -> nn.Module:
        """The network."""
        (net,) = self.networks
        return net

    def forward(self, x0_hat: Tensor, /, *, class_labels: Tensor | None = None) -> Tensor:
        """Computes the loss of each image, (n,).

        Args:
            x0_hat: (n, C, H, W).
            class_labels: (n,) integers; without a target only.

        Raises:
            ValueError: the network returns another shape.
        """
        found = self._output(x0_hat)
        if self.kind == "reward":
            if found.numel() != len(x0_hat):
                raise ValueError(f"a reward model must return ({len(x0_hat)},), not {tuple(found.shape)}")
            return F.relu(self.threshold - found.reshape(len(x0_hat)))
        if found.ndim != 2:
            raise ValueError(f"a classifier must return logits ({len(x0_hat)}, K), not {tuple(found.shape)}")
        labels = torch.full((len(found),), self.target) if class_labels is None else class_labels
        return F.cross_entropy(found, labels.to(found.device).long(), reduction="none")

    def _output(self, images: Tensor) -> Tensor:
        """Computes the output of the network, in at least float32."""
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        if self.network_input is not None:
            images = self.network_input(in_colour(images, self.input_range, type(self).__name__))
        output = self.net(images.to(input_dtype(self.net, images)))
        output = output if isinstance(output, Tensor) else output.logits
        return output.to(torch.promote_types(output.dtype, torch.float32))
