"""A small classifier trained on the labels of a data set, in seconds, as the network of a loss.

    classifier = Classifier.of(images, labels)
    classifier.save("classifier.safetensors")

    train_reg.py --regularizer "classifier('classifier.safetensors')"

A model trained with a network must not be judged by it: it learns what this network sees, and would be flattered.
`evaluation.features` trains another network for its "classifier FD", of another width and from another seed. Both are
convolutional networks that see the same data, though, so distances in pretrained features are the stricter judge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .perceptual import Perceptual
from .score import Score

__all__ = ["Classifier", "classifier_input", "fit_classifier"]

_LARGEST_SIDE = 32  # of the classifier's input
_STEPS = 500
_BATCH_SIZE = 64
_LEARNING_RATE = 2e-3
_HELD_OUT = 10  # one image in this many is held out
_WIDTH = 48  # that of the judge in `evaluation` is 32
_KINDS = ("features", "cross_entropy")
_LAYERS_OF_BLOCK = 3
_BLOCKS = 4


class Classifier(nn.Module):
    """A convolutional classifier of small images; larger ones are averaged down to 32 x 32.

    Args:
        layers: network that `fit_classifier` returns.
        accuracy: share of held-out images that it recognises; None if unknown.
    """

    def __init__(self, layers: nn.Sequential, accuracy: float | None = None):
        super().__init__()
        self.channels = layers[0].in_channels
        self.layers = layers
        self.accuracy = accuracy

    @classmethod
    def of(cls, images: Tensor, labels: Tensor, *, seed: int = 1, progress: Callable = iter) -> Classifier:
        """Trains a classifier; the global random numbers are left unchanged.

        Args:
            images: (N, C, H, W) in [-1, 1].
            labels: (N,) integers from 0.
            seed: seed of initialization and batch order.
            progress: wraps the range of steps, such as tqdm.

        Raises:
            ValueError: there are fewer than 2 classes or 20 images.
        """
        layers, accuracy, _ = fit_classifier(images, labels, int(labels.max()) + 1, seed, progress)
        return cls(layers, accuracy)

    @classmethod
    def load(cls, file: str | Path) -> Classifier:
        """Reads a classifier that `save` wrote.

        Raises:
            ValueError: the file does not exist, or is not that of a classifier.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        written = f"write it with Classifier.of(images, labels).save({str(file)!r})"
        try:
            weights = load_file(file)
            (width, channels, *_), classes = weights["layers.0.weight"].shape, len(weights[_LAST])
            with torch.device("meta"):  # no random initial weights
                found = cls(_layers(channels, classes, width))
            found.load_state_dict(weights, assign=True)
        except FileNotFoundError:
            raise ValueError(f"{file} does not exist: {written}") from None
        except (SafetensorError, KeyError, ValueError, RuntimeError, OSError) as error:
            raise ValueError(f"{file} is not a classifier ({type(error).__name__}): {written}") from error
        return found.eval().requires_grad_(False)

    @classmethod
    def loss(
        cls,
        file: str,
        *,
        kind: str = "features",
        target: int | None = None,
        layers: Sequence[int] = (1, 2, 3),
        distance: str = "cosine",
    ) -> Perceptual | Score:
        """Loads a classifier as a loss, named "classifier" in logs.

        | kind          | loss                                                                    |
        |---------------|-------------------------------------------------------------------------|
        | features      | `Perceptual`: distance to the own image in the features of the network  |
        | cross_entropy | `Score`: -log p of the class label of the image, or of `target`         |

        Args:
            file: a file that `save` wrote.
            kind: "features", for images of 1 or 3 channels, or "cross_entropy".
            target: as in `Score`; for "cross_entropy" only.
            layers: which of the four blocks to compare, for "features" only; 0 has the full resolution.
            distance: as in `Perceptual`; for "features" only.

        Raises:
            ValueError: the file is not that of a classifier, `kind` is unknown, an argument is that of another kind,
                or "features" is asked of a network for other than 1 or 3 channels.
        """
        if kind not in _KINDS:
            raise ValueError(f"kind must be one of {', '.join(_KINDS)}, not {kind!r}")
        if kind == "features" and target is not None:
            raise ValueError(f'target={target} is that of kind="cross_entropy"')
        network = cls.load(file)
        if kind == "features":
            found = Perceptual(_Blocks(network), layers=layers, distance=distance)
        else:
            found = Score(network, target)
        found.__name__ = "classifier"
        return found

    def save(self, file: str | Path) -> None:
        """Writes the weights to a safetensors file."""
        from safetensors.torch import save_file

        save_file({name: weight.cpu().contiguous() for name, weight in self.state_dict().items()}, file)

    def forward(self, images: Tensor) -> Tensor:
        """Computes the logits (n, K) of images (n, C, H, W) in [-1, 1]."""
        return self.layers(self._input(images))

    def features(self, images: Tensor) -> list[Tensor]:
        """Computes the output of each block, (n, C', h, w)."""
        found, value = [], self._input(images)
        for number in range(_BLOCKS):
            value = self.layers[_LAYERS_OF_BLOCK * number : _LAYERS_OF_BLOCK * (number + 1)](value)
            found.append(value)
        return found

    def _input(self, images: Tensor) -> Tensor:
        if images.shape[1] != self.channels:
            raise ValueError(f"the classifier was trained on {self.channels} channels, not {images.shape[1]}")
        return classifier_input(images)


