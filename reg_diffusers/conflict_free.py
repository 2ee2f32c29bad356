"""Combines the gradients of the parts of a loss without conflict, by ConFIG or PCGrad.

ConFIG (Liu, Chu & Thuerey 2024, arXiv:2408.11104) has the same cosine with the gradient of every part. PCGrad (Yu et
al. 2020, arXiv:2001.06782) removes from each gradient its component against another. Both are computed by the package
`conflictfree` of the authors of ConFIG.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .loss_output import LossOutput

__all__ = ["METHODS", "backward", "combined", "flat_gradients", "hand_out", "operator_of"]

METHODS = ("config", "pcgrad")
_RANK = 1e-6  # parts with directions closer than this count as one: float32 cannot distinguish them


def backward(output: LossOutput, parameters: Iterable[nn.Parameter], method: str = "config") -> None:
    """Sets the gradients of parameters to the conflict-free combination of those of the parts, instead of a backward.

        backward(loss_fn(model, original_samples), model.parameters())
        optimizer.step()

    The parts are "denoising" and weight * term. Each costs a backward pass of the network and a copy of the weights
    in memory. `grad` is replaced, not added to. If a part is non-finite, so are all gradients. Waits for an
    accelerator.

    Args:
        output: result of a loss, with its graph.
        parameters: the weights to train.
        method: "config" or "pcgrad".

    Raises:
        ValueError: the method is unknown.
        ModuleNotFoundError: the package conflictfree is not installed.
    """
    operator = operator_of(method)
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    parts = [term if name == "denoising" else output.weights[name] * term for name, term in output.terms.items()]
    attached = [part for part in parts if part.requires_grad]
    rows = []
    for part in attached:
        gradients = torch.autograd.grad(part, parameters, retain_graph=part is not attached[-1], allow_unused=True)
        rows.append(flat_gradients(gradients, parameters))
    hand_out(combined(operator, torch.stack(rows)), parameters)


def operator_of(method: str):
    """Returns the operator of the package conflictfree.

    Raises:
        ValueError: the method is unknown.
        ModuleNotFoundError: the package is not installed.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    try:
        from conflictfree.grad_operator import ConFIGOperator, PCGradOperator
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{method} needs a package that is not installed: pip install conflictfree"
        ) from None
    # For the same matrix, the last bits of lstsq differ from call to call; those of pinv do not.
    return ConFIGOperator(use_least_square=False) if method == "config" else PCGradOperator()


def flat_gradients(gradients: Iterable[Tensor | None], parameters: Iterable[Tensor]) -> Tensor:
    """Concatenates gradients, (P,), with 0 for a parameter that has none."""
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in pairs])


def hand_out(gradient: Tensor, parameters: list[Tensor]) -> None:
    """Sets the `grad` of each parameter to its part of a gradient, (P,).

    A `grad` has the strides of its parameter, as autograd's has: a fused optimizer reads both as blocks of memory.
    """
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, part in zip(parameters, gradient.split(sizes), strict=True):
        part = part.view_as(parameter)
        same = part.stride() == parameter.stride()
        parameter.grad = part if same else torch.empty_like(parameter).copy_(part)


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
