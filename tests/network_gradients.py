"""A batch for a small network, and the gradients that it gives."""

import torch


def batch_for(unet, number=4):
    generator = torch.Generator().manual_seed(1)
    size = unet.config.sample_size
    sample = torch.randn(number, unet.config.in_channels, size, size, generator=generator)
    return sample, torch.randint(0, 1000, (number,), generator=generator)


def gradients(unet, sample, timesteps):
    unet.zero_grad()
    output = unet(sample, timesteps, return_dict=False)[0]
    output.square().sum().backward()
    return output.detach(), {name: p.grad.clone() for name, p in unet.named_parameters()}
