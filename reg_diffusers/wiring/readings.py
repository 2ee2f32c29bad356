"""Interpretations of timesteps and x_t: each noise level that timesteps may mean, and each scale that x_t may have."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..prediction import noise_level
from ..schedule import is_affine, is_edm, is_variance_exploding, prediction_type, unit_of_time

__all__ = ["UNKNOWN", "Level", "Mistake", "declared_level", "levels"]


@dataclass(frozen=True)
class Mistake:
    """A possible mistake and its fix."""

    name: str
    fix: str


@dataclass(frozen=True)
class Level:
    """A noise level (a, s) with a^2 + s^2 = 1, (n, 1) each, and the scale r in x_t = r y.

    `timesteps`, (n,), are those that it belongs to; None if no timestep is known.
    """

    a: Tensor
    s: Tensor
    r: Tensor
    timesteps: Tensor | None = None


UNKNOWN = Mistake("timesteps are not of this scheduler", "pass timesteps in the scheduler's unit")


def declared_level(scheduler, timesteps: Tensor) -> Level:
    """Returns the noise level of timesteps, (n,), if all is as the scheduler declares."""
    level = noise_level(scheduler, timesteps)
    alpha, sigma = level.alpha.double()[:, None], level.sigma.double()[:, None]
    return replace(next(_scales(scheduler, alpha, sigma))[1], timesteps=timesteps)


def levels(scheduler, timesteps: Tensor) -> Iterator[tuple[list[Mistake], Level]]:
    """Yields each noise level that the timesteps may mean, with each scale that x_t may have, the correct first."""
    for of_time, alpha, sigma, meant in _times(scheduler, timesteps):
        for of_scale, level in _scales(scheduler, alpha[:, None], sigma[:, None]):
            yield [*of_time, *of_scale], replace(level, timesteps=meant)


def _times(scheduler, t: Tensor) -> Iterator[tuple[list[Mistake], Tensor, Tensor, Tensor | None]]:
    """Yields mistakes, alpha, sigma and the timesteps that were meant, which are None if unknown."""
    count, unit = scheduler.config.get("num_train_timesteps", 1), unit_of_time(scheduler)
    real = t.double()
    counts_steps = unit in ("flow", "index", "interpolated")
    readings = [([], t)]
    if counts_steps:
        last = count if unit == "flow" else count - 1
        divided = Mistake(f"timesteps look divided by {count}", f"pass timesteps * {count}")
        readings += [([divided], count * real)]
        readings += [([_reversed(f"{whole} - timesteps")], whole - real) for whole in (last, last - 1, last + 1)]
        both = Mistake(f"time reversed and divided by {count}", f"pass {count} * (1 - timesteps)")
        readings += [([both], count * (1 - real))]
        readings += [
            ([Mistake(f"timesteps are too {word} by 1", f"pass timesteps {fix}")], real + change)
            for change, word, fix in ((1, "small", "+ 1"), (-1, "large", "- 1"))
        ]
    if unit == "angle":
        readings += [([_reversed("pi / 2 - timesteps")], math.pi / 2 - real)]
    if unit == "own":
        readings += [([_reversed("1 - timesteps")], 1 - real)]
        readings += [([Mistake("timesteps look multiplied by 1000", "pass timesteps / 1000")], real / 1000)]
        readings += [([Mistake("timesteps look divided by 1000", "pass timesteps * 1000")], real * 1000)]
        if _keeps_images(scheduler):  # then sigma is the time, or a function of it
            readings += [([Mistake("timesteps are log(sigma) / 4", "pass (4 * timesteps).exp()")], (4 * real).exp())]
            readings += [([Mistake("timesteps are log(sigma)", "pass timesteps.exp()")], real.exp())]
    if unit == "c_noise":
        readings += [([Mistake("timesteps are sigmas", "pass timesteps.log() / 4")], real.log() / 4)]
        readings += [([Mistake("timesteps are log(sigma)", "pass timesteps / 4")], real / 4)]
    readings += _places(scheduler, real)
    readings += _shifted(scheduler, real, count)
    for mistakes, timesteps in readings:
        if unit == "index" and mistakes:
            timesteps = timesteps.round()
        try:
            level = noise_level(scheduler, timesteps.float() if mistakes else t)  # as precise as a loop's
        except (ValueError, IndexError):
            if not mistakes:  # for outputs that do not depend on the time
                yield [UNKNOWN], torch.full_like(real, 0.5**0.5), torch.full_like(real, 0.5**0.5), None
            continue
        yield mistakes, level.alpha.double(), level.sigma.double(), timesteps
    if unit in ("index", "interpolated") and (real >= 0).all():
        ratio = Mistake("timesteps are sigmas", "pass the timesteps of these sigmas")
        yield [ratio], torch.ones_like(real), real, None
        if (real <= 1).all():
            yield [ratio], (1 - real**2).sqrt(), real, None


def _reversed(fix: str) -> Mistake:
    return Mistake("time reversed", f"pass {fix}")


def _places(scheduler, real: Tensor) -> list:
    """Interprets timesteps as positions in `scheduler.timesteps`."""
    listed = getattr(scheduler, "timesteps", None)
    if listed is None or (real % 1 != 0).any() or (real < 0).any() or (real >= len(listed)).any():
        return []
    mistake = Mistake("timesteps are places in scheduler.timesteps", "pass scheduler.timesteps[timesteps]")
    return [([mistake], listed.cpu()[real.long()])]


def _shifted(scheduler, real: Tensor, count: int) -> list:
    """Interprets timesteps as taken before, or after, the shift of flow matching."""
    shift = scheduler.config.get("shift") or scheduler.config.get("flow_shift") or 1.0
    if shift == 1.0 or prediction_type(scheduler) != "flow_prediction":
        return []

    def shifted(by: float) -> Tensor:
        sigma = real / count
        return count * by * sigma / (1 + (by - 1) * sigma)

    mistake = Mistake(f"timesteps lack the shift of {shift:g} that x_t has", "pass the timesteps of the sigmas in x_t")
    twice = Mistake(f"timesteps have a shift of {shift:g} that x_t lacks", "pass the timesteps of the sigmas in x_t")
    return [([mistake], shifted(shift)), ([twice], shifted(1 / shift))]


def _scales(scheduler, alpha: Tensor, sigma: Tensor) -> Iterator[tuple[list[Mistake], Level]]:
    radius = (alpha**2 + sigma**2).sqrt()
    a, s = alpha / radius, sigma / radius
    if prediction_type(scheduler) == "flow_prediction":
        yield [], Level(a, s, 1 / (a + s))
        return
    scaled, fix = "x_t was already scaled for the network", "pass sample before scale_model_input"
    if is_affine(scheduler):
        yield [], Level(a, s, radius)
        if _keeps_images(scheduler):
            for data in (0.5, 1.0):  # of EDM; of schedulers that explode
                own = f"pass x_t before c_in, which divides it by (sigma^2 + {data**2:g}).sqrt()"
                yield [Mistake(scaled, own)], Level(a, s, 1 / (s**2 + data**2 * a**2).sqrt())
        return
    exploding = is_edm(scheduler) or is_variance_exploding(scheduler)
    yield [], Level(a, s, 1 / a if exploding else torch.ones_like(a))
    if exploding:
        data = scheduler.config.sigma_data if is_edm(scheduler) else 1.0
        shown = 1 / (s**2 + data**2 * a**2).sqrt()
        yield [Mistake(scaled, fix)], Level(a, s, shown)
    else:
        fix = "pass x_t / (1 + sigma^2).sqrt(), or give the loss the loop's own scheduler"
        yield [Mistake("x_t is x0 + sigma eps, not alpha x0 + sigma eps", fix)], Level(a, s, 1 / a)


def _keeps_images(scheduler) -> bool:
    """Whether an `AffineSchedule` has x_t = x_0 + sigma eps, as EDM has."""
    alpha, _ = scheduler.alpha_sigma(torch.tensor([0.25, 0.75], device="cpu"))
    return bool((alpha == 1).all())
