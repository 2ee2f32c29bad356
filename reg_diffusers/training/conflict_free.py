"""How train_reg.py computes the gradient of a step: of the whole loss, or of its parts combined without conflict."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from ..balancing import BalancedLoss
from ..conflict_free import combined, flat_gradients, hand_out, operator_of
from ..networks.trained import trained_parameters
from ..runtime.errors import UsageError
from ..settings.loss import LossSettings

__all__ = ["Backward", "ConflictFree", "check_balance", "choose_backward"]

_WHOLE_WEIGHTS = {DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU}


def check_balance(loss: LossSettings, is_compiled: bool, distributed_type: DistributedType) -> None:
    """Raises `UsageError` if --reg_balance is not possible with these settings."""
    if loss.reg_balance is None:
        return
    flag = f"--reg_balance {loss.reg_balance}"
    if not loss.regularizer:
        raise UsageError(f"{flag} combines the gradients of several losses: it needs a --regularizer")
    if is_compiled:
        raise UsageError(
            f"{flag} runs a backward pass of the network for each loss, but --compile supports only one: leave one of"
            " the two out"
        )
    if find_spec("conflictfree") is None:
        raise UsageError(f"{flag} needs a package that is not installed: pip install conflictfree")
    if distributed_type not in _WHOLE_WEIGHTS:
        raise UsageError(
            f"{flag} needs whole gradients in each process: launch without FSDP and DeepSpeed, or leave it out"
        )


class Backward:
    """Computes the gradient of the loss without changes.

    Attributes:
        network: network to call in training.
    """

    def __init__(self, accelerator: Accelerator, network: Callable):
        self.network = network
        self._accelerator = accelerator

    def backward(self, loss: Tensor, output: BalancedLoss) -> None:
        """Adds the gradient of a batch."""
        self._accelerator.backward(loss)


class ConflictFree:
    """Replaces `accelerator.backward`, and combines the gradients of all parts with respect to the weights.

    The gradient of each part is averaged over the batches of a step and over the processes before the parts are
    combined. Each part costs a backward pass of the network and a copy of the weights in memory.

    Args:
        accelerator: accelerator of the training.
        unet: network, as prepared by Accelerate.
        method: "config" or "pcgrad".

    Attributes:
        network: network to call in training, without the wrapper that averages gradients.
    """

    def __init__(self, accelerator: Accelerator, unet: nn.Module, method: str):
        self.network = accelerator.unwrap_model(unet)
        self._accelerator = accelerator
        self._operator = operator_of(method)
        self._parameters = trained_parameters(unet)
        self._sums: Tensor | None = None  # (parts, weights), over the batches of the current step

    def backward(self, loss: Tensor, output: BalancedLoss) -> None:
        """Adds the gradients of a batch; after the last batch of a step, sets `grad` to the combined gradient.

        Args:
            loss: loss of the batch, a scalar; if it is non-finite, so are the gradients.
            output: output of the loss, with the gradient and the weight of each part.
        """
        scaler = self._accelerator.scaler
        upstream = (
            torch.where(loss.detach().isfinite(), 1.0, torch.nan) / self._accelerator.gradient_accumulation_steps
        )
        upstream = upstream if scaler is None else scaler.scale(upstream)
        last = list(output.gradients)[-1]
        rows = []
        for name, gradient in output.gradients.items():
            weight = 1 if name == "denoising" else output.weights[name]
            gradients = torch.autograd.grad(
                output.model_output,
                self._parameters,
                (upstream * weight * gradient).to(output.model_output.dtype),
                retain_graph=name != last,
                allow_unused=True,
            )
            rows.append(flat_gradients(gradients, self._parameters))
        parts = torch.stack(rows)
        self._sums = parts if self._sums is None else self._sums + parts
        if self._accelerator.sync_gradients:
            parts, self._sums = self._accelerator.reduce(self._sums, "mean"), None
            hand_out(combined(self._operator, parts), self._parameters)


def choose_backward(accelerator: Accelerator, network: Callable, method: str | None) -> Backward | ConflictFree:
    """Chooses how the gradient is computed: from the whole loss, or from its parts without conflict.

    Args:
        accelerator: accelerator of the training.
        network: network that a step calls; with a method, the module as prepared by Accelerate.
        method: "config", "pcgrad" or None.
    """
    return Backward(accelerator, network) if method is None else ConflictFree(accelerator, network, method)
