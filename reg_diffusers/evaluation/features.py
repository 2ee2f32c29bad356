"""Features to compare images by: of a pretrained network, of a classifier trained on the data, or the pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..regularizers.classifier import classifier_input, fit_classifier

__all__ = [
    "DEFAULT_NETWORK",
    "Features",
    "FeaturesError",
    "named_features",
    "pixels",
    "train_classifier",
]

DEFAULT_NETWORK = "facebook/dinov2-small"
_PICTURE_CHANNELS = (1, 3)
_WIDTH = 32  # other than that of the classifier of a loss, because a network must not judge what it was trained with
_SECONDS_TO_ASK_THE_HUB = 10


class FeaturesError(ValueError):
    """Raised for a feature network that is unavailable; the message gives the reason in one line."""


@dataclass(frozen=True)
class Features:
    """A frozen feature extractor: images (B, C, H, W) in [-1, 1] to vectors (B, D).

    Attributes:
        extract: the function.
        description: a description for tables and logs.
        frechet: the name of the Frechet distance in these features; "" where that distance is meaningless.
        kernel: the name of the kernel distance in these features.
    """

    extract: Callable[[Tensor], Tensor]
    description: str
    frechet: str = ""
    kernel: str = ""


def pixels() -> Features:
    """Returns the pixel values as features, for nearest neighbours only: Gaussians in pixel space model no images."""
    return Features(lambda images: images.flatten(1).float(), "pixels")


def named_features(name: str, device: torch.device | str = "cpu") -> Features:
    """Loads a vision network of transformers; the features are its pooled output (for DINOv2 the class token).

    Images are resized (bicubic, antialiased) and normalized according to its image processor.

    Args:
        name: a folder or Hub id, with safetensors weights and a preprocessor_config.json. No code from it is run.
        device: the device of the network.

    Raises:
        FeaturesError: if it cannot be downloaded or is not a vision network.
    """
    from transformers import AutoImageProcessor, AutoModel

    try:
        if not Path(name).is_dir():
            _ask_the_hub(name)
        processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
        model, found = AutoModel.from_pretrained(
            name, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
        model = getattr(model, "vision_model", model).to(device).eval().requires_grad_(False)
        pooled = not any("pooler" in key for key in found["missing_keys"])
        extract = _Network(model, processor, pooled)
        with torch.no_grad():
            extract(torch.zeros(1, 3, 8, 8, device=device))
    except Exception as error:  # the type depends on the network and on the library that reads it
        raise FeaturesError(f"{name}: {(str(error).strip().splitlines() or [type(error).__name__])[0]}") from error
    kind = {"dinov2": "DINOv2", "clip_vision_model": "CLIP", "vit": "ViT"}.get(model.config.model_type)
    kind = kind or model.config.model_type
    return Features(extract, f"{name}, {extract.size} x {extract.size}", f"FD-{kind}", f"KD-{kind}")


def _ask_the_hub(name: str) -> None:
    """Asks the Hub once for a network that is not in the cache; transformers would retry many times."""
    from huggingface_hub import model_info, try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(name, "config.json"), str):
        model_info(name, timeout=_SECONDS_TO_ASK_THE_HUB)


class _Network:
    def __init__(self, model: nn.Module, processor, pooled: bool):
        self._model, self._pooled = model, pooled
        size, crop = processor.size, getattr(processor, "crop_size", None)
        cropped = crop is not None and getattr(processor, "do_center_crop", False)
        self._resized = _side(size)
        self.size = _side(crop) if cropped else self._resized
        device = model.device
        self._mean = torch.tensor(processor.image_mean, device=device).view(-1, 1, 1)
        self._std = torch.tensor(processor.image_std, device=device).view(-1, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        if images.shape[1] not in _PICTURE_CHANNELS:
            raise FeaturesError(f"needs images of 1 or 3 channels, not {images.shape[1]}")
        images = (images.clamp(-1, 1).float() + 1) / 2
        scale = self._resized / min(images.shape[2:])
        size = [max(round(side * scale), self.size) for side in images.shape[2:]]
        images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = ((side - self.size) // 2 for side in size)
        images = images[:, :, top : top + self.size, left : left + self.size].expand(-1, 3, -1, -1)
        output = self._model((images - self._mean) / self._std)
        pooled = getattr(output, "pooler_output", None)
        return (pooled if self._pooled and pooled is not None else output.last_hidden_state[:, 0]).flatten(1)


def _side(size) -> int:
    """The side length of the square that an image processor's size stands for."""
    return (size.get("shortest_edge") or size["height"]) if isinstance(size, dict) else _of_size(size)


def _of_size(size) -> int:
    return getattr(size, "shortest_edge", None) or getattr(size, "height", None) or int(size)


def train_classifier(
    images: Tensor,
    labels: Tensor,
    classes: int,
    seed: int = 0,
    progress: Callable = iter,
) -> Features:
    """Trains a small convolutional classifier on the labels, in seconds; the features are its penultimate layer.

    Its distances are valid for these data and this seed only: do not compare them with those of another network. It
    is trained on both halves of the data, so it favours neither. It is another network than that of the loss
    `regularizers.Classifier`, narrower and from another seed.

    Args:
        images: (N, C, H, W) in [-1, 1]; images above 32 x 32 are downsampled to it.
        labels: (N,) from 0 to classes - 1.
        classes: the number of classes, at least 2.
        seed: the seed of initialization and batch order.
        progress: wraps the range of steps, such as tqdm.

    Returns:
        The features; the description states the accuracy on held-out images.

    Raises:
        FeaturesError: if there are fewer than 2 classes or 20 images.
    """
    try:
        network, accuracy, held_out = fit_classifier(images, labels, classes, seed, progress, _WIDTH)
    except ValueError as error:
        raise FeaturesError(str(error)) from error
    body = network[:-1]
    description = f"a classifier of these data, seed {seed}: {accuracy:.1%} of {held_out} held-out images recognised"
    return Features(
        lambda shown: body(classifier_input(shown.to(images.device))), description, "classifier FD", "classifier KD"
    )
