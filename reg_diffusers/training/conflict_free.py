"""A gradient that points against no part of the loss: ConFIG and PCGrad, from one backward pass for each part.

ConFIG (Liu, Chu & Thuerey 2024, arXiv:2408.11104) goes where all gradients are lowered at the same rate, measured by
their own lengths; PCGrad (Yu et al. 2020, arXiv:2001.06782) takes from each gradient what points against another.
Both as the package `conflictfree`, by the authors of the former, has them.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from ..balancing import BalancedLoss
from .errors import UsageError

__all__ = ["ConflictFree", "check_balance"]

_WHOLE_WEIGHTS = {DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU}


def check_balance(args: argparse.Namespace, distributed_type: DistributedType) -> None:
    """Raises `UsageError` if --reg_balance cannot work here."""
    if args.reg_balance is None:
        return
    flag = f"--reg_balance {args.reg_balance}"
    if not args.regularizer:
        raise UsageError(f"{flag} is about the gradients of several losses: it needs a --regularizer")
    if args.compile:
        raise UsageError(
            f"{flag} goes back through the network once for each loss, what --compile makes only once: leave one of"
            " the two out"
        )
    if find_spec("conflictfree") is None:
        raise UsageError(f"{flag} needs a package that is not installed: pip install conflictfree")
    if distributed_type not in _WHOLE_WEIGHTS:
        raise UsageError(
            f"{flag} needs whole gradients in each process: launch without FSDP and DeepSpeed, or leave it out"
        )


class ConflictFree:
    """Takes the place of `accelerator.backward`: combines the gradients of all parts by the weights of a network.

    The gradient of each part is averaged over the batches of a step and over the processes before they are combined.
    It costs one backward pass of the network for each part, and memory for so many copies of the weights.

    Args:
        accelerator: of the training.
        unet: the network, as prepared by accelerate.
        method: "config" or "pcgrad".

    Attributes:
        network: the network to call in training, without the machinery that averages gradients by itself.
    """

    def __init__(self, accelerator: Accelerator, unet: nn.Module, method: str):
        from conflictfree.grad_operator import ConFIGOperator, PCGradOperator

        self.network = accelerator.unwrap_model(unet)
        self._accelerator = accelerator
        self._operator = {"config": ConFIGOperator, "pcgrad": PCGradOperator}[method]()
        self._parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        self._sums: Tensor | None = None  # (parts, weights), over the batches of the step under way

    def backward(self, loss: Tensor, output: BalancedLoss) -> None:
        """Adds the gradients of a batch; after the last batch of a step the weights have the combined `grad`.

        Args:
            loss: scalar, of the batch; where it is not finite, neither is any gradient.
            output: whose parts count, each with its weight.
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
    """The conflict-free gradient (P,) of the parts (K, P); nan throughout if any of them is not finite.

    A part that is 0, with no image in the batch or with weight 0, has no direction and is left out.
    """
    norms = parts.norm(dim=1)
    if not norms.isfinite().all():
        return torch.full_like(parts[0], torch.nan)
    parts = parts[norms > 0]
    if len(parts) < 2:
        return parts.sum(0)
    found = operator.calculate_gradient(parts)
    return found if found.isfinite().all() else parts.sum(0)  # of one direction, or of two that are opposed
