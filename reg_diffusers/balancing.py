r"""The gradients of a loss's parts at the network's output, and the loss that follows from them and from weights.

What a loss of several parts teaches a network passes through its output o, so that the parts can be compared there,
without a further pass through the network:

    g_k = d term_k / d o,        g = g_denoising + sum_k weight_k g_k,        d L / d theta = (d o / d theta)^T g.

`balance` takes the g_k on the small graph between o and the terms, and returns a loss whose backward hands g to the
network. So each L' is differentiated once, weights can depend on the gradients, and norms and angles of the parts are
there for the asking, on the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .objective import LossOutput

__all__ = ["BalancedLoss", "balance"]


@dataclass(frozen=True)
class BalancedLoss:
    """A loss with its parts and their gradients at the network's output.

    Attributes:
        loss: scalar, "denoising" + sum of weight * term, to call `backward` on.
        terms: scalars by name, before their weights, detached.
        weights: by name, as given, without "denoising".
        gradients: by name, d term / d model_output, before the weights, (B, C, ...), at least float32.
        per_image: as in `LossOutput`.
        weightings: as in `LossOutput`.
        snr: as in `LossOutput`.
        model_output: (B, C, ...), attached to the network's graph.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    weights: dict[str, float | Tensor]
    gradients: dict[str, Tensor]
    per_image: dict[str, Tensor]
    weightings: dict[str, Tensor]
    snr: Tensor | None
    model_output: Tensor

    @cached_property
    def products(self) -> Tensor:
        """Inner products of the gradients of each image's own loss, (B, K, K), in the order of `gradients`.

        A term is a mean over the batch; that of one image is B times its part of the gradient. So the products do not
        depend on how images are divided into batches.
        """
        flat = torch.stack([gradient.flatten(1) for gradient in self.gradients.values()], dim=1) * len(
            self.model_output
        )
        return flat @ flat.mT


def balance(output: LossOutput, weights: Mapping[str, float | Tensor]) -> BalancedLoss:
    """The loss with other weights, which costs what its own backward would: only the order of the work changes.

        output = balance(loss_fn(model, original_samples), {"total_variation": 0.1})
        output.loss.backward()

    Keep no reference to what is passed in, so that the graphs of the terms can be freed before the network's backward.

    Args:
        output: of `RegularizedLoss`, or of `X0Regularization`, with its graph; all that it teaches must pass through
            `model_output`.
        weights: a number or a scalar tensor for every term but "denoising", whose weight is 1.

    Raises:
        ValueError: no `model_output`, or one that needs no gradient; names that are not those of the terms.
    """
    if output.model_output is None or not output.model_output.requires_grad:
        raise ValueError("balance needs LossOutput.model_output, attached to the network: call it inside of training")
    if expected := (set(output.terms) - {"denoising"}) ^ set(weights):
        raise ValueError(f"weights must name the terms and nothing else; the difference is {sorted(expected)}")
    gradients = _gradients(output)
    terms = {name: term.detach() for name, term in output.terms.items()}
    value, total = None, None
    for name, gradient in gradients.items():
        weight = 1 if name == "denoising" else weights[name]
        value = weight * terms[name] if value is None else value + weight * terms[name]
        total = weight * gradient if total is None else total + weight * gradient
    said = output.loss.detach()
    value = torch.where(said.isfinite(), value, said)  # what the loss itself calls no number stays none
    loss = _GivenGradient.apply(output.model_output, value, total.to(output.model_output.dtype))
    return BalancedLoss(
        loss, terms, dict(weights), gradients, output.per_image, output.weightings, output.snr, output.model_output
    )


def _gradients(output: LossOutput) -> dict[str, Tensor]:
    """d term / d model_output by name, each of at least float32; 0 for a term that no image takes part in."""
    model_output = output.model_output
    dtype = torch.promote_types(model_output.dtype, torch.float32)
    attached = [name for name, term in output.terms.items() if term.requires_grad]
    gradients = {}
    for name, term in output.terms.items():
        gradient = None
        if term.requires_grad:
            # Terms may share what lies between them and the output: the last one may free it.
            (gradient,) = torch.autograd.grad(term, model_output, retain_graph=name != attached[-1], allow_unused=True)
        gradients[name] = torch.zeros_like(model_output, dtype=dtype) if gradient is None else gradient.to(dtype)
    return gradients


class _GivenGradient(torch.autograd.Function):
    """A number whose gradient by the network's output is already known."""

    @staticmethod
    def forward(context, model_output: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        context.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = context.saved_tensors
        return upstream * gradient, None, None
