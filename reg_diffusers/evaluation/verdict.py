"""The answer in words: does this loss make sense on these data, why, and with which weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .diagnosis_result import Cost, Diagnosis

__all__ = ["Verdict", "judge"]

_STANDARD_ERRORS = 2
_AGREEMENT = 0.02  # a cosine below is no help: its square is the share of an error that a step takes away
_BLUR = 0.25  # of the way from L' of images to L' of their mean: from there on x0_hat is a blur rather than an image
_SMALL_SHARE = 0.02
_DEAR = 0.05  # rise of the denoising loss
_NO_FALL = 1e-3
_FAR = 20.0  # spreads of the data


@dataclass(frozen=True)
class Verdict:
    """What follows from a diagnosis.

    Attributes:
        answer: "makes sense", "makes sense only below t=...", "contradicts the data", "has no effect" or "cannot
            work"; the first two with ", with a smaller weight" where the one asked for is dear.
        reasons: whole sentences, each with its number.
        recommended: weighting and weight, or None where there is nothing to recommend.
        max_timestep: the timestep from which on x0_hat is too much of a blur for L', or None if it never is.
    """

    answer: str
    reasons: tuple[str, ...]
    recommended: Cost | None = None
    max_timestep: float | None = None


def judge(diagnosis: Diagnosis) -> Verdict:
    """Weighs what was measured.

    In this order: a loss that is no number, or runs away, cannot work; one that moves nothing has no effect; one whose
    decrease brings no image nearer to a real one contradicts the data; one whose weighting acts where x0_hat is a blur
    makes sense below some timestep only; one that is dear makes sense with a smaller weight.
    """
    if problem := _why_impossible(diagnosis):
        return Verdict("cannot work", (problem,))
    limit = _last_clear_timestep(diagnosis)
    recommended = next(
        (cost for cost in diagnosis.affordable[_DEAR] if cost.largest_rise <= 1 and cost.fall > 0), None
    )
    if idle := _why_idle(diagnosis):
        return Verdict("has no effect", (idle,), recommended, limit)
    agrees, reason = _agreement(diagnosis)
    reasons = [reason, _on_data(diagnosis)]
    if diagnosis.unbounded:
        reasons.append("L' has no minimum: at a much larger weight x0_hat would end more than 20 spreads away.")
    if bad := max(level.best.nonfinite for level in diagnosis.levels):
        reasons.append(f"It is no number on up to {bad} of {diagnosis.held_out} best guesses, which go without it.")
    if limit is not None and limit < diagnosis.levels[0].timestep:
        agrees = False
        reasons.append(f"Already at t={diagnosis.levels[0].timestep:g} the best guess is a blur for L'.")
    if not agrees:
        return Verdict("contradicts the data", (*reasons, _shift(diagnosis)), None, limit)
    acts_on_blur, blur = _blur(diagnosis, limit)
    reasons += [blur, _price(diagnosis)]
    answer = f"makes sense only below t={limit:g}" if acts_on_blur else "makes sense"
    if diagnosis.asked.rise > _DEAR:
        answer += ", with a smaller weight"
    return Verdict(answer, tuple(reasons), recommended, limit)


def _why_impossible(diagnosis: Diagnosis) -> str:
    bad = [level for level in diagnosis.levels if level.best.nonfinite > diagnosis.held_out / 2]
    if sum(level.decided_share for level in bad) > 0.5:
        return (
            f"It, or its gradient, is no number on {bad[0].best.nonfinite} of {diagnosis.held_out} best guesses at"
            f" t={bad[0].timestep:g}: look for a root, a logarithm or a quotient."
        )
    furthest = max(level.displacement for level in diagnosis.levels)
    if furthest > _FAR:
        return (
            f"At weight {diagnosis.asked.weight:.3g} nothing holds x0_hat back: it ends {furthest:.3g} spreads of the"
            " data away. L' must be bounded below, or its weight far smaller."
        )
    return ""


def _why_idle(diagnosis: Diagnosis) -> str:
    if diagnosis.asked.weight == 0:
        return "Its weight is 0."
    if all(level.best.auxiliary_gradient == 0 for level in diagnosis.levels):
        value = max(level.best.value for level in diagnosis.levels)
        return (
            f"Nothing pulls: weighting or gradient is 0 at every timestep. L' of the best guess is at most"
            f" {value:.3g}, that of real images {diagnosis.data.mean:.3g}."
        )
    largest = max(level.displacement for level in diagnosis.levels)
    if diagnosis.asked.fall < _NO_FALL and largest < _NO_FALL:
        return (
            f"At weight {diagnosis.asked.weight:.3g} it moves x0_hat by at most {largest:.1e} of the data's spread,"
            f" and L' falls by {diagnosis.asked.fall:.2%}."
        )
    return ""


def _agreement(diagnosis: Diagnosis) -> tuple[bool, str]:
    """Whether lowering L' brings images nearer to real ones; those of the model where there is one."""
    cosine, error = diagnosis.data.agreement, diagnosis.data.agreement_error
    whose = "leftover noise in real images"
    if all(level.model for level in diagnosis.levels):
        # Of the model's error at t, a sample keeps the share that is decided there.
        kept = [level.decided_share * math.sqrt(level.model.error) for level in diagnosis.levels]
        shares = [value / sum(kept) for value in kept]
        cosine = sum(share * level.model.cosine for share, level in zip(shares, diagnosis.levels, strict=True))
        # The levels share their images, so their errors add up as they are.
        error = sum(share * level.model.cosine_error for share, level in zip(shares, diagnosis.levels, strict=True))
        whose = "the model's own errors"
    agrees = cosine > max(_STANDARD_ERRORS * error, _AGREEMENT)
    measured = f"(cosine {cosine:+.3f} ± {error:.3f} between its gradient and {whose})"
    if agrees:
        return True, (
            f"Lowering L' leads towards real images {measured}: the best step against it would take away"
            f" {cosine**2:.1%} of such an error."
        )
    if cosine < -_STANDARD_ERRORS * error:
        return False, f"Lowering L' leads away from real images {measured}."
    return False, f"Lowering L' does not lead towards real images {measured}: it knows nothing that the data know."


