"""Turns a diagnosis into an answer: whether a loss makes sense on the data, why, and with which weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .result import Cost, Diagnosis, Effect

__all__ = ["CONTRADICTS", "SMALLEST_EFFECT", "Verdict", "judge"]

SMALLEST_EFFECT = 0.02
"""Net share of an error that the best gradient step on L' must remove for a loss to make sense, see `effect`.

Chosen on the pairs of opposite wishes in docs/benchmarks/opposites.py: losses that improve images reach it, but never
both wishes of a pair.
"""

_STANDARD_ERRORS = 2
_UNFULFILLED = 0.5  # limit of `clean_pull`: above it, the data do not satisfy the wish
_BLUR = 0.25  # share of the way from L' of images to L' of their mean, above which x0_hat counts as a blur
_SMALL_SHARE = 0.02
_DEAR = 0.05  # rise of the denoising loss above which a weight is too expensive
_NO_FALL = 1e-3
_FAR = 20.0  # in standard deviations of the data
_SATISFIED = 0.01  # L' of images, over that of slightly noisy ones, below which the data satisfy the wish
_SHRINKS = 0.5  # share of L' that is left where images vary half as much, below which shrinking pays
CONTRADICTS = "contradicts the data"
_HELPS, _IDLE = "makes sense", "has no effect"


@dataclass(frozen=True)
class Verdict:
    """The answer of a diagnosis, with its reasons.

    Attributes:
        answer: "makes sense", "makes sense only below t=...", "contradicts the data", "has no effect" or "cannot
            work"; the first two end in ", with a smaller weight" if the weight of the term is too expensive.
        reasons: full sentences, each with its numbers.
        recommended: the recommended weighting and weight; None if there is none.
        max_timestep: the last timestep at which x0_hat is clear enough for L'; None if it always is.
    """

    answer: str
    reasons: tuple[str, ...]
    recommended: Cost | None = None
    max_timestep: float | None = None


def judge(diagnosis: Diagnosis) -> Verdict:
    """Derives the verdict from a diagnosis.

    The rules, in this order: A loss that is non-finite or runs away cannot work. A loss that moves nothing has no
    effect. If the best gradient step has a net effect below `SMALLEST_EFFECT`, the loss contradicts the data, or has
    no effect if the data satisfy it. If the weighting acts where x0_hat is a blur, the loss makes sense only below
    some timestep. If the weight is too expensive, the loss makes sense with a smaller weight.
    """
    if problem := _why_impossible(diagnosis):
        return Verdict("cannot work", (problem,))
    limit = _last_clear_timestep(diagnosis)
    recommended = next(
        (cost for cost in diagnosis.affordable[_DEAR] if cost.largest_rise <= 1 and cost.fall > 0), None
    )
    shrinking = _shrinking(diagnosis)
    if idle := _why_idle(diagnosis):
        return Verdict(_IDLE, (idle, *shrinking), recommended, limit)
    answer, reason = _effect(diagnosis)
    reasons = [reason, _on_data(diagnosis), *shrinking, _bargain(diagnosis)]
    if diagnosis.unbounded:
        reasons.append(
            "L' has no minimum: a much larger weight would move x0_hat by over 20 standard deviations of the data."
        )
    if bad := max(level.best.nonfinite for level in diagnosis.levels):
        reasons.append(f"It is non-finite on up to {bad} of {diagnosis.held_out} best guesses, which it skips.")
    if limit is not None and limit < diagnosis.levels[0].timestep:
        answer = CONTRADICTS
        reasons.append(f"Already at t={diagnosis.levels[0].timestep:g} the best guess is a blur for L'.")
    if answer != _HELPS:
        return Verdict(answer, (*reasons, _shift(diagnosis)), None, limit)
    acts_on_blur, blur = _blur(diagnosis, limit)
    reasons += [blur, _price(diagnosis)]
    if acts_on_blur:
        answer = f"makes sense only below t={limit:g}"
    if diagnosis.asked.rise > _DEAR:
        answer += ", with a smaller weight"
    return Verdict(answer, tuple(reasons), recommended, limit)


def _why_impossible(diagnosis: Diagnosis) -> str:
    bad = [level for level in diagnosis.levels if level.best.nonfinite > diagnosis.held_out / 2]
    if sum(level.decided_share for level in bad) > 0.5:
        return (
            f"It, or its gradient, is non-finite on {bad[0].best.nonfinite} of {diagnosis.held_out} best guesses at"
            f" t={bad[0].timestep:g}: look for a root, a logarithm or a quotient."
        )
    furthest = max(level.displacement for level in diagnosis.levels)
    if furthest > _FAR:
        return (
            f"At weight {diagnosis.asked.weight:.3g} nothing holds x0_hat back: it moves by {furthest:.3g} standard"
            " deviations of the data. Bound L' from below, or use a far smaller weight."
        )
    return ""


def _why_idle(diagnosis: Diagnosis) -> str:
    if diagnosis.asked.weight == 0:
        return "Its weight is 0."
    if all(level.best.auxiliary_gradient == 0 for level in diagnosis.levels):
        value = max(level.best.value for level in diagnosis.levels)
        return (
            f"It exerts no pull: weighting or gradient is 0 at every timestep. L' of the best guess is at most"
            f" {value:.3g}, L' of real images {diagnosis.data.mean:.3g}."
        )
    largest = max(level.displacement for level in diagnosis.levels)
    if diagnosis.asked.fall < _NO_FALL and largest < _NO_FALL:
        return (
            f"At weight {diagnosis.asked.weight:.3g} it moves x0_hat by at most {largest:.1e} standard deviations of"
            f" the data, and L' falls by {diagnosis.asked.fall:.2%}."
        )
    return ""


def _effect(diagnosis: Diagnosis) -> tuple[str, str]:
    """Returns the answer that follows from the best gradient step on L', and the deciding numbers."""
    cosine, cosine_error, effect, what = _measured(diagnosis)
    numbers = (
        f"the best gradient step on L' removes {effect.removed:.2%} of {what} and moves clean images by"
        f" {effect.moved:.2%} of it: net {effect.net:+.2%} ± {effect.net_error:.2%}, threshold {SMALLEST_EFFECT:.0%}"
        f" (cosine {cosine:+.3f} ± {cosine_error:.3f})"
    )
    if effect.net >= SMALLEST_EFFECT and effect.net > _STANDARD_ERRORS * effect.net_error:
        return _HELPS, f"Lowering L' leads towards real images: {numbers}."
    if cosine < -_STANDARD_ERRORS * cosine_error:
        return CONTRADICTS, f"Lowering L' leads away from real images: {numbers}."
    if effect.clean_pull > _UNFULFILLED:
        return CONTRADICTS, (
            f"Your data do not satisfy this: its squared gradient at clean images is {effect.clean_pull:.0%} of that"
            f" at images with {what}; {numbers}."
        )
    return _IDLE, f"Your data satisfy this, but it corrects too little: {numbers}."


