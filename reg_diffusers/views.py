"""Views: transforms of x0_hat that a regularizer sees instead of x0_hat itself, `Term(..., view=...)`.

A view is any callable `(n, C, ...) -> (n, C', H', W')`. It runs once for all terms that share it, on the images with a
non-zero weighting in at least one of them. For a loss that compares with `original_samples`, these pass through the
same view without gradient, unless the loop passes `original_images`, which replace them.

A random view, such as a crop, has a method `draw(x)`. It is called once per step, before the view, and the view uses
the same draw until the next one, so that x0_hat and original_samples get the same transform. If it also has
`cropped(original_images, x, images)`, that method selects the corresponding part of `original_images`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .frozen import FrozenNetworks

__all__ = ["Affine", "DecodedImage", "latent_coordinates"]

_LARGEST_RATIO = 2**12  # of offset to scale in float32, which then resolves 2^-12 of the scale


@dataclass(frozen=True)
class Affine:
    """Converts from a model's units, such as [-1, 1], to the user's units: scale * x + offset.

    Scale and offset are numbers, or sequences with one number per channel. The result has the precision of x. It is
    float64 if an offset exceeds 2^12 times its scale, as for Unix timestamps, because float32 would lose the
    variation.

    Attributes:
        scale: factor, in the user's units per unit of the model.
        offset: value in the user's units where x is 0.

    Raises:
        ValueError: scale or offset is not finite, or its length differs from the number of channels of x.
    """

    scale: float | tuple[float, ...]
    offset: float | tuple[float, ...] = 0.0

    def __post_init__(self):
        for name in ("scale", "offset"):
            value = getattr(self, name)
            value = value.tolist() if hasattr(value, "tolist") else value
            try:
                given = tuple(map(float, value)) if isinstance(value, Sequence) else float(value)
            except (TypeError, ValueError):
                given = math.nan
            if not all(map(math.isfinite, _as_tuple(given))):
                raise ValueError(f"views.Affine: {name} must be a finite number, or one per channel, not {value!r}")
            object.__setattr__(self, name, given)

    def __call__(self, x: Tensor) -> Tensor:
        """Converts x, (n, C, ...), to the user's units, (n, C, ...)."""
        dtype = torch.float64 if self._needs_float64 else torch.promote_types(x.dtype, torch.float32)
        scale, offset = (_factor(value, x.shape[1], x.ndim, x.device, dtype) for value in (self.scale, self.offset))
        return x.to(dtype) * scale + offset

    @property
    def inverse(self) -> Affine:
        """The conversion from the user's units to those of the model; no scale may be 0."""
        scales, offsets = zip(*((1 / scale, -offset / scale) for scale, offset in self._per_channel), strict=True)
        return Affine(*(values if len(values) > 1 else values[0] for values in (scales, offsets)))

    @property
    def _needs_float64(self) -> bool:
        return any(abs(offset) > _LARGEST_RATIO * abs(scale) for scale, offset in self._per_channel)

    @property
    def _per_channel(self) -> list[tuple[float, float]]:
        """Scale and offset of each channel; one pair if both are equal for all channels."""
        scales, offsets = _as_tuple(self.scale), _as_tuple(self.offset)
        length = max(len(scales), len(offsets))
        return list(zip(_to_length(scales, length), _to_length(offsets, length), strict=True))


