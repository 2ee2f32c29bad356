"""Features to compare images by: of a pretrained network, of a classifier trained on the data, or the pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..regularizers.classifier import classifier_input, fit_classifier
from ..regularizers.network_input import NetworkInput, in_colour, read_processor

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

    Images are resized, cropped and normalized according to its image processor, see `NetworkInput`.

    Args:
        name: a folder or Hub id, with safetensors weights and a preprocessor_config.json. No code from it is run.
        device: the device of the network.

    Raises:
        FeaturesError: if it cannot be downloaded or is not a vision network.
    """
    from transformers import AutoModel

    try:
        if not Path(name).is_dir():
            _ask_the_hub(name)
        processor = read_processor(name)
        model, found = AutoModel.from_pretrained(
            name, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
        model = getattr(model, "vision_model", model).to(device).eval().requires_grad_(False)
        pooled = not any("pooler" in key for key in found["missing_keys"])
        extract = _Network(model, processor, pooled)
        with torch.no_grad():
            extract(torch.zeros(1, 3, 8, 8, device=device))
            height, width = extract.shown(torch.zeros(1, 3, 8, 8)).shape[-2:]
    except Exception as error:  # the type depends on the network and on the library that reads it
        raise FeaturesError(f"{name}: {(str(error).strip().splitlines() or [type(error).__name__])[0]}") from error
    kind = {"dinov2": "DINOv2", "clip_vision_model": "CLIP", "vit": "ViT"}.get(model.config.model_type)
    kind = kind or model.config.model_type
    return Features(extract, f"{name}, {height} x {width}", f"FD-{kind}", f"KD-{kind}")


def _ask_the_hub(name: str) -> None:
    """Asks the Hub once for a network that is not in the cache; transformers would retry many times."""
    from huggingface_hub import model_info, try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(name, "config.json"), str):
        model_info(name, timeout=_SECONDS_TO_ASK_THE_HUB)


class _Network:
    def __init__(self, model: nn.Module, processor, pooled: bool):
        self._model, self._pooled = model, pooled
        shown = NetworkInput.of(processor)
        if shown.shortest_side is not None and shown.crop is None:  # a square, which every network accepts
            shown = replace(shown, crop=(shown.shortest_side,) * 2)
        self._input = shown

    def __call__(self, images: Tensor) -> Tensor:
        output = self._model(self._input.normalized(self.shown(images)))
        pooled = getattr(output, "pooler_output", None)
        return (pooled if self._pooled and pooled is not None else output.last_hidden_state[:, 0]).flatten(1)

    def shown(self, images: Tensor) -> Tensor:
        """Returns the pictures that the network sees, (B, 3, H', W') in [0, 1], clipped as a picture of 8 bits is."""
        if images.shape[1] not in _PICTURE_CHANNELS:
            raise FeaturesError(f"needs images of 1 or 3 channels, not {images.shape[1]}")
        return self._input.shown(in_colour(images.clamp(-1, 1).float(), "[-1, 1]", "a network")).clamp(0, 1)


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
