"""Images, schedulers and regularizers that the tests of the loss share."""

import diffusers
import torch

TIMESTEPS = (0, 60, 300, 999)


def images(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def scheduler_of(kind="epsilon"):
    if kind == "flow_prediction":
        return diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.DDPMScheduler(prediction_type=kind)


def mean_square(x0_hat):
    return x0_hat.square().flatten(1).mean(1)


def reconstruction(x0_hat, *, original_samples):
    return (x0_hat - original_samples).square().flatten(1).mean(1)


reconstruction.needs = ("original_samples",)


def scaled_square(x0_hat, *, factor):
    return factor * mean_square(x0_hat)


scaled_square.needs = ("factor",)


def loss_and_gradients(loss_fn, **context):
    """The loss of a batch of 4 and its gradient by the network's output, (4, 1, 3, 2)."""
    original, noise, output = images(3, 4, 1, 3, 2)
    output.requires_grad_()
    result = loss_fn(lambda sample, t: output, original, noise=noise, timesteps=torch.tensor(TIMESTEPS), **context)
    return result, torch.autograd.grad(result.loss, output)[0]
