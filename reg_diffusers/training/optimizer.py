"""Builds AdamW: that of PyTorch, or with moments of 8 bits (Dettmers et al. 2021, arXiv:2110.02861), bitsandbytes'.

The moments are quantized in blocks of 256 numbers. Tensors of fewer than 4,096 numbers keep them in 32 bits.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from accelerate import DistributedType
from torch import Tensor, nn

from ..networks.trained import trained_parameters
from ..runtime.errors import UsageError
from ..runtime.messages import errors_only
from ..settings.optimization import OptimizationSettings

__all__ = ["build_optimizer", "bytes_of_moments", "check_optimizer"]

_SMALLEST = 4096  # numbers of a tensor with moments of 8 bits
_BLOCK = 256  # numbers that share a scale of 4 bytes


def check_optimizer(settings: OptimizationSettings, engine: DistributedType) -> None:
    """Raises `UsageError` if --use_8bit_adam cannot work here.

    Args:
        settings: settings of the optimizer.
        engine: how the processes share the training.
    """
    if not settings.use_8bit_adam:
        return
    if find_spec("bitsandbytes") is None:
        raise UsageError("--use_8bit_adam needs a package that is not installed: pip install bitsandbytes")
    if engine in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise UsageError(f"--use_8bit_adam is not supported with {engine.value}, which shards the optimizer: drop it")


def build_optimizer(settings: OptimizationSettings, unet: nn.Module) -> torch.optim.Optimizer:
    """Builds AdamW on the trained parameters of the network; PyTorch's updates them in one fused pass."""
    kind, more = (_adamw_8bit(), {}) if settings.use_8bit_adam else (torch.optim.AdamW, {"fused": True})
    return kind(
        trained_parameters(unet),
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        weight_decay=settings.adam_weight_decay,
        eps=settings.adam_epsilon,
        **more,
    )


def bytes_of_moments(parameters: list[nn.Parameter], settings: OptimizationSettings) -> int:
    """Returns the memory that both moments of these parameters need."""
    numbers = [parameter.numel() for parameter in parameters]
    if not settings.use_8bit_adam:
        return sum(8 * number for number in numbers)
    return sum(8 * number if number < _SMALLEST else 2 * (number + 4 * -(-number // _BLOCK)) for number in numbers)


def _adamw_8bit() -> type[torch.optim.Optimizer]:
    with errors_only("bitsandbytes"):  # which reports kernels for inference that are not used here
        from bitsandbytes.optim import AdamW8bit

    class SkippingAdamW8bit(AdamW8bit):
        """Skips a step where `found_inf` is not 0, as a fused optimizer of PyTorch does."""

        found_inf: Tensor | None = None

        def step(self, closure=None):
            return None if self.found_inf is not None and self.found_inf.item() else super().step(closure)

    return SkippingAdamW8bit
