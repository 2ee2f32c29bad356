"""One extra loss, `Term`: a regularizer with its weight in the objective.

This module also checks the contract of regularizers and weightings, for training, guidance and evaluation alike.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .context import tensors_in, unwrap
from .estimators import Prediction, one_step
from .precision import all_finite, full_precision, versions_of
from .prediction import NoiseLevel
from .regularizers.contract import Regularizer, TermError, needs_of, regularizer_name
from .weight_rules import AutoWeight, Target, rule_of
from .weighting import matched

__all__ = [
    "Term",
    "TermError",
    "checked_terms",
    "checked_values",
    "checked_weights",
    "draw",
    "needs_of",
    "refuse_rules",
    "score",
    "seen_through",
    "term_context",
    "viewed",
]

_NORMALIZATIONS = ("batch", "active")
_AS_IT_IS = nullcontext()


@dataclass(frozen=True)
class Term:
    """One extra loss: weight * mean_i [ weighting(t_i) * regularizer(view(x0_hat_i)) ].

    Attributes:
        regularizer: loss on the image, (n, C, H, W) -> (n,); see `regularizers.Regularizer`.
        weight: factor of the term in the loss, finite and at least 0; or a rule that finds it in training, see
            `adaptive_weights`: `AutoWeight(share)`, `Target(value, relative=False)`.
        weighting: factor by noise level, `NoiseLevel -> (B,)`; see `weighting`.
        name: key in `LossOutput.terms` and in logs. Default: the name of the regularizer.
        estimator: how x0_hat is obtained, `Prediction -> (n, C, ...)`; see `estimators`.
        view: transform of x0_hat before the regularizer, (n, C, ...) -> (n, C', H', W'); see `views`. None: x0_hat in
            the model's units.
        normalize: "batch" averages over all images of the batch, including those with weighting 0. "active" averages
            over the images with non-zero weighting in this call (at least 1), so the term does not fade if few images
            take part. With several processes or gradient accumulation, each call has its own mean.
        schedule: factor of the weight over a training, step -> factor; see `weight_schedules`. None: 1. Guidance and
            diagnosis, which have no training step, use the weight itself.

    Raises:
        TypeError: the regularizer, weighting, estimator, view or schedule is not callable, or is a class instead of an
            instance; the weight is not a number or rule; or the estimator has the signature used before 0.4.
        ValueError: the weight is negative or non-finite, `normalize` is unknown, or `Target` is combined with a
            schedule.
        TermError: the regularizer's `needs` is not a sequence of names.
    """

    regularizer: Regularizer
    weight: float | AutoWeight | Target
    weighting: Callable[[NoiseLevel], Tensor] = matched
    name: str = ""
    estimator: Callable[[Prediction], Tensor] = one_step
    view: Callable[[Tensor], Tensor] | None = None
    normalize: str = "batch"
    schedule: Callable[[int], float] | None = None

    def __post_init__(self):
        if not callable(self.regularizer):
            raise TypeError(f"{self.regularizer!r} cannot be called; load_regularizer turns a name into a regularizer")
        for name in ("regularizer", "weighting", "estimator", "view", "schedule"):
            given = getattr(self, name)
            if isinstance(given, type):
                raise TypeError(f"{name} is the class {given.__name__}: pass an instance, {given.__name__}(...)")
        if not callable(self.weighting):
            raise TypeError(
                f"weighting must be callable, NoiseLevel -> (B,), such as weighting.matched, not {self.weighting!r};"
                " load_weighting turns a name into a weighting"
            )
        if not (self.view is None or callable(self.view)):
            raise TypeError(
                f"view must be callable, images -> images, such as views.Affine(2.0, 5.0), not {self.view!r}"
            )
        _check_estimator(self.estimator)
        if not isinstance(self.weight, Real | Tensor | AutoWeight | Target):
            raise TypeError(f"weight must be a number, AutoWeight or Target, not {self.weight!r}")
        if not isinstance(self.weight, AutoWeight | Target) and not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"weight must be finite and at least 0, not {self.weight}")
        if self.normalize not in _NORMALIZATIONS:
            raise ValueError(f"normalize must be one of {', '.join(_NORMALIZATIONS)}, not {self.normalize!r}")
        if not (self.schedule is None or callable(self.schedule)):
            raise TypeError(
                f"schedule must be callable, step -> factor, such as weight_schedules.every(4), not {self.schedule!r}"
            )
        if self.schedule is not None and isinstance(self.weight, Target):
            raise ValueError(f"{self.weight!r} sets the weight from L' in every step: leave the schedule out")
        if not self.name:
            object.__setattr__(self, "name", regularizer_name(self.regularizer))
        self.needs  # noqa: B018 - raises now if it is malformed

    @cached_property
    def needs(self) -> tuple[str, ...]:
        """Names of the keyword arguments that the regularizer needs in addition to the image."""
        return needs_of(self.regularizer)

    def images_in_mean(self, weights: Tensor, image_mask: Tensor | None) -> int | Tensor:
        """Returns the number of images that the sum over a batch is divided by, at least 1.

        Args:
            weights: (B,) weighting of each image.
            image_mask: (B,) bool, images that take part; None: all.
        """
        if self.normalize == "active":
            return (weights != 0).sum().clamp(min=1)
        return max(weights.shape[0], 1) if image_mask is None else torch.as_tensor(image_mask).sum().clamp(min=1)


def seen_through(term: Term, view: Callable[[Tensor], Tensor] | None) -> Term:
    """Returns the term with this view, unless it already has a view."""
    return replace(term, view=view) if term.view is None else term


def checked_terms(terms: Iterable[Term]) -> tuple[Term, ...]:
    """Returns the terms of a loss, with distinct names.

    Raises:
        TypeError: `terms` is not a sequence of `Term`.
        ValueError: two terms have the same name, or a term is named "denoising".
    """
    if isinstance(terms, Term) or callable(terms):
        raise TypeError("terms must be a sequence of Term: [Term(...)]")
    terms = tuple(terms)
    for term in terms:
        if not isinstance(term, Term):
            given = getattr(term, "__name__", repr(term))
            raise TypeError(f"terms must be a sequence of Term: use Term({given}, weight=0.1) instead of {given}")
    names = [term.name for term in terms]
    if len({"denoising", *names}) <= len(names):
        raise ValueError(f"terms need different names, none 'denoising', got {names}: use Term(..., name=...)")
    return terms


def refuse_rules(terms: Iterable[Term], where: str) -> None:
    """Raises ValueError for a term whose weight a rule sets, where nothing is trained."""
    for term in terms:
        if rule_of(term.weight).is_measured:
            raise ValueError(
                f"term {term.name!r}: {where} needs a number as its weight; {term.weight!r} is measured in training"
            )


def checked_weights(term: Term, level: NoiseLevel) -> Tensor:
    """Computes the term's weighting of each noise level, (B,).

    Raises:
        TermError: the result is not a finite (B,) tensor.
    """
    weights = term.weighting(level)
    if not isinstance(weights, Tensor) or weights.shape != level.snr.shape:
        got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise TermError(
            f"the weighting of {term.name!r} must return one value per image, ({len(level.snr)},), not {got}"
        )
    if weights.device.type == "cpu" and not all_finite(weights):  # elsewhere this would wait for the device
        at = level.timesteps[~weights.isfinite()]
        raise TermError(f"the weighting of {term.name!r} is not finite at timesteps {at.min():g} to {at.max():g}")
    return weights


def draw(view: Callable[[Tensor], Tensor] | None, images: Tensor) -> None:
    """Lets a random view draw for the next step; other views have no method `draw`.

    Args:
        view: the view of a term, or None.
        images: (n, C, ...) input of the view.
    """
    if (method := getattr(view, "draw", None)) is not None:
        method(images)


def viewed(term: Term, images: Tensor) -> Tensor:
    """Applies the term's view to images.

    Args:
        term: the term; without a view, the images are returned unchanged.
        images: (n, C, ...).

    Returns:
        (n, C', H', W'); the result of a view is converted to at least float32.

    Raises:
        TermError: the view does not return n images, or returns images detached from its input.
    """
    if term.view is None:
        return images
    with _outside_autocast(images.device):
        seen = term.view(images)
    if not isinstance(seen, Tensor) or seen.shape[:1] != images.shape[:1]:
        got = f"a tensor of shape {tuple(seen.shape)}" if isinstance(seen, Tensor) else type(seen).__name__
        raise TermError(f"the view of {term.name!r} must return one image per image, ({len(images)}, ...), not {got}")
    if images.requires_grad and not seen.requires_grad:
        raise TermError(
            f"the view of {term.name!r} returns images that are detached from x0_hat: no gradient can reach the model."
            " Look for torch.no_grad, .detach() or numpy in it"
        )
    return seen.to(full_precision(seen.dtype))


def checked_values(term: Term, images: Tensor, context: dict, *, compare: bool = False) -> Tensor:
    """Computes L' of each image in full precision, outside autocast: (n,).

    Args:
        term: term with the regularizer to call.
        images: (n, C, ...) images after the view; see `viewed`.
        context: exactly the names in the regularizer's `needs`; see `term_context`.
        compare: also compare values, to detect changes that autograd cannot see (`.data`, numpy). Waits for an
            accelerator.

    Raises:
        TermError: the regularizer does not return an (n,) tensor attached to the images, or modifies its arguments in
            place, which would affect the other terms and the caller.
    """
    given = [images]
    for value in context.values():
        given += [value] if isinstance(value, Tensor) else tensors_in(value)
    versions = versions_of(given)
    copies = [tensor.detach().clone() for tensor in given] if compare else []
    with _outside_autocast(images.device):
        # An alias, because a regularizer may differentiate with respect to its argument.
        values = term.regularizer(images.view_as(images), **context)
    if versions != versions_of(given) or (compare and not all(map(_same, copies, given))):
        raise TermError(
            f"regularizer {term.name!r} modifies its arguments in place, which affects other terms and the caller: use"
            " the functions without a trailing underscore (clamp for clamp_), and x = x + 1 for x += 1"
        )
    if not isinstance(values, Tensor) or values.shape != images.shape[:1]:
        got = f"a tensor of shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise TermError(
            f"regularizer {term.name!r} must return one value per image, a tensor of shape ({len(images)},);"
            f" it returned {got}. To average over all but the first dimension, use value.flatten(1).mean(1)"
        )
    if images.requires_grad and not values.requires_grad:
        raise TermError(
            f"regularizer {term.name!r} returns a tensor that is detached from x0_hat: no gradient can reach the"
            " model. Look for torch.no_grad, .detach(), .item() or numpy in it"
        )
    return values


def term_context(term: Term, context: Mapping[str, Any]) -> dict:
    """Selects the entries of `context` that the regularizer lists in `needs`.

    Raises:
        TermError: an entry is missing.
    """
    if context.keys() >= set(term.needs):
        return {name: context[name] for name in term.needs}
    missing = ", ".join(name for name in term.needs if name not in context)
    given = ", ".join(name for name in context if name != "timesteps")  # always present
    raise TermError(
        f"regularizer {term.name!r} needs {missing}, but the loss was given {given or 'nothing'}:"
        " pass it as a keyword argument"
    )


def score(term: Term, samples: Tensor, context: Mapping[str, Any] | None = None) -> Tensor:
    """Evaluates L' on finished samples: (n,) float32, detached.

    Gradients are enabled inside, because a regularizer may differentiate with respect to its argument.

    Args:
        term: the term; its weight and weighting are ignored.
        samples: (n, C, ...) in the model's units.
        context: at least the names in the regularizer's `needs`, one entry per sample or `Shared`; `original_samples`
            in the model's units.

    Raises:
        TermError: the regularizer or view violates its contract, or an entry of `context` is missing.
    """
    context = unwrap(term_context(term, context or {}))
    draw(term.view, samples)
    if "original_samples" in context:
        context["original_samples"] = viewed(term, context["original_samples"])
    with torch.enable_grad():
        seen = viewed(term, samples.detach().float().requires_grad_())
        return checked_values(term, seen, context, compare=True).detach().float()


def _check_estimator(estimator) -> None:
    """Raises TypeError unless the estimator is a callable with one required argument."""
    if not callable(estimator):
        raise TypeError(
            f"estimator must be callable, Prediction -> x0_hat, such as estimators.one_step, not {estimator!r}"
        )
    try:
        parameters = inspect.signature(estimator).parameters.values()
    except (TypeError, ValueError):  # a builtin may lack a signature
        return
    required = [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    if len(required) > 1:
        raise TypeError(
            f"since 0.4 an estimator takes one Prediction p, not ({', '.join(required)}): use p.scheduler,"
            " p.model_output, p.timesteps, p.sample; estimators.one_step replaces predict_original_sample"
        )


def _outside_autocast(device: torch.device):
    """Disables autocast where it is enabled."""
    is_available = torch.amp.is_autocast_available(device.type)
    if is_available and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return _AS_IT_IS


def _same(one: Tensor, other: Tensor) -> bool:
    return other.is_meta or bool(((one == other) | (one.isnan() & other.isnan())).all())
