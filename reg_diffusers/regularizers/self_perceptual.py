"""Perceptual loss without another network: features of the diffusion model itself."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..frozen import FrozenNetworks
from ..precision import input_dtype
from ..prediction import add_noise, noise_level, scale_model_input, tensor_of
from ..schedule import unit_of_time

__all__ = ["SelfPerceptual"]

_SIGMA = 0.05  # of the default timestep, with alpha = 0.95: the features of a picture that is almost clean
_LEAST_SNR = 1.0


class SelfPerceptual(nn.Module):
    r"""Compares x0_hat with its own image by the middle features of a frozen copy of a diffusion model.

        Term(SelfPerceptual(UNet2DModel.from_pretrained(...), noise_scheduler), weight=0.1, weighting=gated(0.184))

    Both images are noised slightly again with the same new noise z, and f are the features after a block of the model:

        L' = mean (f(alpha x0_hat + sigma z) - f(alpha x_0 + sigma z))^2

    It needs no other network and works in the model's own space, so latents need no decoding. It is 0 for equal
    images; its size depends on the model. z is drawn from torch's global generator in each call. The forward pass ends
    at the block; it runs twice per step, once without gradient.

    The model is copied when the loss is made. Use a trained one: the features of a random model say little. The copy
    is frozen, in evaluation mode, moved by `.to(device)` and absent from `parameters` and `state_dict`.

    Source: Lin & Yang 2024 (arXiv:2401.00110), the self-perceptual objective.

    Args:
        model: the network, `model(x_t, timesteps, **conditions)`.
        scheduler: its noise scheduler.
        timestep: timestep of the new noise, in the scheduler's unit, with SNR at least 1. None: that at which sigma /
            alpha is closest to 0.05 / 0.95; for flow matching, t = 0.05.
        block: name of the submodule whose output is compared.
        conditions: names of further arguments of the model, such as ("class_labels",). They are added to `needs`.

    Raises:
        ValueError: the model lacks the block, the SNR is below 1, or the scheduler has no default timestep.
    """

    def __init__(
        self,
        model: nn.Module,
        scheduler,
        *,
        timestep: float | None = None,
        block: str = "mid_block",
        conditions: Sequence[str] = (),
    ):
        super().__init__()
        model = copy.deepcopy(model)
        self.networks = FrozenNetworks([model])
        try:
            model.get_submodule(block).register_forward_hook(_stop)
        except AttributeError:
            children = ", ".join(name for name, _ in model.named_children())
            raise ValueError(f"{type(model).__name__} has no block {block!r}, but {children}: pass block=") from None
        self.scheduler = scheduler
        self.timestep = _almost_clean(scheduler) if timestep is None else timestep
        snr = noise_level(scheduler, self.timestep).snr.item()
        if snr < _LEAST_SNR:
            raise ValueError(
                f"timestep={timestep} has an SNR of {snr:.2g}, at which features show noise: use one of at least 1"
            )
        self.block = block
        self.conditions = tuple(conditions)
        self.needs = ("original_samples", *self.conditions)

    @property
    def model(self) -> nn.Module:
        """The frozen copy."""
        (model,) = self.networks
        return model

    def forward(self, x0_hat: Tensor, /, *, original_samples: Tensor, **conditions) -> Tensor:
        """Computes the distance of each image, (n,).

        Args:
            x0_hat: (n, C, ...) in the model's units.
            original_samples: (n, C, ...), the images to compare with.
            **conditions: those named in `conditions`, for the n images.

        Raises:
            ValueError: the model does not run the block.
        """
        noise = torch.randn_like(x0_hat)
        with torch.no_grad():
            expected = self._features(original_samples, noise, conditions)
        difference = self._features(x0_hat, noise, conditions) - expected
        return difference.square().flatten(1).mean(1)

    def _features(self, images: Tensor, noise: Tensor, conditions: dict) -> Tensor:
        """Computes the output of the block, in at least float32."""
        timesteps = torch.full((len(images),), self.timestep, device=images.device)
        level = noise_level(self.scheduler, timesteps)
        sample = scale_model_input(self.scheduler, add_noise(self.scheduler, images, noise, level), level)
        try:
            self.model(sample.to(input_dtype(self.model, sample)), timesteps, **conditions)
        except _Reached as reached:
            features = reached.features
            return features.to(torch.promote_types(features.dtype, torch.float32))
        raise ValueError(f"{type(self.model).__name__} did not run its block {self.block!r}: pass another block=")


class _Reached(Exception):
    """Ends the forward pass of the model at the block, because later layers are not needed."""

    def __init__(self, features: Tensor):
        super().__init__()
        self.features = features


def _stop(block: nn.Module, inputs: tuple, output) -> None:
    raise _Reached(tensor_of(output))


def _almost_clean(scheduler) -> float:
    """Returns the timestep at which sigma / alpha is closest to that of t = 0.05 in flow matching."""
    unit = unit_of_time(scheduler)
    if unit == "flow":
        return _SIGMA * scheduler.config.num_train_timesteps
    if unit not in ("index", "interpolated"):
        raise ValueError(f"timestep must be passed for {type(scheduler).__name__}, such as one with sigma = {_SIGMA}")
    snr = noise_level(scheduler, torch.arange(scheduler.config.num_train_timesteps)).snr
    return (snr / ((1 - _SIGMA) / _SIGMA) ** 2).log().abs().argmin().item()
