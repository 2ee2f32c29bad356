"""torch.compile for the training alone: what samples, saves and averages keeps the network as it is."""

from __future__ import annotations

import warnings

import torch
from torch import nn

__all__ = ["compile_for_training"]

# diffusers asks for PyTorch's version by a cached function: nothing that changes between two calls.
warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`-wrapped function")


def compile_for_training(unet: nn.Module, batch_size: int, backend: str = "inductor") -> None:
    """From now on, batches of `batch_size` images in training mode run a compiled forward, all others the plain one.

    Code is compiled for one shape, once: a last, shorter batch, a grid of samples or the images of an evaluation would
    each cost another minute. The module itself stays the one it is, so its weights keep their names. To be called
    before `accelerator.prepare`, so that automatic mixed precision and the processes' averaging of gradients surround
    the compiled code.

    Args:
        unet: a `UNet2DModel`, called with return_dict=False.
        batch_size: images of a batch on each process.
        backend: of torch.compile.
    """
    plain = unet.forward
    compiled = torch.compile(plain, dynamic=False, fullgraph=True, backend=backend)

    def forward(sample, *args, **kwargs):
        is_training_batch = unet.training and torch.is_grad_enabled() and len(sample) == batch_size
        return (compiled if is_training_batch else plain)(sample, *args, **kwargs)

    unet.forward = forward
