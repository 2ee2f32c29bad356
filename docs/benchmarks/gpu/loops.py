"""Two training loops on generated images: the usual one, and that of train_reg.py."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from reg_diffusers import RegularizedLoss, draw_timesteps

__all__ = ["Images", "ours", "usual"]

LEARNING_RATE, DECAY, CLIP = 1e-4, 0.9999, 1.0


class Images:
    """Batches of generated images on the device: waves with random frequencies, in [-1, 1].

    Args:
        number: images per batch.
        side: pixels per side.
        device: their device.
    """

    def __init__(self, number: int, side: int, device: torch.device):
        frequencies = torch.rand(4, number, 3, 1, 1, device=device) * 6
        x = torch.linspace(0, torch.pi, side, device=device)
        self.batch = (frequencies[0] * x + frequencies[1] * x[:, None] + frequencies[2]).sin()

    def __call__(self) -> Tensor:
        return self.batch


def usual(
    network: UNet2DModel, images: Images, *, precision: torch.dtype | None, scaler: torch.amp.GradScaler | None = None
) -> Callable[[], Tensor]:
    """Returns a step as in diffusers' train_unconditional.py: no extra loss, AdamW with its defaults, EMA."""
    network = copy.deepcopy(network).train()
    noise_scheduler, device = DDPMScheduler(), images.batch.device
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, betas=(0.95, 0.999), weight_decay=1e-6)
    ema = EMAModel(network.parameters(), decay=DECAY, use_ema_warmup=True, inv_gamma=1.0, power=0.75)

    def step() -> Tensor:
        samples = images()
        noise = torch.randn_like(samples)
        timesteps = torch.randint(0, 1000, (len(samples),), device=device)
        noisy_samples = noise_scheduler.add_noise(samples, noise, timesteps)
        with _autocast(device, precision):
            model_output = network(noisy_samples, timesteps).sample
        loss = F.mse_loss(model_output.float(), noise)
        _update(loss, network, optimizer, ema, scaler)
        return loss.detach()

    return step


def ours(
    network: UNet2DModel,
    images: Images,
    terms: tuple = (),
    *,
    precision: torch.dtype | None,
    scaler: torch.amp.GradScaler | None = None,
    compiled: bool = False,
    channels_last: bool = False,
) -> Callable[[], Tensor]:
    """Returns a step as in train_reg.py: `RegularizedLoss`, fused AdamW, foreach EMA."""
    network = copy.deepcopy(network).train()
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
    device = images.batch.device
    loss_fn = RegularizedLoss(DDPMScheduler(), terms, max_nonfinite_steps=None).to(device)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=LEARNING_RATE, betas=(0.95, 0.999), weight_decay=1e-6, fused=True
    )
    ema = EMAModel(network.parameters(), decay=DECAY, use_ema_warmup=True, inv_gamma=1.0, power=0.75, foreach=True)
    called = torch.compile(network, dynamic=False) if compiled else network

    def model(sample: Tensor, timesteps: Tensor):
        with _autocast(device, precision):
            return called(sample, timesteps, return_dict=False)[0].float()

    def step() -> Tensor:
        samples = images()
        timesteps = draw_timesteps(loss_fn.regularization.scheduler, len(samples))
        output = loss_fn(model, samples, noise=torch.randn_like(samples), timesteps=timesteps)
        _update(output.loss, network, optimizer, ema, scaler)
        return output.loss.detach()

    return step


def _autocast(device: torch.device, precision: torch.dtype | None):
    return torch.autocast(device.type, precision, enabled=precision is not None)


def _update(loss: Tensor, network: nn.Module, optimizer, ema: EMAModel, scaler) -> None:
    if scaler is None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimizer.step()
    else:
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad()
    ema.step(network.parameters())