_LAST = f"layers.{_LAYERS_OF_BLOCK * _BLOCKS + 3}.bias"  # after the blocks: mean over places, flatten, dropout, linear


class _Blocks(nn.Module):
    """The features of a classifier as those of a network that takes three channels."""

    def __init__(self, classifier: Classifier):
        super().__init__()
        if classifier.channels not in (1, 3):
            raise ValueError(
                f"the classifier was trained on {classifier.channels} channels, and features need 1 or 3: use"
                ' kind="cross_entropy"'
            )
        self.classifier = classifier

    def forward(self, images: Tensor) -> list[Tensor]:
        if self.classifier.channels == 1:
            images = images.mean(1, keepdim=True)  # grey images arrive with their channel repeated
        return self.classifier.features(images)


def fit_classifier(
    images: Tensor, labels: Tensor, classes: int, seed: int, progress: Callable = iter, width: int = _WIDTH
) -> tuple[nn.Sequential, float, int]:
    """Trains a classifier; the global random numbers are left unchanged.

    Args:
        images: (N, C, H, W) in [-1, 1]; images above 32 x 32 are downsampled to it.
        labels: (N,) from 0 to classes - 1.
        classes: number of classes, at least 2.
        seed: seed of initialization and batch order.
        progress: wraps the range of steps, such as tqdm.
        width: channels of the first layer.

    Returns:
        The frozen network, images of at most 32 x 32 -> logits; its accuracy on held-out images; and their number.

    Raises:
        ValueError: there are fewer than 2 classes or 20 images.
    """
    if classes < 2 or len(images) < 2 * _HELD_OUT:
        raise ValueError(f"a classifier needs at least 2 classes and {2 * _HELD_OUT} images")
    images, labels = classifier_input(images), labels.to(images.device)
    devices = [images.device] if images.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        torch.manual_seed(seed)
        order = torch.randperm(len(images)).to(images.device)
        held_out, trained = order[: len(order) // _HELD_OUT], order[len(order) // _HELD_OUT :]
        network = _layers(images.shape[1], classes, width).to(images.device)
        optimizer = torch.optim.AdamW(network.parameters(), _LEARNING_RATE, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=_STEPS)
        for _ in progress(range(_STEPS)):
            batch = trained[torch.randint(len(trained), (_BATCH_SIZE,)).to(trained.device)]
            F.cross_entropy(network(images[batch]), labels[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    network = network.eval().requires_grad_(False)
    found = torch.cat([network(images[part]).argmax(1) for part in held_out.split(256)])
    return network, (found == labels[held_out]).float().mean().item(), len(held_out)


def classifier_input(images: Tensor) -> Tensor:
    """Downsamples images to at most 32 x 32 by averaging."""
    images = images.float()
    if max(images.shape[2:]) <= _LARGEST_SIDE:
        return images
    return F.interpolate(
        images, [min(side, _LARGEST_SIDE) for side in images.shape[2:]], mode="bilinear", antialias=True
    )


def _layers(channels: int, classes: int, width: int) -> nn.Sequential:
    def block(before: int, after: int, stride: int) -> list[nn.Module]:
        return [
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            nn.GroupNorm(8, after),
            nn.SiLU(),
        ]

    return nn.Sequential(
        *block(channels, width, 1),
        *block(width, 2 * width, 2),
        *block(2 * width, 2 * width, 2),
        *block(2 * width, 2 * width, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(2 * width, classes),
    )
