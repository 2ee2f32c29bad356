"""L' of the images of one batch: computed in full precision, checked, and summed without what is not finite."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .context import positions
from .estimators import mean_of_draws
from .nonfinite import NonFiniteGuard
from .seeding import SeedGuard
from .shown import Shown, by_draw, by_image
from .term import Term, checked_values

__all__ = ["TermValues"]


class TermValues:
    """Computes L' of the terms.

    Args:
        nonfinite: takes out and counts images with non-finite L' or gradient.

    Attributes:
        tried: names of the terms whose first call had the additional checks.
    """

    def __init__(self, nonfinite: NonFiniteGuard):
        self.tried: set[str] = set()
        self._nonfinite = nonfinite
        self._seeding = SeedGuard()

    def sum(
        self, term: Term, weights: Tensor, shown: Shown, context: dict, timesteps: Tensor
    ) -> tuple[Tensor, Callable[[], Tensor]]:
        """Computes sum_i weight_i L'(x0_hat_i) over images with non-zero weight.

        Also returns a function for L' of each image of the batch, (B,), nan if the image was left out or dropped.
        """
        batch_size = weights.shape[0]
        if shown.is_shared:
            shown = shown.to(weights)
        if shown.places.shape[0] == 0:
            empty = shown.images.detach()
            return empty.new_zeros(()), lambda: empty.new_full((batch_size,), torch.nan)
        active = positions(shown.places, batch_size)
        if active is not None:
            weights = weights[active]
        own = shown.context_of(term, context, batch_size)
        values, active_values = self._evaluate(term, shown, own, timesteps)

        def per_image() -> Tensor:  # holds detached tensors only, so that graphs are freed
            if active is None:
                return active_values
            found = active_values.new_full((batch_size,), torch.nan)
            found[active.to(found.device, non_blocking=True)] = active_values
            return found

        return (weights.to(values, non_blocking=True) * values).sum(), per_image

    def _evaluate(self, term: Term, shown: Shown, context: dict, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Computes L' of each image in full precision, (n,), 0 where non-finite; and detached, nan there.

        L' is averaged over the draws of an image, which are dropped together.
        """
        images = by_image(shown.images, shown.draws)  # an alias: zeroing its gradients leaves the other terms alone
        guarded = self._nonfinite.begin(term.name, timesteps, shown.places)
        if images.requires_grad:
            images.register_hook(guarded.drop_gradients)
        given = shown.guard_with(guarded)
        before = self._seeding.before(term.name, images.device)
        values = checked_values(term, by_draw(images, shown.draws), context, compare=term.name not in self.tried)
        self._seeding.check(term.name, before, images.device)
        self.tried.add(term.name)
        return guarded.drop_values(mean_of_draws(values, shown.draws), given)
