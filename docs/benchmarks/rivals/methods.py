"""The methods that a case compares: ours, and our implementations of published ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ensemble import PerMember
from torch import Tensor

from reg_diffusers import NoiseLevel, RegularizedLoss, Term
from reg_diffusers.recipes import pidm
from reg_diffusers.regularizers import equality
from reg_diffusers.weighting import constant, gated, matched

__all__ = ["MEAN", "METHODS", "PBFM", "SAMPLE", "Method", "groups"]


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: of the method.
        weight: factor of the loss; 0 for the plain model.
        kind: "ours", "PIDM mean estimation", "PIDM sample estimation" or "PBFM".
        weighting: for "ours".
    """

    name: str
    weight: float = 0.0
    kind: str = "ours"
    weighting: Callable = constant


def matched_to_snr(level: NoiseLevel) -> Tensor:
    """`matched` for a denoising loss with the weight SNR: min(SNR, 100) g.

    The weight of min-SNR-5, which `matched` follows here, ends at 5. This one grows up to the SNR 100, so a larger
    share of the loss lies at the last steps of sampling, which decide the residual.
    """
    return matched(replace(level, denoising_weight=level.snr))


MEAN, SAMPLE, PBFM = "PIDM mean estimation", "PIDM sample estimation", "PBFM"
GATED = gated(3)
METHODS = (
    Method("plain"),
    *(Method(MEAN, c, MEAN) for c in (0.1,)),
    *(Method(SAMPLE, c, SAMPLE) for c in (0.005,)),
    *(Method("matched", weight, weighting=matched) for weight in (1, 5, 20)),
    *(Method("matched to SNR", weight, weighting=matched_to_snr) for weight in (1,)),
    *(Method("gated(3)", weight, weighting=GATED) for weight in (1,)),
    *(Method("constant", weight, weighting=constant) for weight in (1,)),
)


def groups(methods: Sequence[Method], seeds: Sequence[int], scheduler, residual, data_weight: float):
    """Returns (loss, methods) for each kind; a batch of a loss has the rows of its methods, of each all seeds.

    Args:
        methods: the methods to compare.
        seeds: one member of each method per seed.
        scheduler: of the training.
        residual: (n, ...) -> (n, ...), 0 where the law holds.
        data_weight: gamma of min-SNR, the weight of the denoising loss in all of them.
    """
    found = []
    for kind in dict.fromkeys(method.kind for method in methods):
        chosen = [method for method in methods if method.kind == kind]
        weights = [method.weight for method in chosen for _ in seeds]
        if kind == "ours":
            term = Term(equality(residual), 1.0, name="residual")
            weightings = [method.weighting for method in chosen for _ in seeds]
        else:
            (term,) = pidm(scheduler, residual, 1.0, sample=kind == SAMPLE).regularization.terms
            weightings = [term.weighting] * len(weights)
        term = replace(term, weighting=PerMember(weights, weightings))
        found.append((RegularizedLoss(scheduler, [term], snr_gamma=data_weight), chosen))
    return found