def _measured(diagnosis: Diagnosis) -> tuple[float, float, Effect, str]:
    """Returns cosine, its standard error, effect and name of the error: that of the model, if there is one."""
    if not all(level.model for level in diagnosis.levels):
        data = diagnosis.data
        return data.agreement, data.agreement_error, data.effect, "leftover noise"
    # A sample keeps the model's error at t to the share that is decided there.
    kept = [level.decided_share * math.sqrt(level.model.error) for level in diagnosis.levels]
    models = [level.model for level in diagnosis.levels]

    def mean(of) -> float:
        # The levels share their images, so their standard errors add up linearly.
        return sum(share * of(model) for share, model in zip(kept, models, strict=True)) / sum(kept)

    names = ("removed", "moved", "net", "net_error", "clean_pull")
    effect = Effect(**{name: mean(lambda model, name=name: getattr(model.effect, name)) for name in names})
    return mean(lambda model: model.cosine), mean(lambda model: model.cosine_error), effect, "the model's own errors"


def _bargain(diagnosis: Diagnosis) -> str:
    """Describes the fall of L' for the smallest rise of the denoising loss."""
    rise, costs = min(diagnosis.affordable.items())
    own = [cost for cost in costs if cost.weighting == diagnosis.asked.weighting]
    if not costs:
        return f"No weight makes the denoising loss rise by {rise:.0%}."
    cost = (own or costs)[0]
    return (
        f"A rise of the denoising loss by {rise:.0%} buys a fall of L' by {cost.fall:.1%} ({cost.weighting}, weight"
        f" {cost.weight:.2g})."
    )


