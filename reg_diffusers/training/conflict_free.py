"""Combines the gradients of the parts of the loss without conflict, by ConFIG or PCGrad.

Each part needs its own backward pass.

ConFIG (Liu, Chu & Thuerey 2024, arXiv:2408.11104) has the same cosine with the gradient of every part. PCGrad (Yu et
al. 2020, arXiv:2001.06782) removes from each gradient its component against another. Both are computed by the package
`conflictfree` of the authors of ConFIG.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from ..balancing import BalancedLoss
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


_RANK = 1e-6  # parts with directions closer than this count as one: float32 cannot distinguish them


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
        from conflictfree.grad_operator import ConFIGOperator, PCGradOperator

        self.network = accelerator.unwrap_model(unet)
        self._accelerator = accelerator
        # For the same matrix, the last bits of lstsq differ from call to call; those of pinv do not.
        self._operator = ConFIGOperator(use_least_square=False) if method == "config" else PCGradOperator()
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
            rows.append(self._flat(gradients))
        parts = torch.stack(rows)
        self._sums = parts if self._sums is None else self._sums + parts
        if self._accelerator.sync_gradients:
            parts, self._sums = self._accelerator.reduce(self._sums, "mean"), None
            self._hand_out(combined(self._operator, parts))

    def _flat(self, gradients: tuple[Tensor | None, ...]) -> Tensor:
        pairs = zip(gradients, self._parameters, strict=True)
        return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in pairs])

    def _hand_out(self, gradient: Tensor) -> None:
        sizes = [parameter.numel() for parameter in self._parameters]
        for parameter, part in zip(self._parameters, gradient.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)


def combined(operator, parts: Tensor) -> Tensor:
    """Returns the conflict-free gradient (P,) of the parts (K, P); nan everywhere if a part is non-finite.

    The result lies in the span of the parts and depends on their inner products only. The operator therefore gets the
    parts in coordinates of that span, (K, K), and its result is converted to a linear combination of the parts. Unlike
    a decomposition of the (K, P) matrix, this gives the same bits for the same parts, at a fraction of the cost.

    A part of norm 0, without images in the batch or with weight 0, has no direction and is omitted.
    """
    norms = parts.norm(dim=1)
    if not norms.isfinite().all():
        return torch.full_like(parts[0], torch.nan)
    parts = parts[norms > 0]
    if len(parts) < 2:
        return parts.sum(0)
    coordinates = _coordinates(parts)
    found = operator.calculate_gradient(coordinates.float()).double()
    factors = torch.linalg.pinv(coordinates.T, rtol=_RANK) @ found
    if not factors.isfinite().all():  # the parts have one direction, or two opposite ones
        return parts.sum(0)
    return sum(factor * part for factor, part in zip(factors.to(parts.dtype), parts, strict=True))


def _coordinates(parts: Tensor) -> Tensor:
    """Returns the parts (K, P) in an orthonormal basis of their span, (K, K) in float64, with equal inner products."""
    products = torch.stack([torch.stack([(one * other).sum(dtype=torch.float64) for other in parts]) for one in parts])
    values, vectors = torch.linalg.eigh(products)
    values = torch.where(values > _RANK**2 * values[-1], values, 0)
    return vectors * values.sqrt()


def choose_backward(accelerator: Accelerator, network: Callable, method: str | None) -> Backward | ConflictFree:
    """Chooses how the gradient is computed: from the whole loss, or from its parts without conflict.

    Args:
        accelerator: accelerator of the training.
        network: network that a step calls; with a method, the module as prepared by Accelerate.
        method: "config", "pcgrad" or None.
    """
    return Backward(accelerator, network) if method is None else ConflictFree(accelerator, network, method)
