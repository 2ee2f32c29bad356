"""Training loops of each kind of wiring, from public parts, up to the line where the extra loss is added.

Each loop takes clean images and a network, and returns what it has in hand where its own loss is computed. Without a
network its output is the loop's own target: a perfect one. `hosts.py` and the tests measure and check with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
)
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
    compute_snr,
)
from torch import Tensor

from reg_diffusers import AffineSchedule, model_output_for

SIGMA_DATA = 0.5


@dataclass(frozen=True)
class Step:
    """One step of a loop.

    Attributes:
        scheduler: what the loss is given, a scheduler or an `AffineSchedule`.
        arguments: the arguments of the loss by name, as the page of this kind passes them.
        original_samples: (B, C, ...) x_0.
        loss: the loop's own loss.
        local: further variables of the loop, which a first try may pass by mistake.
    """

    scheduler: Any
    arguments: dict[str, Any]
    original_samples: Tensor
    loss: Tensor
    local: dict[str, Any] = field(default_factory=dict)

    def replaced(self, **arguments) -> Step:
        """Returns the step with some arguments of the loss replaced."""
        return replace(self, arguments={**self.arguments, **arguments})

    def of_verify(self) -> dict[str, Any]:
        """Returns the arguments of `verify`, with the loop's target in the place of the network's output."""
        names = ("model_output", "x0_hat", "timesteps", "sample")
        given = {name: self.arguments[name] for name in names if name in self.arguments}
        return {"original_samples": self.original_samples, "sample": self.local.get("x_t"), **given}


Network = Callable[[Tensor, Tensor], Tensor]
Loop = Callable[[Tensor, "Network | None"], Step]


def squared_error(output: Tensor, target: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """Computes the mean over the batch of weight * ||output - target||^2, weight (B,)."""
    return (weight * (output.float() - target.float()).square().flatten(1).mean(1)).mean()


def like(values: Tensor, images: Tensor) -> Tensor:
    """Reshapes one value per image, (B,), to (B, 1, ...)."""
    return values.reshape(-1, *(1,) * (images.ndim - 1))


# Noise or v prediction with a DDPM scheduler


def ddpm(x0, network=None, *, kind="epsilon", snr_gamma=None, offset=0.0, model_dtype=None, dtype=torch.float32):
    """train_unconditional, text_to_image, their SDXL versions and controlnet; Lightning by the two dtypes."""
    scheduler = DDPMScheduler(prediction_type=kind)
    x0 = x0.to(dtype)
    noise = torch.randn_like(x0) + offset * torch.randn_like(x0[..., :1, :1])
    timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(x0),))
    x_t = scheduler.add_noise(x0, noise, timesteps)
    velocity = scheduler.get_velocity(x0, noise, timesteps)
    target = {"epsilon": noise, "sample": x0, "v_prediction": velocity}[kind]
    snr = compute_snr(scheduler, timesteps)
    weight = torch.ones_like(snr)
    if kind == "sample":
        weight = snr
    if snr_gamma is not None:
        weight = snr.clamp(max=snr_gamma) / (snr + (1 if kind == "v_prediction" else 0))
    output = target.to(model_dtype or dtype) if network is None else network(x_t, timesteps)
    arguments = {"model_output": output, "timesteps": timesteps, "sample": x_t, "loss_weight": weight}
    return Step(scheduler, arguments, x0, squared_error(output, target, weight), locals())


# Flow matching


def drawn_flow(scheduler, x0, density):
    """Draws timesteps and sigmas as diffusers' scripts do."""
    u = compute_density_for_timestep_sampling(density, len(x0), logit_mean=0.0, logit_std=1.0, mode_scale=1.29)
    indices = (u * scheduler.config.num_train_timesteps).long()
    return scheduler.timesteps[indices], scheduler.sigmas[indices]


def flow(x0, network=None, *, shift=1.0, density="logit_normal", weighting="none"):
    """The scripts for Flux, Flux 2, Qwen-Image, Sana and the like; SD3 without preconditioned outputs."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    noise = torch.randn_like(x0)
    timesteps, sigma = drawn_flow(scheduler, x0, density)
    sigmas = like(sigma, x0)
    x_t = (1.0 - sigmas) * x0 + sigmas * noise
    target = noise - x0
    packed = None
    if network is None and x0.ndim == 4:  # tokens, as the transformer of Flux returns them
        packed = FluxPipeline._pack_latents(target, *target.shape)
        output = FluxPipeline._unpack_latents(packed, *(8 * length for length in x0.shape[2:]), 8)
    else:
        output = target if network is None else network(x_t, timesteps)
    weight = compute_loss_weighting_for_sd3(weighting, sigma)
    arguments = {"model_output": output, "timesteps": timesteps, "sample": x_t, "loss_weight": weight}
    return Step(scheduler, arguments, x0, squared_error(output, target, weight), locals())


def dynamic_flow(x0, network=None):
    """A flow whose shift depends on the size of the image."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    noise = torch.randn_like(x0)
    mu = 0.5 + 0.65 * x0[0, 0].numel() / 4096
    sigma = scheduler.time_shift(mu, 1.0, torch.rand(len(x0)).clamp(min=1e-3))
    sigmas = like(sigma, x0)
    x_t = (1.0 - sigmas) * x0 + sigmas * noise
    target = noise - x0
    output = target if network is None else network(x_t, sigma)
    timesteps = scheduler.config.num_train_timesteps * sigma
    arguments = {"model_output": output, "timesteps": timesteps, "sample": x_t}
    return Step(scheduler, arguments, x0, squared_error(output, target), locals())


