"""Hosts that make x_t out of the loop's sight, split their batches, or offer a method to override.

The same rules as in `host_loops`: each function is one step, and without a network its output is a perfect one.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from host_loops import PATHS, SIGMA_DATA, Step, like, lognormal, squared_error
from torch import nn

from reg_diffusers import AffineSchedule, X0Regularization, model_output_for

# Objects that make x_t


class GaussianDiffusion(nn.Module):
    """An object in the manner of lucidrains': pictures in [0, 1] in, the loss out."""

    def __init__(self, model, kind="epsilon"):
        super().__init__()
        self.model = model
        self.scheduler = DDPMScheduler(prediction_type=kind)
        self.register_buffer("betas", self.scheduler.betas)
        self.kind = kind

    def forward(self, pictures):
        x0 = 2 * pictures - 1
        t = torch.randint(0, len(self.betas), (len(x0),))
        noise = torch.randn_like(x0)
        x_t = self.scheduler.add_noise(x0, noise, t)
        velocity = self.scheduler.get_velocity(x0, noise, t)
        return squared_error(self.model(x_t, t), {"epsilon": noise, "v_prediction": velocity}[self.kind])


class Elucidated(nn.Module):
    """An object in the manner of lucidrains' ElucidatedDiffusion: the network sees c_in x_t and log(sigma) / 4."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, pictures):
        x0 = 2 * pictures - 1
        sigma = lognormal(x0)
        sigmas = like(sigma, x0)
        x_t = x0 + sigmas * torch.randn_like(x0)
        variance = sigmas**2 + SIGMA_DATA**2
        output = self.net(x_t / variance.sqrt(), sigma.log() / 4)
        denoised = SIGMA_DATA**2 / variance * x_t + sigmas * SIGMA_DATA / variance.sqrt() * output
        weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
        return squared_error(denoised, x0, weight)


class KarrasDenoiser(nn.Module):
    """A denoiser with a loss, in the manner of azula: its backbone sees c_in x_t and log(sigma / alpha)."""

    def __init__(self, backbone, schedule):
        super().__init__()
        self.backbone, self.schedule = backbone, schedule

    def loss(self, x, t):
        alpha, sigma = (like(part, x) for part in self.schedule(t))
        x_t = alpha * x + sigma * torch.randn_like(x)
        variance = alpha**2 + sigma**2
        output = self.backbone(x_t / variance.sqrt(), (sigma / alpha).log().flatten())
        mean = alpha / variance * x_t + sigma / variance.sqrt() * output
        return squared_error(mean, x, (variance / sigma**2).flatten())


class Denoiser(nn.Module):
    """A denoiser in the manner of k-diffusion: the loop has the noise and sigma, the inner network sees c_in x_t."""

    def __init__(self, inner_model):
        super().__init__()
        self.inner_model = inner_model

    def loss(self, x, noise, sigma):
        sigmas = like(sigma, x)
        x_t = x + sigmas * noise
        variance = sigmas**2 + SIGMA_DATA**2
        output = self.inner_model(x_t / variance.sqrt(), sigma)
        target = (x - SIGMA_DATA**2 / variance * x_t) / (sigmas * SIGMA_DATA / variance.sqrt())
        return (output - target).square().flatten(1).mean(1)


class Transport:
    """An object in the manner of SiT's: the network is handed over for one step."""

    def training_losses(self, model, x1):
        noise = torch.randn_like(x1)
        t = torch.rand(len(x1))
        times = like(t, x1)
        output = model(times * x1 + (1 - times) * noise, t)
        return {"loss": (output - (x1 - noise)).square().flatten(1).mean(1)}


class Perfect(nn.Module):
    """The network whose output gives the image, by the scheduler that the loss is given.

    A hidden loop with this network has a loss of 0 if and only if that scheduler describes the loop.
    """

    def __init__(self, scheduler, x0, scale=lambda x_t, t: x_t, time=lambda t: t):
        super().__init__()
        self.scheduler, self.x0, self.scale, self.time = scheduler, x0, scale, time

    def forward(self, x_t, t):
        return model_output_for(self.scheduler, self.x0, self.time(t), self.scale(x_t, t)).requires_grad_()