def _on_data(diagnosis: Diagnosis) -> str:
    data = diagnosis.data
    low, high = data.percentiles[1], data.percentiles[99]
    if data.mean == 0 and data.standard_deviation == 0:
        return "Real images fulfil the wish: L' is 0 on all of them, so it can only mend what the network gets wrong."
    return (
        f"L' of real images is {data.mean:.3g}, 98 % of them between {low:.3g} and {high:.3g}: a value below {low:.3g}"
        " is not better than the data, it is other than the data."
    )


def _shift(diagnosis: Diagnosis) -> str:
    asked = diagnosis.asked
    return (
        f"At weight {asked.weight:.3g} ({asked.weighting}) it buys a fall of L' by {asked.fall:.1%} for a rise of the"
        f" denoising loss by {asked.rise:.1%}."
    )


def _blur(diagnosis: Diagnosis, limit: float | None) -> tuple[bool, str]:
    """Whether the weighting acts where the best guess is no image, and what is to be said of that."""
    if limit is None:
        largest = max((level.best.gap for level in diagnosis.levels), key=abs)
        return (
            False,
            f"At no timestep is the best guess a blur for L': it is {largest:+.3g} at most beside real images.",
        )
    beyond = [level for level in diagnosis.levels if level.timestep > limit]
    gap = beyond[0].best
    decided = sum(level.decided_share for level in beyond)
    said = (
        f"Above t={limit:g} the best guess is a blur: L' of it is {gap.gap:+.3g} ± {gap.gap_error:.1g} beside that of"
        f" real images at t={beyond[0].timestep:g}, and only {decided:.1%} of a sample is decided there"
    )
    pull = [level.training_share * level.denoising_weight * level.displacement**2 for level in diagnosis.levels]
    there = sum(value for value, level in zip(pull, diagnosis.levels, strict=True) if level.timestep > limit)
    share = there / sum(pull) if sum(pull) else 0.0
    if share > _SMALL_SHARE:
        return True, f"{said}; {share:.0%} of what this weighting costs is paid there."
    return False, f"{said}; this weighting is (nearly) 0 there, {share:.1%} of its cost."


def _price(diagnosis: Diagnosis) -> str:
    asked = diagnosis.asked
    dear = ", which is dear" if asked.rise > _DEAR else ""
    return (
        f"At weight {asked.weight:.3g} ({asked.weighting}) the denoising loss rises by {asked.rise:.2%}{dear}, and L'"
        f" falls by {asked.fall:.1%}."
    )


def _last_clear_timestep(diagnosis: Diagnosis) -> float | None:
    """The last timestep up to which L' of the best guess is nearly that of an image; None: it always is.

    One before the first, where it never is.
    """
    data = diagnosis.data
    whole_way = max(abs(data.blurred - data.mean), data.standard_deviation / 2)
    if whole_way == 0:  # the mean of all images fulfils the wish as they do
        return None
    clear = None
    for level in diagnosis.levels:
        towards = math.copysign(1.0, data.blurred - data.mean)
        if towards * level.best.gap - _STANDARD_ERRORS * level.best.gap_error > _BLUR * whole_way:
            return clear if clear is not None else level.timestep - 1
        clear = level.timestep
    return None