# Outputs that the loop converts to an image before its loss


def preconditioned_flow(x0, network=None, *, density="logit_normal", weighting="sigma_sqrt"):
    """The scripts for SD3 by default (precondition_outputs)."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    noise = torch.randn_like(x0)
    timesteps, sigma = drawn_flow(scheduler, x0, density)
    sigmas = like(sigma, x0)
    x_t = (1.0 - sigmas) * x0 + sigmas * noise
    output = noise - x0 if network is None else network(x_t, timesteps)
    image = output * (-sigmas) + x_t
    weight = compute_loss_weighting_for_sd3(weighting, sigma)
    arguments = {"x0_hat": image, "timesteps": timesteps, "loss_weight": weight}
    return Step(scheduler, arguments, x0, squared_error(image, x0, weight), locals())


def edm_style(x0, network=None, *, scheduler):
    """The SDXL scripts with do_edm_style_training."""
    noise = torch.randn_like(x0)
    indices = torch.randint(0, scheduler.config.num_train_timesteps, (len(x0),))
    timesteps, sigma = scheduler.timesteps[indices], scheduler.sigmas[indices]
    sigmas = like(sigma, x0)
    x_t = scheduler.add_noise(x0, noise, timesteps)
    if isinstance(scheduler, EDMEulerScheduler):
        model_input = scheduler.precondition_inputs(x_t, sigmas)
        output = (
            model_output_for(scheduler, x0, timesteps, x_t) if network is None else network(model_input, timesteps)
        )
        image = scheduler.precondition_outputs(x_t, output, sigmas)
        weight = torch.ones_like(sigma)
    else:
        model_input = x_t / (sigmas**2 + 1) ** 0.5
        output = noise if network is None else network(model_input, timesteps)
        image = output * (-sigmas) + x_t
        weight = sigma**-2.0
    arguments = {"x0_hat": image, "timesteps": timesteps, "loss_weight": weight}
    return Step(scheduler, arguments, x0, squared_error(image, x0, weight), locals())


def cogvideox(x0, network=None):
    """The CogVideoX scripts, with videos (B, F, C, H, W): `get_velocity` makes the image."""
    scheduler = CogVideoXDDIMScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear")
    video = x0.transpose(1, 2)
    noise = torch.randn_like(video)
    timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(video),))
    x_t = scheduler.add_noise(video, noise, timesteps)
    output = scheduler.get_velocity(video, noise, timesteps) if network is None else network(x_t, timesteps)
    image = scheduler.get_velocity(output, x_t, timesteps)
    weight = 1 / (1 - scheduler.alphas_cumprod[timesteps])
    arguments = {"x0_hat": image.transpose(1, 2), "timesteps": timesteps, "loss_weight": weight}
    local = {"x_t": x_t.transpose(1, 2), "image": image, "video_x_t": x_t, "output": output}
    return Step(scheduler, arguments, x0, squared_error(image, video, weight), local)


# Reversed sign or time, divided time


def lumina2(x0, network=None):
    """Lumina2: time 1 is the image, divided by 1000 under the same name, and the target is x_0 - eps."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    noise = torch.randn_like(x0)
    timesteps, sigma = drawn_flow(scheduler, x0, "logit_normal")
    sigmas = like(sigma, x0)
    x_t = (1.0 - sigmas) * noise + sigmas * x0
    timesteps = timesteps / scheduler.config.num_train_timesteps
    target = x0 - noise
    output = target if network is None else network(x_t, timesteps)
    arguments = {"model_output": output, "timesteps": timesteps, "sample": x_t}
    schedule = AffineSchedule(lambda t: t, lambda t: 1 - t, "velocity")
    return Step(schedule, arguments, x0, squared_error(output, target), locals())


