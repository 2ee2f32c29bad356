"""The moving average of the weights, diffusers' EMAModel."""

from __future__ import annotations

import argparse
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel

__all__ = ["build_ema", "ema_weights"]


def build_ema(args: argparse.Namespace, unet: torch.nn.Module, device: torch.device) -> EMAModel | None:
    """The average of --use_ema and its --ema_* flags, or None."""
    if not args.use_ema:
        return None
    ema = EMAModel(
        unet.parameters(),
        decay=args.ema_max_decay,
        use_ema_warmup=True,
        inv_gamma=args.ema_inv_gamma,
        power=args.ema_power,
        foreach=True,
    )
    ema.to(device)
    return ema


@contextmanager
def ema_weights(ema: EMAModel | None, unet: torch.nn.Module):
    """Inside, the network has the averaged weights, if there is an average, and is in evaluation mode."""
    if ema is not None:
        ema.store(unet.parameters())
        ema.copy_to(unet.parameters())
    unet.eval()
    try:
        yield
    finally:
        unet.train()
        if ema is not None:
            ema.restore(unet.parameters())
