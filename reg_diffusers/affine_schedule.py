"""A noise schedule given by two functions of time, for training loops without a diffusers scheduler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor

from .parameterization import Factors, Parameterization

__all__ = ["AffineSchedule"]

_PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction", "velocity")
_NO_SLOPE = (
    "the derivatives of alpha and sigma are those of autograd, which found none: with prediction_type='velocity' use"
    " torch functions of the time in them, without numpy, tables, .detach() or torch.no_grad"
)


class AffineSchedule:
    """Describes x_t = alpha(t) x_0 + sigma(t) eps to the loss, in place of a diffusers scheduler.

        linear = AffineSchedule(lambda t: t, lambda t: 1 - t, "velocity")  # SiT: t = 1 is the image
        regularization = X0Regularization(linear, [Term(total_variation, weight=0.1)])

    | prediction_type | the network's output, times `sign`                       |
    |-----------------|----------------------------------------------------------|
    | epsilon         | eps                                                      |
    | sample          | x_0                                                      |
    | v_prediction    | alpha eps - sigma x_0, with alpha^2 + sigma^2 = 1        |
    | flow_prediction | eps - x_0, with alpha + sigma = 1                        |
    | velocity        | d x_t / d t = alpha' x_0 + sigma' eps                    |

    For the velocity, x0_hat = (sigma' x_t - sigma o) / (alpha sigma' - sigma alpha'), with derivatives by autograd
    (Ma et al. 2024, SiT, arXiv:2401.08740; Albergo et al. 2023, arXiv:2303.08797).

    Args:
        alpha: t -> factor of the image, elementwise on a tensor. A constant function may return a number.
        sigma: t -> factor of the noise, likewise.
        prediction_type: one of the table.
        sign: -1 if the network returns the negative of the table's output.
        denoising_weight: t -> w_d, the weight of the loop's own loss in units of ||x_0 - x0_hat||^2. Default:
            1 / (d x0_hat / d o)^2, the weight of the unweighted squared error of the output.

    Raises:
        ValueError: an unknown prediction_type or sign.
        TypeError: alpha, sigma or denoising_weight is not callable.

    With "velocity", a batch of timesteps raises ValueError if autograd finds no derivative of an alpha or sigma that
    is not constant, as of a table or numpy (checked on the CPU only).
    """

    def __init__(
        self,
        alpha: Callable[[Tensor], Tensor],
        sigma: Callable[[Tensor], Tensor],
        prediction_type: str,
        sign: int = 1,
        denoising_weight: Callable[[Tensor], Tensor] | None = None,
    ):
        for name, function in {"alpha": alpha, "sigma": sigma, "denoising_weight": denoising_weight}.items():
            if not (callable(function) or (function is None and name == "denoising_weight")):
                raise TypeError(f"{name} must be a function of the time, such as lambda t: 1 - t, not {function!r}")
        if prediction_type not in _PREDICTION_TYPES:
            known = ", ".join(_PREDICTION_TYPES)
            raise ValueError(f"prediction_type={prediction_type!r} is unknown; known: {known}")
        if sign not in (1, -1):
            raise ValueError(f"sign must be 1 or -1, not {sign!r}")
        self.alpha = alpha
        self.sigma = sigma
        self.sign = sign
        self.denoising_weight = denoising_weight
        self.config = FrozenDict(prediction_type=prediction_type)

    def alpha_sigma(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (alpha, sigma) of each timestep, in at least float32."""
        timesteps = timesteps.to(torch.promote_types(timesteps.dtype, torch.float32))
        return _values(self.alpha, timesteps), _values(self.sigma, timesteps)

    def parameterization(self, kind: Parameterization | None) -> Parameterization:
        """Returns the meaning of the output; `kind` is that of the prediction type, None for the velocity."""
        return _Affine(self, _Velocity(self) if kind is None else kind)

    @property
    def end(self) -> float:
        """The time of the clean image, 0 or 1.

        Raises:
            ValueError: sigma is not 0 at exactly one of the two.
        """
        sigma = _values(self.sigma, torch.tensor([0.0, 1.0], dtype=torch.float64, device="cpu"))
        ends = (sigma.abs() < 1e-6).nonzero().flatten().tolist()
        if len(ends) != 1:
            raise ValueError(
                "this estimator needs an AffineSchedule with sigma(0) = 0 or sigma(1) = 0, to know the end"
            )
        return float(ends[0])


@dataclass(frozen=True)
class _Affine(Parameterization):
    """The meaning of the output with the sign and the weight of an `AffineSchedule`."""

    schedule: AffineSchedule
    kind: Parameterization

    def x0_hat(self, output, sample, at):
        if self.schedule.config.prediction_type == "epsilon":
            _refuse_zero_alpha(at)
        return self.kind.x0_hat(self.schedule.sign * output, sample, at)

    def target(self, original_samples, noise, at):
        return self.schedule.sign * self.kind.target(original_samples, noise, at)

    def denoising_weight(self, at):
        own = self.schedule.denoising_weight
        return self.output_weight(at) if own is None else _values(own, at.timesteps).to(at.sigma)

    def output_weight(self, at):
        return self.kind.denoising_weight(at)


@dataclass(frozen=True)
class _Velocity(Parameterization):
    schedule: AffineSchedule

    def x0_hat(self, output, sample, at):
        alpha_slope, sigma_slope = self._slopes(at)
        return (sigma_slope * sample - at.sigma * output) / (at.alpha * sigma_slope - at.sigma * alpha_slope)

    def target(self, original_samples, noise, at):
        alpha_slope, sigma_slope = self._slopes(at)
        return alpha_slope * original_samples + sigma_slope * noise

    def denoising_weight(self, at):
        alpha_slope, sigma_slope = self._slopes(at)
        return ((at.alpha * sigma_slope - at.sigma * alpha_slope) / at.sigma) ** 2

    def _slopes(self, at: Factors) -> tuple[Tensor, Tensor]:
        """Returns d alpha / d t and d sigma / d t."""
        functions = (self.schedule.alpha, self.schedule.sigma)
        return tuple(_slope(function, at.timesteps).to(at.sigma) for function in functions)


def _refuse_zero_alpha(at: Factors) -> None:
    """Raises ValueError where noise prediction cannot give x0_hat, on the CPU only."""
    if at.alpha.device.type == "cpu" and not torch.compiler.is_compiling() and bool((at.alpha == 0).any()):
        time = at.timesteps[at.alpha == 0][0].item()
        raise ValueError(
            f"prediction_type='epsilon' cannot give x0_hat at timestep {time:g}, where alpha is 0: leave such images"
            " out by a weighting, such as matched, or by image_mask="
        )


def _values(function: Callable[[Tensor], Tensor], timesteps: Tensor) -> Tensor:
    values = torch.as_tensor(function(timesteps), dtype=timesteps.dtype, device=timesteps.device)
    if values.numel() != 1 and values.shape != timesteps.shape:
        raise ValueError(
            "alpha, sigma and denoising_weight must return a number, or one for each of the timesteps of shape"
            f" {tuple(timesteps.shape)}, not {tuple(values.shape)}"
        )
    return values.expand_as(timesteps)


def _slope(function: Callable[[Tensor], Tensor], timesteps: Tensor) -> Tensor:
    """Differentiates a function of time, (B,) -> (B,), by autograd.

    Raises:
        ValueError: autograd cannot differentiate it, as a table or numpy.
    """
    with torch.inference_mode(False), torch.enable_grad():
        time = timesteps.detach().clone().requires_grad_()
        try:
            value = torch.as_tensor(function(time))
        except RuntimeError as error:
            if "numpy()" not in str(error):
                raise
            raise ValueError(_NO_SLOPE) from None
        if value.requires_grad:
            return torch.autograd.grad(value.sum(), time)[0]
        is_seen = value.device.type == "cpu" and not torch.compiler.is_compiling()  # elsewhere reading would wait
        if is_seen and not torch.equal(value, torch.as_tensor(function(time.detach() / 2))):
            raise ValueError(_NO_SLOPE)
        return torch.zeros_like(time)  # a constant
