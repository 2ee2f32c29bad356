"""The input of each term: x0_hat of the images with non-zero weighting, through the term's view."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .context import cut, positions, repeat
from .estimators import Prediction, calls_model, one_step
from .nonfinite import GuardedCall, ViewGuard, finite_images
from .parameterization import Factors
from .precision import full_precision
from .prediction import model_output_for, predict_original_sample
from .term import Term, TermError, draw, term_context, viewed

__all__ = ["Shown", "checked_estimate", "sharing", "show"]


@dataclass(frozen=True)
class Looking:
    """Terms that share an estimator and a view, and so their input.

    Attributes:
        terms: the terms.
        view: their view, or None.
        is_paired: whether one of them needs `original_samples`.
    """

    terms: Sequence[Term]
    view: Callable[[Tensor], Tensor] | None
    is_paired: bool


@dataclass(frozen=True)
class Estimating:
    """Terms that share an estimator, and so x0_hat.

    Attributes:
        estimator: their estimator.
        draws: number of its estimates of each image.
        terms: the terms.
        by_view: the same, grouped by view.
    """

    estimator: Callable[[Prediction], Tensor]
    draws: int
    terms: Sequence[Term]
    by_view: Sequence[Looking]


class Shown(NamedTuple):
    """The input of the terms that share an estimator and a view.

    Attributes:
        places: (n,) positions in the batch of the images with non-zero weighting in at least one of the terms.
        images: (draws n, C', ...) x0_hat of these images through the view; draws outermost.
        original_samples: (n, C', ...) x_0 through the view; None if no term needs it.
        guard: guard of the view's gradients; None without a view.
        is_shared: whether several terms share this input, so that some may use fewer of the images.
        among: (n,) positions of the images in the input of the view, if `to` has selected them; else None.
        draws: number of estimates of each image.
    """

    places: Tensor
    images: Tensor
    original_samples: Tensor | None
    guard: ViewGuard | None = None
    is_shared: bool = False
    among: Tensor | None = None
    draws: int = 1

    def to(self, weights: Tensor) -> Shown:
        """Selects the images with non-zero weighting in one of several terms, given its weightings, (B,)."""
        among, count = weights[self.places].nonzero().flatten(), len(self.places)
        images = _cut_draws(self.images, among, count, self.draws)
        originals = None if self.original_samples is None else cut(self.original_samples, among, count)
        return Shown(self.places[among], images, originals, self.guard, among=among, draws=self.draws)

    def context_of(self, term: Term, context: dict, batch_size: int) -> dict:
        """Selects the arguments in a term's `needs` for the images, once for each draw.

        Args:
            term: one of the terms that share this input.
            context: for the whole batch.
            batch_size: B.
        """
        if not term.needs:
            return {}
        index, draws, originals = positions(self.places, batch_size), self.draws, self.original_samples
        found = term_context(term, context if originals is None else {**context, "original_samples": originals})
        for name, value in found.items():
            if name == "original_samples" and originals is not None:
                found[name] = value if draws == 1 else repeat(value, draws, self.places.shape[0])
            elif draws == 1:
                found[name] = cut(value, index, batch_size, name)
            else:
                found[name] = _cut_draws(repeat(value, draws, batch_size), index, batch_size, draws, name)
        return found

    def guard_with(self, call: GuardedCall) -> Callable[[], Tensor | None]:
        """Reports gradients that the view makes non-finite to the guard of a term.

        Returns:
            A function that computes whether x0_hat of each image is finite, (n,), before the view; None if all are
            known to be.
        """
        if self.guard is None:
            images, draws = self.images.detach(), self.draws
            return lambda: finite_images(by_image(images, draws))
        self.guard.report_to(call, self.among)
        return partial(self.guard.given, self.among)


def by_image(images: Tensor, draws: int) -> Tensor:
    """Returns an alias of images, (draws n, ...), with the draws of an image together, (n, draws, ...).

    A single draw stays (n, ...), so the usual case costs nothing.
    """
    return images.view_as(images) if draws == 1 else images.unflatten(0, (draws, -1)).transpose(0, 1)


def by_draw(images: Tensor, draws: int) -> Tensor:
    """Returns the draws of images one after the other: the inverse of `by_image`."""
    return images if draws == 1 else images.transpose(0, 1).flatten(0, 1)


def _cut_draws(value, index: Tensor | None, batch_size: int, draws: int, name: str = "context"):
    """Selects images from several draws of a batch, draws outermost."""
    if draws == 1 or index is None:
        return cut(value, index, draws * batch_size, name)
    every = torch.arange(draws, device=index.device)[:, None] * batch_size + index
    return cut(value, every.flatten(), draws * batch_size, name)


def sharing(terms: Iterable[Term]) -> list[Estimating]:
    """Groups the terms of a loss by estimator, and those of an estimator by view."""
    groups = []
    for theirs in _grouped(terms, "estimator"):
        by_view = [
            Looking(looking, looking[0].view, any("original_samples" in term.needs for term in looking))
            for looking in _grouped(theirs, "view")
        ]
        groups.append(Estimating(theirs[0].estimator, _draws(theirs[0].estimator), theirs, by_view))
    return groups


def _grouped(terms: Iterable[Term], name: str) -> list[list[Term]]:
    """Groups terms by one of their attributes, which may be unhashable."""
    groups = []
    for term in terms:
        group = next((group for group in groups if getattr(group[0], name) == getattr(term, name)), None)
        if group is None:
            groups.append([term])
        else:
            group.append(term)
    return groups


def show(
    groups: Sequence[Estimating],
    lambdas: dict[str, Tensor],
    prediction: Prediction,
    context: dict,
    *,
    at: Factors | None,
    is_image: bool,
    tried: Set[str],
) -> dict[str, Shown]:
    """Computes the input of each term, by name. Terms that share an estimator and a view share its result.

    Args:
        groups: terms of the loss, grouped by `sharing`.
        lambdas: by name, the weighting of each image, (B,); images with weighting 0 are left out.
        prediction: for the whole batch; with `is_image`, its model_output is x0_hat.
        context: for the whole batch, with `original_samples` and `original_images` if the loop passes them.
        at: noise levels in the shape of the images, if the caller knows them.
        is_image: whether the loop passed x0_hat instead of the model output.
        tried: names of the terms of earlier calls. A view that no term has used before is checked in the backward
            pass, which waits for an accelerator.
    """
    found, drawn, batch_size = {}, [], len(prediction)
    for group in groups:
        draws, places = group.draws, _active(lambdas, group.terms)
        x0_hat = _estimate(group.estimator, prediction, at, places, is_image)
        for looking in group.by_view:
            theirs, images, view = places, x0_hat, looking.view
            if len(group.by_view) > 1:
                among = _is_active(lambdas, looking.terms)[places].nonzero().flatten()
                theirs, images = places[among], _cut_draws(x0_hat, among, len(places), draws)
            if view is not None and theirs.shape[0] > 0 and view not in drawn:
                draw(view, images)
                drawn.append(view)
            shown = _look(looking, theirs, images, context, batch_size, tried, draws)
            for term in looking.terms:
                found[term.name] = shown
    return found


def _draws(estimator: Callable) -> int:
    return getattr(estimator, "draws", 1)


def _active(lambdas: dict[str, Tensor], terms: Sequence[Term]) -> Tensor:
    """Returns the positions of the images with a non-zero weighting in at least one term, (n,)."""
    weightings = lambdas[terms[0].name] if len(terms) == 1 else _is_active(lambdas, terms)
    return weightings.nonzero().flatten()


def _is_active(lambdas: dict[str, Tensor], terms: Sequence[Term]) -> Tensor:
    """Whether the weighting of an image is non-zero in at least one term, (B,)."""
    return torch.stack([lambdas[term.name] != 0 for term in terms]).any(0)


def _estimate(
    estimator: Callable[[Prediction], Tensor],
    prediction: Prediction,
    at: Factors | None,
    places: Tensor,
    is_image: bool,
) -> Tensor:
    """Computes x0_hat of the chosen images, (draws n, C, ...), in at least float32."""
    output, count = prediction.model_output, len(prediction)
    dtype = full_precision(output.dtype)
    if places.shape[0] == 0:
        return output.detach()[:0].to(dtype)
    if estimator is one_step:  # it uses a part of the prediction, and only that is indexed
        sample, chosen = prediction.sample, positions(places, count)
        levels = prediction.timesteps if at is None else at
        if chosen is not None:
            output, sample = cut(output, chosen, count), cut(sample, chosen, count)
            levels = cut(levels, chosen, count) if at is None else _cut_factors(at, chosen, count)
        if is_image:
            return output.to(dtype)
        return predict_original_sample(prediction.scheduler, output, levels, sample)
    if not calls_model(estimator):
        prediction = replace(prediction, model=None, model_kwargs=None)
    chosen = prediction[places]
    if is_image:
        implied = model_output_for(chosen.scheduler, chosen.model_output, chosen.timesteps, chosen.sample)
        chosen = replace(chosen, model_output=implied)
    return checked_estimate(estimator, chosen)


def _cut_factors(at: Factors, index: Tensor | None, batch_size: int) -> Factors:
    return at._replace(**{name: cut(getattr(at, name), index, batch_size) for name in ("timesteps", "alpha", "sigma")})


def checked_estimate(estimator: Callable[[Prediction], Tensor], prediction: Prediction) -> Tensor:
    """Computes x0_hat of the images of a prediction, (draws n, C, ...).

    Raises:
        TermError: the estimator does not return one x0_hat per image and draw, or, unless it calls the network, one
            that is detached from the network's output.
    """
    x0_hat = estimator(prediction)
    expected = _draws(estimator) * len(prediction)
    if not isinstance(x0_hat, Tensor) or x0_hat.shape[:1] != (expected,):
        got = f"a tensor of shape {tuple(x0_hat.shape)}" if isinstance(x0_hat, Tensor) else type(x0_hat).__name__
        raise TermError(f"an estimator must return one x0_hat per image and draw, ({expected}, C, ...), not {got}")
    is_attached = prediction.model_output.requires_grad and torch.is_grad_enabled() and not calls_model(estimator)
    if is_attached and not x0_hat.requires_grad:
        raise TermError(
            "an estimator returns images that are detached from the network's output: no gradient can reach the model."
            " Look for torch.no_grad, .detach() or numpy in it"
        )
    return x0_hat


def _look(
    looking: Looking, places: Tensor, x0_hat: Tensor, context: dict, batch_size: int, tried: Set[str], draws: int
) -> Shown:
    """Computes the input of terms with the same view: x0_hat of their images, and x_0 if one of them needs it."""
    if places.shape[0] == 0:
        return Shown(places, x0_hat, None, draws=draws)
    terms, images, originals, guard = looking.terms, x0_hat, None, None
    if looking.view is not None:
        apart = by_image(x0_hat, draws)  # an alias: the guard does not change the gradients of other views
        x0_hat = by_draw(apart, draws)
        images = viewed(terms[0], x0_hat)
        is_new = tried.isdisjoint(term.name for term in terms)
        if is_new and images.requires_grad and x0_hat.requires_grad:
            _check_gradient(terms[0], x0_hat, images)
        guard = ViewGuard(apart, images)
    if looking.is_paired and looking.view is not None and "original_images" in context:
        given = cut(context["original_images"], positions(places, batch_size), batch_size, "original_images")
        originals = _cropped(terms[0], given, x0_hat.detach(), images.detach())
    elif looking.is_paired and "original_samples" in context:
        given = cut(context["original_samples"], positions(places, batch_size), batch_size, "original_samples")
        with torch.no_grad():
            originals = viewed(terms[0], given)
    return Shown(places, images, originals, guard, is_shared=len(terms) > 1, draws=draws)


def _check_gradient(term: Term, x0_hat: Tensor, images: Tensor) -> None:
    """Raises TermError in the backward pass if the view turns a gradient into 0 everywhere."""
    reached = []
    images.register_hook(lambda gradients: reached.append(gradients.isfinite().all() & gradients.any()))

    def check(gradients: Tensor) -> None:
        if reached and bool(reached[-1]) and not bool(gradients.any()):
            raise TermError(
                f"the view of {term.name!r} passes no gradient to x0_hat: its result does not depend on x0_hat, or the"
                " gradient is too small for its dtype"
            )

    x0_hat.register_hook(check)


def _cropped(term: Term, original_images: Tensor, x0_hat: Tensor, images: Tensor) -> Tensor:
    """Returns the part of given images that corresponds to the images that the view shows, (n, C', ...)."""
    select = getattr(term.view, "cropped", None)
    chosen = original_images if select is None else select(original_images, x0_hat, images)
    if chosen.shape[1:] != images.shape[1:]:
        raise ValueError(
            f"original_images have the size {tuple(chosen.shape[1:])}, but the view of {term.name!r} returns"
            f" {tuple(images.shape[1:])}"
        )
    return chosen.detach().to(images)
