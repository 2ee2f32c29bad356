r"""Diagnosis of wrong arguments: tests hypotheses about the mistake and names the one that explains the numbers.

Let (a, s) = (alpha, sigma) / r with a^2 + s^2 = 1, and y = x_t / r. The loop's output o then satisfies

| o is             | identity                   |
|------------------|----------------------------|
| epsilon          | y - s o = a x_0            |
| sample           | o = x_0                    |
| v_prediction     | a y - s o = x_0            |
| flow_prediction  | y - s o = (a + s) x_0      |

A hypothesis consists of a noise level (a, s) for the timesteps, the scale r, the kind of o, and the sign of o. Its
error is the norm of the difference between the two sides, divided by the larger of ||y|| and ||x_0||. A hypothesis
holds if the error of every image is within the limit. Among those close to the smallest error, the one with the fewest
mistakes is named. Some mistakes cannot be detected: reversed timesteps at T / 2 are right, and a network
that predicts x_0 does not depend on the timesteps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..prediction import predict_original_sample
from ..schedule import is_affine, is_edm, prediction_type
from .readings import UNKNOWN, Level, Mistake, declared_level, levels

__all__ = ["Handed", "diagnosis", "diagnosis_of_time", "errors_as_declared"]

_NAMES = {"epsilon": "the noise", "sample": "x0", "edm": "the network's own output"}
_VELOCITIES = {"v_prediction": "alpha eps - sigma x0", "flow_prediction": "eps - x0", "velocity": "d x_t / d t"}
_MOST_IMAGES, _MOST_VALUES = 16, 4096  # enough to distinguish hypotheses
_ENOUGH_VALUES = 16  # for a fit with two parameters
_ENOUGH_NOISE = 256  # values per image, to measure the size of its noise


@dataclass(frozen=True)
class Handed:
    """The arguments of a loop, reduced to the part needed to compare hypotheses, on the CPU in float64.

    Attributes:
        scheduler: the noise scheduler.
        name: name of the argument with the output.
        kind: expected kind of the output: epsilon, sample, v_prediction, flow_prediction, velocity or edm.
        output: (n, N), of a network without the sign of an `AffineSchedule`.
        timesteps: (n,).
        sample: (n, N) x_t.
        original_samples: (n, N) x_0.
        limit: largest error that is accepted.
    """

    scheduler: object
    name: str
    kind: str
    output: Tensor
    timesteps: Tensor
    sample: Tensor
    original_samples: Tensor
    limit: float

    @classmethod
    def of(cls, scheduler, name, output, timesteps, sample, original_samples, limit) -> Handed:
        """Reduces tensors of any device and precision, (B, C, ...)."""
        kind = {"noise": "epsilon", "x0_hat": "sample"}.get(name) or _declared(scheduler)
        images = (_few(tensor) for tensor in (output, sample, original_samples))
        output, sample, original_samples = images
        if name == "model_output" and is_affine(scheduler):
            output = scheduler.sign * output
        timesteps = timesteps[:_MOST_IMAGES].detach().cpu()
        return cls(scheduler, name, kind, output, timesteps, sample, original_samples, limit)


def diagnosis(handed: Handed) -> str | None:
    """Names the mistake and its fix in one line. Returns None if no hypothesis explains the numbers."""
    held = [
        (error, mistakes)
        for error, mistakes in _hypotheses(handed)
        if mistakes and error <= handed.limit  # False for nan
    ]
    if held:
        best = min(error for error, _ in held)
        floor = handed.limit / (100 if handed.limit < 0.01 else 4)
        alike = [(len(mistakes), error, mistakes) for error, mistakes in held if error <= max(3 * best, floor)]
        _, _, mistakes = min(alike, key=lambda candidate: candidate[:2])
        return None if mistakes == [UNKNOWN] else _named(mistakes)
    return _of_other_images(handed) or _of_other_level(handed) or _of_other_noise(handed)


def diagnosis_of_time(handed: Handed) -> str | None:
    """Names a mistake in timesteps or sample, from the size of the noise between sample and original_samples.

    For outputs that predict x_0, this is the only evidence of such a mistake. Returns None if the mean square of the
    noise is within a factor of two of 1, as for all usual kinds of noise, or cannot be measured.
    """
    rounding = 1e-6 if handed.limit < 0.01 else 4e-3  # error of x_t, which adds to the noise

    if handed.sample.shape[1] < _ENOUGH_NOISE:
        return None

    def worst(level: Level) -> float:
        """Returns the size furthest from 1, after subtracting a possible effect of rounding."""
        sizes = _sizes_of_noise(handed, level)
        sizes = torch.where(sizes < 1, sizes, (sizes / (1 + (rounding / level.s.flatten()) ** 2)).clamp(min=1))
        return sizes[sizes.log().abs().argmax()].item()

    size = worst(declared_level(handed.scheduler, handed.timesteps))
    if 0.5 <= size <= 2 or math.isnan(size):
        return None
    likely = [
        (len(mistakes), distance, mistakes)
        for mistakes, level in levels(handed.scheduler, handed.timesteps)
        if mistakes
        and (level.a / level.s).abs().max() >= 0.1  # x_t of noise alone would agree with any image
        and (distance := abs(math.log(worst(level)))) <= 0.35
    ]
    if likely:
        return _named(min(likely, key=lambda candidate: candidate[:2])[2])
    return (
        "sample does not match original_samples at these timesteps: the noise between them has a mean square of"
        f" {size:.3g}, not 1; pass timesteps and sample of the same step"
    )


def errors_as_declared(handed: Handed) -> Tensor:
    """Computes the error of each image under the hypothesis that nothing is wrong, (n,)."""
    return _errors(handed, declared_level(handed.scheduler, handed.timesteps), handed.kind, 1)


def _hypotheses(handed: Handed) -> Iterator[tuple[float, list[Mistake]]]:
    """Yields (largest error, mistakes) for each hypothesis."""
    kinds = dict.fromkeys([handed.kind, "epsilon", "sample", "v_prediction", "flow_prediction"])
    readings = levels(handed.scheduler, handed.timesteps)
    for (when, level), kind, sign in itertools.product(readings, kinds, (1, -1)):
        of_kind = [] if kind == handed.kind else [_wrong_kind(handed, kind)]
        of_sign = [] if sign == 1 else [Mistake("sign reversed", f"pass -{handed.name}")]
        if kind == "velocity" and level.timesteps is None:  # its slopes are unknown
            continue
        if kind == "sample" and any(when):  # the output does not depend on the level
            when = [mistake for mistake in when if mistake is UNKNOWN]
        yield _errors(handed, level, kind, sign).max().item(), [*of_kind, *of_sign, *when]


def _errors(handed: Handed, level: Level, kind: str, sign: int) -> Tensor:
    y, o, x0, a, s = handed.sample / level.r, sign * handed.output, handed.original_samples, level.a, level.s
    if kind == "epsilon":
        difference = y - s * o - a * x0
    elif kind == "sample":
        difference = o - x0
    elif kind == "v_prediction":
        difference = a * y - s * o - x0
    elif kind == "flow_prediction":
        difference = y - s * o - (a + s) * x0
    elif kind == "velocity":
        difference = _implied_image(handed, sign, level.timesteps) - x0
    else:
        difference = _edm_image(handed.scheduler, level, y, o) - x0
    return difference.norm(dim=1) / torch.maximum(y.norm(dim=1), x0.norm(dim=1)).clamp(min=1e-30)


def _implied_image(handed: Handed, sign: int, timesteps: Tensor) -> Tensor:
    """Computes x0_hat as the schedule declares at these timesteps, from sign * output, (n, N)."""
    output = sign * handed.scheduler.sign * handed.output
    return predict_original_sample(handed.scheduler, output, timesteps, handed.sample)


def _edm_image(scheduler, level: Level, y: Tensor, o: Tensor) -> Tensor:
    """Computes x0_hat = c_skip x_t + c_out o of Karras et al. 2022, in the normalized coordinates."""
    sigma_data = scheduler.config.sigma_data
    variance = level.s**2 + sigma_data**2 * level.a**2
    out = level.s * sigma_data / variance.sqrt()
    out = -out if prediction_type(scheduler) == "v_prediction" else out
    return sigma_data**2 * level.a / variance * y + out * o


# Mistakes in one of the tensors


def _of_other_images(handed: Handed) -> str | None:
    """Detects `original_samples` that are in another order, or on another scale, than x_t."""
    try:
        level = declared_level(handed.scheduler, handed.timesteps)
    except ValueError:
        return None
    x0, keep = handed.original_samples, _show_images(handed, level)
    if not keep.any():
        return None
    x0_hat, x0 = _image(handed, level)[keep], x0[keep]
    size = x0_hat.norm(dim=1).clamp(min=1e-30)
    apart = torch.cdist(x0_hat, x0) / size[:, None]
    if (apart.diagonal() <= handed.limit).all():
        return None
    if (apart.amin(1) <= handed.limit).all():
        return "original_samples are in another order than x_t: pass them in the order of x_t"
    flat = x0.flatten()
    if len(flat) < _ENOUGH_VALUES:
        return None
    design = torch.stack([flat, torch.ones_like(flat)], dim=1)
    factor, offset = torch.linalg.lstsq(design, x0_hat.flatten()[:, None]).solution.flatten().tolist()
    if ((x0_hat - factor * x0 - offset).norm(dim=1) <= handed.limit * size).all() and abs(factor) > handed.limit:
        return (
            f"original_samples are on another scale than x_t: pass {factor:.4g} * original_samples"
            f" {'-' if offset < 0 else '+'} {abs(offset):.3g}, the images in x_t"
        )
    return None


def _show_images(handed: Handed, level: Level) -> Tensor:
    """Whether x_t contains enough of each image to recognize it, (n,) bool."""
    return (level.a / level.s).flatten() ** 2 >= (1e-4 if handed.limit < 0.01 else 0.1)


def _image(handed: Handed, level: Level) -> Tensor:
    """Computes x0_hat under the hypothesis that nothing is wrong, (n, N)."""
    y, o, a, s = handed.sample / level.r, handed.output, level.a, level.s
    return {
        "epsilon": lambda: (y - s * o) / a,
        "sample": lambda: o,
        "v_prediction": lambda: a * y - s * o,
        "flow_prediction": lambda: (y - s * o) / (a + s),
        "velocity": lambda: _implied_image(handed, 1, handed.timesteps),
        "edm": lambda: _edm_image(handed.scheduler, level, y, o),
    }[handed.kind]()


def _of_other_level(handed: Handed) -> str | None:
    """Detects x_t = p x_0 + q o with other factors than those of the timesteps."""
    design = torch.stack([handed.original_samples, handed.output], dim=2)
    if handed.kind in ("sample", "edm") or design.shape[1] < _ENOUGH_VALUES:
        return None
    factors = torch.linalg.lstsq(design, handed.sample[:, :, None]).solution
    left = (handed.sample - (design @ factors).squeeze(2)).norm(dim=1)
    if not (left <= handed.limit * handed.sample.norm(dim=1)).all():
        return None
    p, q = factors[0].flatten().tolist()
    return (
        f"x_t has another noise level than its timesteps: at timestep {handed.timesteps[0]:g} it is {p:.3g} x0"
        f" + {q:.3g} {handed.name}; pass the timesteps used to compute x_t"
    )


def _of_other_noise(handed: Handed) -> str | None:
    """Detects an output that belongs to other noise, if x_t and x_0 match the timesteps by the size of the noise."""
    try:
        level = declared_level(handed.scheduler, handed.timesteps)
    except ValueError:
        return None
    sizes = _sizes_of_noise(handed, level)
    width = max(0.05, 6 * (2 / handed.sample.shape[1]) ** 0.5)
    is_known = width <= 0.5 and _show_images(handed, level).any()
    if handed.kind == "sample" or not is_known or not ((sizes - 1).abs() <= width).all():
        return None
    return (
        f"{handed.name} does not match the noise in x_t, which matches original_samples and timesteps: use the same"
        " noise for both (with input perturbation, the perturbed noise)"
    )


def _sizes_of_noise(handed: Handed, level: Level) -> Tensor:
    """Computes the mean square of (y - a x_0) / s for each image, (n,): 1 if nothing is wrong."""
    noise = (handed.sample / level.r - level.a * handed.original_samples) / level.s
    return noise.square().mean(1)


# Text of the messages


def _wrong_kind(handed: Handed, kind: str) -> Mistake:
    both = handed.kind in _VELOCITIES and kind in _VELOCITIES
    name = f"this is {_name_of(kind, both)}, not {_name_of(handed.kind, both)}"
    if handed.name == "noise":
        return Mistake(name, "pass the noise used to compute x_t")
    if kind == "sample":
        return Mistake(
            name, "pass it as x0_hat=, or pass the network's output before the loop converts it to an image"
        )
    if handed.name == "x0_hat":
        return Mistake(name, "pass it as model_output instead of x0_hat=")
    return Mistake(name, f"give the loss a scheduler with prediction_type={kind!r}, or pass {handed.kind}")


def _name_of(kind: str, precisely: bool) -> str:
    if kind in _VELOCITIES:
        return f"the velocity {_VELOCITIES[kind]}" if precisely else "the velocity"
    return _NAMES[kind]


def _named(mistakes: list[Mistake]) -> str:
    names, fixes = [mistake.name for mistake in mistakes], [mistake.fix for mistake in mistakes]
    text = " and ".join(names).replace("sign reversed and time reversed", "sign and time reversed")
    return f"{text}: {'; '.join(fixes)}"


def _declared(scheduler) -> str:
    kind = prediction_type(scheduler)
    return "edm" if is_edm(scheduler) else {"trigflow": "v_prediction"}.get(kind, kind)


def _few(tensor: Tensor) -> Tensor:
    """Selects some images and values of them, (n, N), on the CPU in float64."""
    flat = tensor.detach()[:_MOST_IMAGES].flatten(1)
    return flat[:, :: max(1, flat.shape[1] // _MOST_VALUES)].cpu().double()