def negated(x0, network=None, *, divides=True):
    """Z-Image and HiDream: the script turns the sign of the output; Z-Image's network has another time."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    noise = torch.randn_like(x0)
    timesteps, sigma = drawn_flow(scheduler, x0, "none")
    sigmas = like(sigma, x0)
    x_t = (1.0 - sigmas) * x0 + sigmas * noise
    network_time = (1000 - timesteps) / 1000 if divides else timesteps
    raw = x0 - noise if network is None else network(x_t, network_time)
    output = -raw
    arguments = {"model_output": output, "timesteps": timesteps, "sample": x_t}
    return Step(scheduler, arguments, x0, squared_error(output, noise - x0), locals())


def ideogram(x0, network=None):
    """Ideogram: sigma itself is drawn, the network's time is 1 - sigma, and its target x_0 - eps."""
    noise = torch.randn_like(x0)
    sigma = compute_density_for_timestep_sampling("logit_normal", len(x0), logit_mean=0.0, logit_std=1.5)
    sigmas = like(sigma, x0)
    x_t = (1.0 - sigmas) * x0 + sigmas * noise
    network_time = 1.0 - sigma
    output = x0 - noise if network is None else network(x_t, network_time)
    schedule = AffineSchedule(lambda t: 1 - t, lambda t: t, "flow_prediction", sign=-1)
    arguments = {"model_output": output, "timesteps": sigma, "sample": x_t}
    return Step(schedule, arguments, x0, squared_error(output, x0 - noise), locals())


PATHS = {  # of SiT; t = 1 is the image
    "linear": (lambda t: t, lambda t: 1 - t),
    "GVP": (lambda t: (math.pi / 2 * t).sin(), lambda t: (math.pi / 2 * t).cos()),
    "VP": (
        lambda t: (-0.25 * (1 - t) ** 2 * 19.9 - 0.05 * (1 - t)).exp(),
        lambda t: (1 - (-0.5 * (1 - t) ** 2 * 19.9 - 0.1 * (1 - t)).exp()).sqrt(),
    ),
}


def interpolant(x0, network=None, *, path="linear"):
    """SiT and PBFM: the derivative of a path from noise at t = 0 to the image at t = 1."""
    alpha, sigma = PATHS[path]
    noise = torch.randn_like(x0)
    t = torch.rand(len(x0)) * 0.998 + 0.001
    x_t = like(alpha(t), x0) * x0 + like(sigma(t), x0) * noise
    slopes = [torch.func.vmap(torch.func.grad(factor))(t) for factor in (alpha, sigma)]
    target = like(slopes[0], x0) * x0 + like(slopes[1], x0) * noise
    output = target if network is None else network(x_t, t)
    schedule = AffineSchedule(alpha, sigma, "velocity")
    arguments = {"model_output": output, "timesteps": t, "sample": x_t}
    return Step(schedule, arguments, x0, squared_error(output, target), locals())


# Sigma as time


def lognormal(images):
    return (1.2 * torch.randn(len(images)) - 1.2).exp()


def edm(x0, network=None):
    """EDM and EDM2: the network is a denoiser, and its loss is weighted."""
    sigma = lognormal(x0)
    noise = torch.randn_like(x0)
    x_t = x0 + like(sigma, x0) * noise
    denoised = x0 if network is None else network(x_t, sigma)
    weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
    schedule = AffineSchedule(lambda sigma: 1.0, lambda sigma: sigma, "sample")
    arguments = {"model_output": denoised, "timesteps": sigma, "sample": x_t, "loss_weight": weight}
    return Step(schedule, arguments, x0, squared_error(denoised, x0, weight), locals())


def k_diffusion(x0, network=None):
    """k-diffusion: the inner network's output is compared with (x_0 - c_skip x_t) / c_out."""
    scheduler = EDMEulerScheduler(sigma_data=SIGMA_DATA)
    sigma = lognormal(x0)
    noise = torch.randn_like(x0)
    sigmas = like(sigma, x0)
    x_t = x0 + sigmas * noise
    variance = sigmas**2 + SIGMA_DATA**2
    target = (x0 - SIGMA_DATA**2 / variance * x_t) / (sigmas * SIGMA_DATA / variance.sqrt())
    c_noise = sigma.log() / 4
    output = target if network is None else network(x_t / variance.sqrt(), c_noise)
    arguments = {"model_output": output, "timesteps": c_noise, "sample": x_t}
    return Step(scheduler, arguments, x0, squared_error(output, target), locals())


def azula(x0, network=None):
    """azula: the denoiser returns the mean, at a time in [0, 1]; here on its variance-preserving schedule."""

    def alpha(t):
        return (math.log(1e-3) * t**2).exp()

    def sigma(t):
        return (1 - alpha(t) ** 2 + 1e-3**2).sqrt()

    t = torch.rand(len(x0))
    noise = torch.randn_like(x0)
    x_t = like(alpha(t), x0) * x0 + like(sigma(t), x0) * noise
    mean = x0 if network is None else network(x_t, t)
    weight = (alpha(t) / sigma(t)) ** 2 + 1
    schedule = AffineSchedule(alpha, sigma, "sample")
    arguments = {"model_output": mean, "timesteps": t, "sample": x_t, "loss_weight": weight}
    return Step(schedule, arguments, x0, squared_error(mean, x0, weight), locals())
