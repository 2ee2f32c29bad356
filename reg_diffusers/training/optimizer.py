"""The optimizer of a training with the course of its learning rate."""

from __future__ import annotations

import argparse

import torch
from diffusers.optimization import get_scheduler
from torch import nn

__all__ = ["build_lr_scheduler", "build_optimizer"]


def build_optimizer(args: argparse.Namespace, unet: nn.Module) -> torch.optim.AdamW:
    """AdamW on all weights of the network, in one pass over them."""
    return torch.optim.AdamW(
        unet.parameters(),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
        fused=True,
    )


def build_lr_scheduler(args: argparse.Namespace, optimizer: torch.optim.AdamW, max_train_steps: int):
    """The course that --lr_scheduler names; one of its steps is one of the optimizer's, on however many processes."""
    return get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=max_train_steps,
    )
