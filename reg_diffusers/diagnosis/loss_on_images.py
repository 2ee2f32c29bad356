"""L' and its gradient on images, as a term sees them at a noise level."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..context import repeat
from ..estimators import Prediction, mean_of_draws, one_step
from ..shown import checked_estimate
from ..term import Term, TermError, checked_values, draw, score, term_context, viewed

__all__ = ["LossOnImages"]


class LossOnImages:
    """Computes L' of images and its gradient, detached from the graph.

    Args:
        term: the term with the regularizer.
        context: tensors of the held-out images, in the same order.
    """

    def __init__(self, term: Term, context: dict[str, Tensor]):
        self._term, self._context = term, term_context(term, context)
        self._original_samples = context["original_samples"]
        draw(term.view, self._original_samples)  # one window for all levels
        self._estimate: Callable[[Tensor], Tensor] = _as_it_is

    def at(self, scheduler, timestep: Tensor, noisy_samples: Tensor, noise: Tensor) -> None:
        """Treats images as guesses at this noise level from now on; the term sees them through its estimator."""
        if self._term.estimator is one_step:
            return

        def estimate(x0_hat: Tensor) -> Tensor:
            count = len(x0_hat)
            timesteps, sample = timestep.expand(count), noisy_samples[:count]
            images = (noise[:count], self._original_samples[:count])
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # the same draws at each step towards the proximal point
                return checked_estimate(
                    self._term.estimator, Prediction.of_image(scheduler, x0_hat, timesteps, sample, *images)
                )

        self._estimate = estimate

    def __call__(self, x0_hat: Tensor) -> tuple[Tensor, Tensor]:
        """Computes L' (B,) of the guesses of the first B held-out images, and its gradient (B, C, H, W).

        If either is non-finite, L' is nan and the gradient 0: as in a training, that image does not count.
        """
        values, gradient = self._raw(x0_hat)
        finite = values.isfinite() & gradient.flatten(1).isfinite().all(1)
        shape = (len(values),) + (1,) * (gradient.ndim - 1)
        return torch.where(finite, values, torch.nan), torch.where(finite.view(shape), gradient, 0.0)

    def _raw(self, x0_hat: Tensor) -> tuple[Tensor, Tensor]:
        x0_hat = x0_hat.detach().requires_grad_()
        count, images = len(x0_hat), self._estimate(x0_hat)
        context = self._part(slice(count))
        if "original_samples" in context:
            context["original_samples"] = viewed(self._term, context["original_samples"])
        draws = len(images) // count
        values = checked_values(self._term, viewed(self._term, images), repeat(context, draws, count))
        values = mean_of_draws(values, draws)
        return values.detach().float(), torch.autograd.grad(values.sum(), x0_hat)[0]

    def check(self, images: Tensor) -> None:
        """Raises `TermError` if L' or its gradient is non-finite, or if L' depends on other images of the batch."""
        name, (values, gradient) = self._term.name, self._raw(images)
        for what, finite in {"it": values.isfinite(), "its gradient": gradient.flatten(1).isfinite().all(1)}.items():
            if not finite.all():
                raise TermError(
                    f"regularizer {name!r}: {what} is non-finite on {int((~finite).sum())} of {len(images)} real"
                    " images: look for a root, a logarithm or a quotient at 0, or for a loss that expects values"
                    " outside [-1, 1]"
                )
        ones = (slice(0, 1), slice(1, 2))
        alone = torch.cat([score(self._term, images[one], self._part(one)) for one in ones])
        if not torch.allclose(alone, values[:2], rtol=1e-3, atol=1e-6):
            raise TermError(
                f"regularizer {name!r}: the value of an image depends on the other images of the batch: average over"
                " all dimensions but the first"
            )

    def single(self, image: Tensor) -> float:
        """Computes L' of one image outside the data, with the context of the first held-out image."""
        return score(self._term, image[None], self._part(slice(1))).item()

    def _part(self, part: slice) -> dict[str, Tensor]:
        return {name: tensor[part] for name, tensor in self._context.items()}


def _as_it_is(x0_hat: Tensor) -> Tensor:
    return x0_hat