class DecodedImage(nn.Module):
    """Decodes latents to images in [-1, 1] with a diffusers autoencoder.

        Term(total_variation, weight=0.1, view=DecodedImage(vae))

    The latents are in the coordinates of the diffusion model. The view converts them to those of the autoencoder as
    the autoencoder's pipelines do:

    | the autoencoder has                          | input of `vae.decode`                              |
    |----------------------------------------------|----------------------------------------------------|
    | scaling_factor, shift_factor (default 0)     | x / scaling_factor + shift_factor                  |
    | latents_mean, latents_std per channel        | x * latents_std / scaling_factor + latents_mean    |
    | batch-norm statistics `bn`, patch_size (p, q)| x * sqrt(running_var + eps) + running_mean, then   |
    |                                              | (n, C p q, h, w) -> (n, C, p h, q w)               |

    The loop converts coordinates that belong to a scheduler or a transformer: it unpacks token sequences, moves the
    channels of a video to dimension 1, and divides by a scheduler's sigma_data.

    Shapes: latents (n, C, h, w) give images (n, C', H, W), and videos (n, C, F, h, w) give (n, C', F', H, W). An
    autoencoder for images decodes a video frame by frame; one for videos decodes images as videos of one frame.

    The autoencoder is frozen, in evaluation mode, moved by `.to(device)` and absent from `parameters` and
    `state_dict`. Each call casts the latents to its dtype, and the images to float32. A float16 autoencoder needs the
    loss scaling of the loop, because small gradients are 0 in float16.

    Args:
        vae: a diffusers autoencoder. The module itself is used, not a copy.
        dtype: "auto" decodes in the dtype of `vae`. A torch.dtype decodes in that dtype, with a copy of `vae` if its
            dtype differs.
        checkpointing: compute the activations again in the backward pass instead of saving them: chunk by chunk, and
            within a chunk block by block if `vae` supports it. Must be False if `vae` keeps state between calls.
        chunk: number of images decoded at a time; for an image autoencoder, the number of frames.
        crop: side of a random window of the latents, in latent pixels. Only the window is decoded, (n, C', k H / h,
            k W / w). All images of a step share one window, drawn from torch's global generator on the CPU. None: the
            whole image. At its edges the decoded window differs from the same part of the whole decoded image,
            because the decoder does not see beyond them.

    Raises:
        ValueError: the autoencoder lacks the numbers of the table, the number of its statistics differs from the
            number of channels, or `dtype`, `chunk` or `crop` is invalid.
    """

    def __init__(
        self,
        vae: nn.Module,
        *,
        dtype: torch.dtype | str = "auto",
        checkpointing: bool = True,
        chunk: int = 1,
        crop: int | None = None,
    ):
        super().__init__()
        if dtype != "auto" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f'dtype must be "auto" or a floating-point torch.dtype, not {dtype!r}')
        for name, value in (("chunk", chunk), ("crop", 1 if crop is None else crop)):
            if not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
        self._denormalize, self._patch = latent_coordinates(vae)
        if dtype not in ("auto", vae.dtype):
            vae = nn.Module.to(copy.deepcopy(vae), dtype)  # the loop may still encode with the original
        if checkpointing and _has_blocks_to_checkpoint(vae):
            vae.enable_gradient_checkpointing(_recomputed)  # by a function that pickle finds, so the loss can be saved
        self.networks = FrozenNetworks([vae])
        self.checkpointing = checkpointing
        self.chunk = chunk
        self.crop = crop
        self._is_for_videos = any(isinstance(module, nn.Conv3d) for module in vae.modules())
        self._window: tuple[torch.Size, int, int] | None = None  # size of the latents, first row, first column

    @property
    def vae(self) -> nn.Module:
        """The autoencoder that decodes."""
        (vae,) = self.networks
        return vae

    @property
    def nonfinite_advice(self) -> str:
        """The change to make if decoded images are non-finite; empty if the autoencoder has full precision."""
        if torch.finfo(self.vae.dtype).bits >= 32:
            return ""
        return f"the view decodes in {self.vae.dtype}: use DecodedImage(vae, dtype=torch.float32)"

    def draw(self, x: Tensor) -> None:
        """Draws the window for the following calls; called once per step. Without `crop`, it does nothing.

        Args:
            x: (n, C, ..., h, w) latents; only their size is used.

        Raises:
            ValueError: `crop` exceeds the size of the latents.
        """
        if self.crop is None:
            return
        size = x.shape[-2:]
        if self.crop > min(size):
            raise ValueError(f"crop={self.crop} exceeds the latents, {size[0]} x {size[1]}: use a smaller crop")
        row, column = (int(torch.randint(length - self.crop + 1, (), device="cpu")) for length in size)
        self._window = size, row, column

    def forward(self, x: Tensor) -> Tensor:
        """Decodes latents or, with `crop`, the last drawn window; draws one first if none has this size.

        Args:
            x: (n, C, h, w) or (n, C, F, h, w) latents in the coordinates of the diffusion model.

        Returns:
            (n, C', H, W) or (n, C', F', H, W), in [-1, 1] up to the error of the decoder, float32.

        Raises:
            ValueError: x has a wrong number of dimensions or channels, or is smaller than `crop`.
        """
        self._check(x)
        if self.crop is not None:
            if self._window is None or self._window[0] != x.shape[-2:]:
                self.draw(x)
            _, row, column = self._window
            x = x[..., row : row + self.crop, column : column + self.crop]
        latents = self._denormalize(x)
        if self._patch is not None:
            latents = _without_patches(latents, *self._patch)
        images = self._decode(latents.to(self.vae.dtype))
        return images.to(torch.promote_types(images.dtype, torch.float32))

    def cropped(self, original_images: Tensor, x: Tensor, images: Tensor) -> Tensor:
        """Returns the part of given images that shows the same window as the view's own.

        Args:
            original_images: (n, C', ..., H, W) images that belong to the whole latents.
            x: (n, C, ..., h, w) whole latents.
            images: result of the view for x, (n, C', ..., H', W').

        Raises:
            ValueError: the size of `original_images` differs from the size to which x decodes.
        """
        size, row, column = (x.shape[-2:], 0, 0) if self.crop is None else self._window
        shown = size if self.crop is None else (self.crop, self.crop)
        factors = [pixels // latent for pixels, latent in zip(images.shape[-2:], shown, strict=True)]
        whole = (*images.shape[1:-2], *(length * factor for length, factor in zip(size, factors, strict=True)))
        if original_images.shape[1:] != whole:
            raise ValueError(
                f"original_images have the size {tuple(original_images.shape[1:])}, but the latents decode to {whole}:"
                " pass the images that were encoded, without resizing"
            )
        top, left = row * factors[0], column * factors[1]
        return original_images[..., top : top + images.shape[-2], left : left + images.shape[-1]]

    def _check(self, x: Tensor) -> None:
        if x.ndim not in (4, 5):
            raise ValueError(
                f"DecodedImage needs latents (n, C, h, w) or (n, C, F, h, w), not {tuple(x.shape)}: unpack tokens"
                " first, as the pipeline of the model does"
            )
        channels = _latent_channels(self.vae)
        if channels is not None and x.shape[1] != (channels := channels * math.prod(self._patch or ())):
            raise ValueError(
                f"this VAE decodes {channels} channels, x0_hat has {x.shape[1]}: use the VAE of this model, with the"
                " channels of x0_hat in dimension 1"
            )

    def _decode(self, latents: Tensor) -> Tensor:
        """Decodes images or videos in the coordinates and the dtype of the autoencoder, chunk by chunk."""
        count = len(latents)
        by_frame = latents.ndim == 5 and not self._is_for_videos
        is_one_frame = latents.ndim == 4 and self._is_for_videos
        if by_frame:
            latents = latents.transpose(1, 2).flatten(0, 1)
        if is_one_frame:
            latents = latents.unsqueeze(2)
        images = torch.cat([self._decode_chunk(part) for part in latents.split(self.chunk)])
        if by_frame:
            return images.unflatten(0, (count, -1)).transpose(1, 2)
        return images[:, :, 0] if is_one_frame else images

    def _decode_chunk(self, latents: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled() and latents.requires_grad:
            return checkpoint(self._call_decoder, latents, use_reentrant=False)
        return self._call_decoder(latents)

    def _call_decoder(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents, return_dict=False)[0]


def _recomputed(module: nn.Module, *inputs):
    return checkpoint(module, *inputs, use_reentrant=False)


def latent_coordinates(vae: nn.Module) -> tuple[Affine, tuple[int, int] | None]:
    """Returns the conversion from the model's coordinates to the autoencoder's, and the size of patches if it has any.

    Raises:
        ValueError: the autoencoder does not specify them.
    """
    config = getattr(vae, "config", {})
    if "batch_norm_eps" in config and "patch_size" in config:
        std = (vae.bn.running_var.double() + config.batch_norm_eps).sqrt()
        return Affine(std, vae.bn.running_mean.double()), tuple(config.patch_size)
    if hasattr(vae, "_denormalize_latents"):  # `decode` of representation autoencoders does the conversion
        return Affine(1.0), None
    scaling = config.get("scaling_factor")
    mean, std = (_per_channel_numbers(vae, name) for name in ("latents_mean", "latents_std"))
    if mean is not None and std is not None:
        channels = _latent_channels(vae)
        if channels not in (None, len(mean)):
            raise ValueError(
                f"{type(vae).__name__} has {len(mean)} latents_mean for {channels} channels: use a view of your own,"
                " such as lambda x: vae.decode(x * std + mean).sample"
            )
        return Affine([value / (scaling or 1.0) for value in std], mean), None
    if scaling is None:
        raise ValueError(
            f"{type(vae).__name__} specifies neither scaling_factor nor latents_mean and latents_std: set them, as in"
            " vae.register_to_config(scaling_factor=1.0), or use a view of your own, lambda x: vae.decode(x).sample"
        )
    return Affine(1 / scaling, config.get("shift_factor") or 0.0), None


def _latent_channels(vae: nn.Module) -> int | None:
    """Returns the number of channels that `vae.decode` takes; None if its configuration does not name it."""
    config = getattr(vae, "config", {})
    return config.get("latent_channels") or config.get("z_dim")


def _has_blocks_to_checkpoint(vae: nn.Module) -> bool:
    """Whether the decoder can checkpoint several blocks, which lowers the peak memory of the backward pass."""
    blocks = getattr(getattr(vae, "decoder", None), "up_blocks", ())
    return getattr(vae, "_supports_gradient_checkpointing", False) and len(blocks) > 1


def _per_channel_numbers(vae: nn.Module, name: str) -> list[float] | None:
    """Returns one number per channel from the configuration or a buffer; None if the autoencoder has neither."""
    value = getattr(vae, "config", {}).get(name)
    value = dict(vae.named_buffers(recurse=False)).get(name) if value is None else value
    return None if value is None else torch.as_tensor(value).double().flatten().tolist()


def _without_patches(x: Tensor, rows: int, columns: int) -> Tensor:
    """Moves the pixels of patches from channels to their places, (n, C p q, h, w) -> (n, C, p h, q w)."""
    x = x.unflatten(1, (-1, rows, columns)).permute(0, 1, 4, 2, 5, 3)
    return x.flatten(4, 5).flatten(2, 3)


def _factor(value: float | tuple[float, ...], channels: int, ndim: int, device, dtype) -> float | Tensor:
    """Returns a number unchanged, and one number per channel as a tensor (C, 1, ...)."""
    if isinstance(value, float):
        return value
    if len(value) != channels:
        raise ValueError(
            f"views.Affine has {len(value)} numbers for images of {channels} channels: give one per channel"
        )
    return _per_channel(value, ndim, device, dtype)


@lru_cache(maxsize=64)  # copying from the host in every step would wait for the device
def _per_channel(values: tuple[float, ...], ndim: int, device, dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device).reshape(-1, *(1,) * (ndim - 2))


def _as_tuple(value: float | tuple[float, ...]) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)


def _to_length(values: tuple[float, ...], length: int) -> tuple[float, ...]:
    return values * length if len(values) == 1 else values
