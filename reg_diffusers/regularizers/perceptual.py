"""Perceptual losses: the distance of x0_hat and its own image in the features of a pretrained network."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..frozen import FrozenNetworks
from ..precision import input_dtype
from .network_input import NetworkInput, RangeCheck, in_colour, read_processor

__all__ = ["Perceptual"]

_POOLS = ("tokens", "mean")
_SMALLEST_SQUARE = 1e-8  # added to a squared length, so that features of 0 have a finite gradient


class Perceptual(nn.Module):
    r"""Compares x0_hat with its own image by the features of a frozen vision network.

        Term(Perceptual.from_pretrained("facebook/dinov2-small"), weight=0.1, weighting=gated(0.184))

    With u and v the features of x0_hat and of the original, (N, C) for each image and layer, divided by their length
    at each of the N positions:

    | distance | of a layer                                          | range     | zero for                  |
    |----------|-----------------------------------------------------|-----------|---------------------------|
    | cosine   | mean_n (1 - u_n . v_n)                              | 0 to 2    | parallel features         |
    | l2       | mean_n \|u_n - v_n\|^2, twice the cosine distance   | 0 to 4    | parallel features         |
    | gram     | mean_ij (G_ij - G'_ij)^2 / 4, G = f^T f / N         | unbounded | equal channel statistics  |

    L' is the mean over the layers. "l2" is LPIPS without its learned channel weights. "gram" compares the style, that
    is which channels occur together, wherever in the image; f are the features before the division, so the size of L'
    depends on the network.

    Images are mapped to the network's input as `network_input.NetworkInput` describes. A grey channel is repeated
    three times. The network runs in its own dtype, distances in at least float32; the features of the original have no
    gradient. The network is frozen, in evaluation mode, moved by `.to(device)` and absent from `parameters` and
    `state_dict`.

    The values of `original_samples` are compared with `input_range` in the first three calls, which wait for an
    accelerator; images that look like [0, 1] where [-1, 1] is assumed cause a warning.

    Source: Zhang et al. 2018 (arXiv:1801.03924), eq. 1; Gatys et al. 2016, eq. 4 and 5 for "gram".

    Args:
        net: a vision model of transformers, such as ViTModel, Dinov2Model, CLIPVisionModel, SiglipVisionModel,
            ResNetModel or ConvNextModel; of a CLIPModel or the like, the vision model is used. Or any module that maps
            images (n, 3, H', W') to features: a tensor or a sequence of them, (n, C, h, w), (n, N, C) or (n, C). The
            module itself is used, not a copy.
        processor: the image processor of `net`, or a dictionary of its numbers. None: `net` takes images in [-1, 1].
        layers: indices of the features to compare. For a model of transformers, they select from its hidden_states,
            where 0 is the output of the embedding, and the last is replaced by last_hidden_state, after the final
            normalization. Class and register tokens are left out.
        distance: "cosine", "l2" or "gram".
        pool: "tokens" compares each position, "mean" the mean over positions, which disregards places.
        size: side of the network's input in pixels, in place of the processor's size. Images are resized to it by
            their shorter side and cropped around the centre. A processor that resizes to 256 and crops to 224 hides
            the border of the image from the loss; size=224 shows all of a square image.
        input_range: range of the images, "[-1, 1]" or "[0, 1]".
        chunk: number of images in the network at a time. Their activations are computed again in the backward pass,
            so the memory is that of one chunk. None: all at once, without recomputation.

    Raises:
        TypeError: `net` is not a module.
        ValueError: another argument is invalid, "gram" is combined with pool="mean", or `net` takes no images.
    """

    needs = ("original_samples",)

    def __init__(
        self,
        net: nn.Module,
        processor=None,
        *,
        layers: Sequence[int] = (-1,),
        distance: str = "cosine",
        pool: str = "tokens",
        size: int | None = None,
        input_range: str = "[-1, 1]",
        chunk: int | None = None,
    ):
        super().__init__()
        if distance not in _DISTANCES:
            raise ValueError(f"distance must be one of {', '.join(_DISTANCES)}, not {distance!r}")
        if pool not in _POOLS:
            raise ValueError(f"pool must be one of {', '.join(_POOLS)}, not {pool!r}")
        if distance == "gram" and pool == "mean":
            raise ValueError('distance="gram" is a mean over positions already: use pool="tokens"')
        for name, value in (("size", size), ("chunk", chunk)):
            if not (value is None or (isinstance(value, int) and value >= 1)):
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
        layers = (layers,) if isinstance(layers, int) else tuple(layers)
        if not layers:
            raise ValueError("layers must contain at least one index, such as (-1,)")
        self.networks = FrozenNetworks([_vision_model(net)])
        self.network_input = NetworkInput.of(processor, size)
        self.layers = layers
        self.distance = distance
        self.pool = pool
        self.input_range = input_range
        self.chunk = chunk
        self._check_range = RangeCheck(input_range, type(self).__name__)

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str,
        *,
        layers: Sequence[int] = (-1,),
        distance: str = "cosine",
        pool: str = "tokens",
        size: int | None = None,
        input_range: str = "[-1, 1]",
        chunk: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Perceptual:
        """Loads the network and the numbers of its image processor with transformers.

        Args:
            name_or_folder: a model id on the Hub, or a folder. No code from it is run.
            layers, distance, pool, size, input_range, chunk: as for the class.
            dtype: dtype in which the network runs.

        Raises:
            OSError: the model or its preprocessor_config.json was not found.
        """
        from transformers import AutoModel

        net = AutoModel.from_pretrained(name_or_folder, dtype=dtype, trust_remote_code=False)
        return cls(
            net,
            read_processor(name_or_folder),
            layers=layers,
            distance=distance,
            pool=pool,
            size=size,
            input_range=input_range,
            chunk=chunk,
        )

    @property
    def net(self) -> nn.Module:
        """The network."""
        (net,) = self.networks
        return net

    def forward(self, x0_hat: Tensor, /, *, original_samples: Tensor) -> Tensor:
        """Computes the distance of each image, (n,).

        Args:
            x0_hat: (n, C, H, W), C 1 or 3.
            original_samples: (n, C, H, W), the images to compare with.

        Raises:
            ValueError: the images have another number of channels or are far outside `input_range`, or a layer does
                not exist.
        """
        self._check_range(original_samples)
        step = self.chunk or len(x0_hat)
        pairs = zip(x0_hat.split(step), original_samples.split(step), strict=True)
        return torch.cat([self._distance_of_chunk(*pair) for pair in pairs])

    def _distance_of_chunk(self, x0_hat: Tensor, original: Tensor) -> Tensor:
        with torch.no_grad():
            expected = self._features(original)
        if self.chunk is not None and torch.is_grad_enabled() and x0_hat.requires_grad:
            return checkpoint(self._distance_to, x0_hat, expected, use_reentrant=False)
        return self._distance_to(x0_hat, expected)

    def _distance_to(self, x0_hat: Tensor, expected: list[Tensor]) -> Tensor:
        measure = _DISTANCES[self.distance]
        distances = [measure(*pair) for pair in zip(self._features(x0_hat), expected, strict=True)]
        return torch.stack(distances).mean(0)

    def _features(self, images: Tensor) -> list[Tensor]:
        """Computes the features of the chosen layers, (n, N, C) each, in at least float32."""
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        shown = self.network_input(in_colour(images, self.input_range, type(self).__name__))
        features, patches = _all_features(self.net, shown.to(input_dtype(self.net, shown)))
        try:
            chosen = [features[layer] for layer in self.layers]
        except IndexError:
            raise ValueError(
                f"layers={self.layers}, but {type(self.net).__name__} has {len(features)}: 0 to {len(features) - 1},"
                f" or -{len(features)} to -1"
            ) from None
        chosen = [_by_position(feature, patches) for feature in chosen]
        return [feature.mean(1, keepdim=True) for feature in chosen] if self.pool == "mean" else chosen


def _cosine(one: Tensor, other: Tensor) -> Tensor:
    return _l2(one, other) / 2  # 1 - u . v, exactly 0 for equal features


def _l2(one: Tensor, other: Tensor) -> Tensor:
    one, other = (f * (f.square().sum(-1, keepdim=True) + _SMALLEST_SQUARE).rsqrt() for f in (one, other))
    return (one - other).square().sum(-1).mean(-1)


def _gram(one: Tensor, other: Tensor) -> Tensor:
    one, other = (f.transpose(1, 2) @ f / f.shape[1] for f in (one, other))
    return (one - other).square().mean((1, 2)) / 4


_DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cosine": _cosine, "l2": _l2, "gram": _gram}


def _vision_model(net: nn.Module) -> nn.Module:
    """Returns the part of a network that takes images alone."""
    if not isinstance(net, nn.Module):
        raise TypeError(
            f"Perceptual needs a network, not {net!r}: for a name or folder, use Perceptual.from_pretrained(...)"
        )
    vision = getattr(net, "vision_model", None)
    net = vision if isinstance(vision, nn.Module) else net
    takes = getattr(net, "main_input_name", "pixel_values")
    if takes != "pixel_values":
        raise ValueError(f"{type(net).__name__} takes {takes}, not images: use a vision model")
    return net


def _all_features(net: nn.Module, shown: Tensor) -> tuple[Sequence[Tensor], int | None]:
    """Computes the features of all layers, and the number of patches of the input if the network specifies it."""
    if not hasattr(net, "main_input_name"):
        features = net(shown)
        return ([features] if isinstance(features, Tensor) else features), None
    config = net.config
    other_size = {}
    if "interpolate_pos_encoding" in inspect.signature(net.forward).parameters:
        other_size = {"interpolate_pos_encoding": shown.shape[-2:] != _pair(config.image_size)}
    output = net(pixel_values=shown, output_hidden_states=True, **other_size)
    features = [*(output.hidden_states or ())[:-1], output.last_hidden_state]
    if not isinstance(patch := getattr(config, "patch_size", None), int):
        return features, None
    return features, (shown.shape[-2] // patch) * (shown.shape[-1] // patch)


def _by_position(feature: Tensor, patches: int | None) -> Tensor:
    """Brings features to (n, N, C), without the class and register tokens that precede the patches."""
    if feature.ndim == 4:
        feature = feature.flatten(2).transpose(1, 2)
    elif feature.ndim == 3 and patches is not None:
        feature = feature[:, max(feature.shape[1] - patches, 0) :]
    elif feature.ndim == 2:
        feature = feature.unsqueeze(1)
    return feature.to(torch.promote_types(feature.dtype, torch.float32))


def _pair(size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