def before_scaling(model_input, c_noise):
    """Returns x_t of what an EDM network sees."""
    sigma = like((4 * c_noise).exp(), model_input)
    return model_input * (sigma**2 + SIGMA_DATA**2).sqrt()


def gaussian_diffusion(x0, network=None, *, kind="epsilon"):
    diffusion = GaussianDiffusion(None, kind)
    scheduler = DDPMScheduler(trained_betas=diffusion.betas.numpy(), prediction_type=kind)
    diffusion.model = Perfect(scheduler, x0) if network is None else network
    with X0Regularization(scheduler, []).watch(diffusion.model) as seen:
        loss = diffusion((x0 + 1) / 2)
        output, timesteps, x_t = seen
    arguments = {"model_output": output, "timesteps": timesteps, "sample": x_t}
    return Step(scheduler, arguments, x0, loss, {"pictures": (x0 + 1) / 2})


def elucidated(x0, network=None):
    scheduler = EDMEulerScheduler(sigma_data=SIGMA_DATA)
    diffusion = Elucidated(Perfect(scheduler, x0, before_scaling) if network is None else network)
    with X0Regularization(scheduler, []).watch(diffusion.net) as seen:
        loss = diffusion((x0 + 1) / 2)
        output, timesteps, model_input = seen
    sample = before_scaling(model_input, timesteps)
    arguments = {"model_output": output, "timesteps": timesteps, "sample": sample}
    return Step(scheduler, arguments, x0, loss, {"model_input": model_input})


def karras_denoiser(x0, network=None):
    schedule = AffineSchedule(
        lambda u: (1 + (2 * u).exp()) ** -0.5, lambda u: (1 + (-2 * u).exp()) ** -0.5, "v_prediction", -1
    )
    alpha, sigma = PATHS["GVP"]
    backbone = Perfect(schedule, x0) if network is None else network
    denoiser = KarrasDenoiser(backbone, lambda t: (alpha(t), sigma(t)))
    with X0Regularization(schedule, []).watch(denoiser.backbone) as seen:
        loss = denoiser.loss(x0, 0.01 + 0.98 * torch.rand(len(x0)))
        output, timesteps, x_t = seen
    return Step(schedule, {"model_output": output, "timesteps": timesteps, "sample": x_t}, x0, loss)


def inner_denoiser(x0, network=None):
    scheduler = EDMEulerScheduler(sigma_data=SIGMA_DATA)
    noise, sigma = torch.randn_like(x0), lognormal(x0)

    def scale(model_input, sigma):
        return before_scaling(model_input, sigma.log() / 4)

    inner_model = Perfect(scheduler, x0, scale, lambda sigma: sigma.log() / 4) if network is None else network
    denoiser = Denoiser(inner_model)
    with X0Regularization(scheduler, []).watch(denoiser.inner_model) as seen:
        loss = denoiser.loss(x0, noise, sigma).mean()
        output, seen_time, model_input = seen
    arguments = {"model_output": output, "timesteps": sigma.log() / 4, "sample": x0 + like(sigma, x0) * noise}
    return Step(scheduler, arguments, x0, loss, {"seen_time": seen_time, "model_input": model_input})


def transport(x0, network=None):
    schedule = AffineSchedule(*PATHS["linear"], "velocity")
    model = Perfect(schedule, x0) if network is None else network
    with X0Regularization(schedule, []).watch(model) as seen:
        loss = Transport().training_losses(model, x0)["loss"].mean()
        output, timesteps, x_t = seen
    return Step(schedule, {"model_output": output, "timesteps": timesteps, "sample": x_t}, x0, loss)


# Parts of a batch