def _on_data(diagnosis: Diagnosis) -> str:
    data = diagnosis.data
    low, high = data.percentiles[1], data.percentiles[99]
    if data.mean == 0 and data.standard_deviation == 0:
        return "Real images satisfy this: L' is 0 on all of them, so it can only correct errors of the network."
    return (
        f"L' of real images is {data.mean:.3g}, 98 % of them between {low:.3g} and {high:.3g}: a value below {low:.3g}"
        " is not better than the data, only different."
    )


def _shrinking(diagnosis: Diagnosis) -> tuple[str, ...]:
    """Returns a warning where the data satisfy the wish, and noisy images that vary less come nearer to it."""
    data = diagnosis.data
    if diagnosis.asked.weight == 0 or not data.noisy > 0 or abs(data.mean) > _SATISFIED * data.noisy:
        return ()
    if not data.halfway <= _SHRINKS * data.noisy:
        return ()
    return (
        f"It can be lowered by shrinking: halfway to the mean of the data, L' of noisy images is {data.halfway:.3g} in"
        f" place of {data.noisy:.3g}. A network that has not converged may do that: compare the standard deviation of"
        " its samples with that of the data.",
    )


def _shift(diagnosis: Diagnosis) -> str:
    asked = diagnosis.asked
    return (
        f"At weight {asked.weight:.3g} ({asked.weighting}) it buys a fall of L' by {asked.fall:.1%} for a rise of the"
        f" denoising loss by {asked.rise:.1%}."
    )


def _blur(diagnosis: Diagnosis, limit: float | None) -> tuple[bool, str]:
    """Returns whether the weighting acts where the best guess is a blur, and a sentence about it."""
    if limit is None:
        largest = max((level.best.gap for level in diagnosis.levels), key=abs)
        return (
            False,
            f"To L', the best guess is not a blur at any timestep: its gap to real images is {largest:+.3g} at most.",
        )
    beyond = [level for level in diagnosis.levels if level.timestep > limit]
    gap = beyond[0].best
    decided = sum(level.decided_share for level in beyond)
    finding = (
        f"Above t={limit:g} the best guess is a blur: its L' differs from real images by {gap.gap:+.3g} ±"
        f" {gap.gap_error:.1g} at t={beyond[0].timestep:g}, and only {decided:.1%} of a sample is decided there"
    )
    pull = [level.training_share * level.denoising_weight * level.displacement**2 for level in diagnosis.levels]
    there = sum(value for value, level in zip(pull, diagnosis.levels, strict=True) if level.timestep > limit)
    share = there / sum(pull) if sum(pull) else 0.0
    if share > _SMALL_SHARE:
        return True, f"{finding}; this weighting spends {share:.0%} of its cost there."
    return False, f"{finding}; this weighting is (nearly) 0 there, with {share:.1%} of its cost."


def _price(diagnosis: Diagnosis) -> str:
    asked = diagnosis.asked
    dear = ", which is expensive" if asked.rise > _DEAR else ""
    return (
        f"At weight {asked.weight:.3g} ({asked.weighting}) the denoising loss rises by {asked.rise:.2%}{dear}, and L'"
        f" falls by {asked.fall:.1%}."
    )


def _last_clear_timestep(diagnosis: Diagnosis) -> float | None:
    """Returns the last timestep up to which L' of the best guess is close to that of an image; None if it always is.

    Returns the first timestep minus 1 if it never is.
    """
    data = diagnosis.data
    whole_way = max(abs(data.blurred - data.mean), data.standard_deviation / 2)
    if whole_way == 0:  # the mean of all images satisfies the wish as well as they do
        return None
    clear = None
    for level in diagnosis.levels:
        towards = math.copysign(1.0, data.blurred - data.mean)
        if towards * level.best.gap - _STANDARD_ERRORS * level.best.gap_error > _BLUR * whole_way:
            return clear if clear is not None else level.timestep - 1
        clear = level.timestep
    return None
