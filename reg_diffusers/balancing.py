r"""Gradients of the parts of a loss with respect to the network's output, and the loss with new weights.

All parts of a loss reach the network's parameters through its output o, so they can be compared there without another
pass through the network:

    g_k = d term_k / d o,        g = g_denoising + sum_k weight_k g_k,        d L / d theta = (d o / d theta)^T g.

`balance` computes the g_k on the small graph between o and the terms, and returns a loss whose backward passes g to
the network. Each L' is differentiated once, the weights may depend on the gradients, and the norms and angles of the
parts are available on the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from .loss_output import LossOutput

__all__ = ["BalancedLoss", "balance"]


@dataclass(frozen=True)
class BalancedLoss(LossOutput):
    """A `LossOutput` with new weights, and the gradients of its parts with respect to the network's output.

    Attributes:
        loss: scalar, "denoising" + sum of weight * term, to call `backward` on.
        terms: scalars by name, before their weights, detached.
        gradients: by name, d term / d model_output, before the weights, (B, C, ...), in at least float32. The terms in
            `separate` have none.
    """

    gradients: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def products(self) -> Tensor:
        """Inner products of the gradients of each image's own loss, (B, K, K), in the order of `gradients`.

        A term is a mean over images, usually the whole batch. The gradient of one image's loss is its part of the
        term's gradient times the number of images, so the products do not depend on the batch size.
        """
        flat = torch.stack(
            [gradient.flatten(1) * self._count(name) for name, gradient in self.gradients.items()], dim=1
        )
        return flat @ flat.mT

    def _count(self, name: str) -> int | Tensor:
        return self.counts.get(name, len(self.model_output))


def balance(output: LossOutput, weights: Mapping[str, float | Tensor]) -> BalancedLoss:
    """Reweights the parts of a loss, at the cost of its own backward: only the order of the computation changes.

        output = balance(loss_fn(model, original_samples), {"total_variation": 0.1})
        output.loss.backward()

    Do not keep a reference to `output`, so that the graphs of the terms can be freed before the backward of the
    network.

    The gradient of a term whose estimator calls the network again does not pass through `model_output` alone. Such a
    term stays in the loss with its whole graph, so one backward of the loss serves all parts.

    Args:
        output: result of `RegularizedLoss` or `X0Regularization`, with its graph.
        weights: a number or a scalar tensor for every term except "denoising", whose weight is 1. The schedule of a
            term multiplies it.

    Raises:
        ValueError: `model_output` is missing or needs no gradient, or the names in `weights` differ from those of the
            terms.
    """
    if output.model_output is None or not output.model_output.requires_grad:
        raise ValueError("balance needs LossOutput.model_output, attached to the network: enable gradients")
    if expected := (set(output.terms) - {"denoising"}) ^ set(weights):
        raise ValueError(f"weights must name the terms and nothing else; the difference is {sorted(expected)}")
    weights = {name: weight * output.factors.get(name, 1) for name, weight in weights.items()}
    gradients = _gradients(output)
    terms = {name: term.detach() for name, term in output.terms.items()}
    value, total = None, None
    for name, gradient in gradients.items():
        weight = 1 if name == "denoising" else weights[name]
        value = weight * terms[name] if value is None else value + weight * terms[name]
        total = weight * gradient if total is None else total + weight * gradient
    whole = output.loss.detach()
    value = torch.where(whole.isfinite(), value, whole)  # a non-finite loss stays non-finite
    loss = _GivenGradient.apply(output.model_output, value, total.to(output.model_output.dtype))
    for name in output.separate:
        loss = loss + weights[name] * output.terms[name]
    parts = vars(output) | {"loss": loss, "terms": terms, "weights": weights}
    return BalancedLoss(**parts, gradients=gradients)


def _gradients(output: LossOutput) -> dict[str, Tensor]:
    """Computes d term / d model_output by name, in at least float32; 0 for a term without active images."""
    model_output = output.model_output
    dtype = torch.promote_types(model_output.dtype, torch.float32)
    through_output = {name: term for name, term in output.terms.items() if name not in output.separate}
    attached = [name for name, term in through_output.items() if term.requires_grad]
    gradients = {}
    for name, term in through_output.items():
        gradient = None
        if term.requires_grad:
            # Terms may share the graph between them and the output; only the last may free it.
            is_kept = bool(output.separate) or name != attached[-1]
            (gradient,) = torch.autograd.grad(term, model_output, retain_graph=is_kept, allow_unused=True)
        gradients[name] = torch.zeros_like(model_output, dtype=dtype) if gradient is None else gradient.to(dtype)
    return gradients


class _GivenGradient(torch.autograd.Function):
    """A scalar with a given gradient with respect to the network's output."""

    @staticmethod
    def forward(context, model_output: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        context.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = context.saved_tensors
        return upstream * gradient, None, None