def prior_preservation(x0, network=None):
    """The dreambooth scripts: the second half of the batch are pictures of the class."""
    scheduler = DDPMScheduler()
    noise = torch.randn_like(x0)
    timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(x0),))
    x_t = scheduler.add_noise(x0, noise, timesteps)
    output = noise if network is None else network(x_t, timesteps)
    is_instance = torch.arange(len(output)) < len(output) // 2
    arguments = {"model_output": output, "timesteps": timesteps, "sample": x_t, "image_mask": is_instance}
    instance, prior = output.chunk(2)
    target, target_prior = noise.chunk(2)
    loss = squared_error(instance, target) + squared_error(prior, target_prior)
    return Step(scheduler, arguments, x0, loss, {"instance": instance, "x_t": x_t})


def dropped_prompts(x0, network=None):
    """instruct_pix2pix and the like: some prompts are replaced by the empty one, for classifier-free guidance."""
    scheduler = DDPMScheduler()
    noise = torch.randn_like(x0)
    timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(x0),))
    x_t = scheduler.add_noise(x0, noise, timesteps)
    is_dropped = torch.rand(len(x0)) < 0.1
    output = noise if network is None else network(x_t, timesteps)
    arguments = {"model_output": output, "timesteps": timesteps, "sample": x_t, "image_mask": ~is_dropped}
    return Step(scheduler, arguments, x0, squared_error(output, noise), {"is_dropped": is_dropped})


# Methods to override


class LossTrainer:
    """A trainer whose method hands over x_t and the timesteps, in the manner of ai-toolkit."""

    def calculate_loss(self, noise_pred, noise, noisy_latents, timesteps, batch, **kwargs):
        return F.mse_loss(noise_pred.float(), (noise - batch.latents).float())

    def train_step(self, x0, network):
        noise = torch.randn_like(x0)
        timesteps = torch.linspace(1000, 1, 1000)[torch.randint(0, 1000, (len(x0),))]
        times = like(timesteps, x0) / 1000
        x_t = (1 - times) * x0 + times * noise
        output = noise - x0 if network is None else network(x_t, timesteps)
        return self.calculate_loss(output, noise, x_t, timesteps, SimpleNamespace(latents=x0))


class CallTrainer:
    """A trainer with one method that is given x_t and another that makes the loss, in the manner of musubi-tuner."""

    def call_dit(self, network, latents, noise, noisy_model_input, timesteps):
        target = noise - latents
        output = target if network is None else network(noisy_model_input, timesteps)
        return SimpleNamespace(pred=output, target=target, extra={})

    def compute_loss(self, output, timesteps):
        return F.mse_loss(output.pred, output.target), {}

    def train_step(self, x0, network):
        noise = torch.randn_like(x0)
        t = torch.randn(len(x0)).sigmoid()
        x_t = (1 - like(t, x0)) * x0 + like(t, x0) * noise
        timesteps = 1000 * t + 1
        return self.compute_loss(self.call_dit(network, x0, noise, x_t, timesteps), timesteps)[0]


def loss_method(x0, network=None):
    """An override of `calculate_loss`."""
    given = {}

    class Ours(LossTrainer):
        def calculate_loss(self, noise_pred, noise, noisy_latents, timesteps, batch, **kwargs):
            given.update(model_output=noise_pred, timesteps=timesteps, sample=noisy_latents)
            return super().calculate_loss(noise_pred, noise, noisy_latents, timesteps, batch, **kwargs)

    loss = Ours().train_step(x0, network)
    return Step(FlowMatchEulerDiscreteScheduler(), given, x0, loss, {"places": (1000 - given["timesteps"]).long()})


def two_methods(x0, network=None):
    """Overrides of `call_dit`, which keeps x_t, and `compute_loss`, where the timesteps are too large by 1."""
    given = {}

    class Ours(CallTrainer):
        def call_dit(self, network, latents, noise, noisy_model_input, timesteps):
            output = super().call_dit(network, latents, noise, noisy_model_input, timesteps)
            output.extra["x_t"] = noisy_model_input
            return output

        def compute_loss(self, output, timesteps):
            given.update(model_output=output.pred, timesteps=timesteps - 1, sample=output.extra["x_t"])
            return super().compute_loss(output, timesteps)

    loss = Ours().train_step(x0, network)
    return Step(FlowMatchEulerDiscreteScheduler(), given, x0, loss, {"timesteps": given["timesteps"] + 1})
