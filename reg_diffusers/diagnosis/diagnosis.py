r"""Measures whether an auxiliary loss makes sense on a data set, before any training.

Noise is added to held-out images at several timesteps, and the best guess of each image is computed from all other
images (see `ideal_denoiser`). This shows the effect of the loss on the best guess without a network: L' of the guess
compared to L' of the image, the gradients of both losses, and how far the loss moves the guess (see `response`). The
relative rise of the denoising loss follows, because for the best guess D and any shift d that depends on x_t alone

    E |x_0 - D - d|^2 = E |x_0 - D|^2 + E |d|^2:

the error of a conditional mean is uncorrelated with any function of x_t. The guesses of a trained model are measured
in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from .. import weighting
from ..context import cut
from ..estimators import calls_model
from ..objective import X0Regularization, draw_timesteps
from ..prediction import NoiseLevel, output_weight, predict_original_sample, scale_model_input
from ..term import Term, checked_weights, refuse_rules
from .effect import effect
from .ideal_denoiser import IdealDenoiser, LinearDenoiser, spread
from .loss_on_images import LossOnImages
from .prospects import Prospects
from .response import response
from .result import Diagnosis, Guesses, LevelDiagnosis, OnImages

__all__ = ["diagnose"]

_FEWEST_IMAGES = 20
_HELD_OUT = 256
_VALUES = 2**22  # most values in the held-out images of one level
_SET_VALUES = 2**25  # most values in the images that guesses are computed from: 256 MB in double precision
_LEFTOVER_NOISE = 0.1  # in standard deviations of the data: like the error of an undertrained network
_AFFORDABLE = (0.01, 0.05)
_PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
_PLAIN_WEIGHTINGS = [  # weightings without arguments
    name for name in weighting.__all__ if not isinstance(getattr(weighting, name), type)
]


def diagnose(
    scheduler,
    term: Term,
    original_samples: Tensor,
    *,
    model: Callable | None = None,
    model_kwargs: dict[str, Tensor] | None = None,
    snr_gamma: float | None = None,
    num_levels: int = 20,
    timesteps: Tensor | None = None,
    seed: int = 0,
    progress: Callable[[Iterable], Iterable] = iter,
    **context: Tensor,
) -> Diagnosis:
    """Measures the effect of a term on the best possible network for a data set.

    Args:
        scheduler: the noise scheduler of the training.
        term: the term, with the weight and weighting to examine.
        original_samples: (M, C, H, W) images in [-1, 1]; the term sees them through its view. Of a large set, about
            2^25 values are used.
        model: a trained network, `(noisy_samples, timesteps, **model_kwargs)` -> output, to measure its guesses, too.
        model_kwargs: further arguments of the model for each image, (M, ...), such as `class_labels`.
        snr_gamma: gamma of the min-SNR weight of the denoising loss; None without it.
        num_levels: number of timesteps, evenly spaced in log SNR.
        timesteps: (N,) as the training draws them, for example 10,000 draws of a loop of your own. Default: uniform
            over the scheduler's training schedule.
        seed: the seed of the choice of images and of the noise.
        progress: wraps the loop over timesteps, such as `tqdm`.
        **context: what the regularizer lists in `needs`, one entry per image; `original_samples` is provided.

    Raises:
        TypeError: if `term` is not a `Term`, or `original_samples` is not a floating-point tensor.
        ValueError: if there are fewer than 20 images, if one has non-finite values, if `num_levels` is below 1, or if
            the estimator calls the network again.
        TermError: if the regularizer breaks its contract: it has no gradient, returns another shape than (B,), is
            non-finite on the images, or depends on the other images of the batch.
    """
    if not isinstance(term, Term):
        raise TypeError(f"diagnose takes one Term, such as Term(total_variation, 0.1), not {term!r}")
    if not isinstance(original_samples, Tensor) or not original_samples.is_floating_point():
        got = original_samples.dtype if isinstance(original_samples, Tensor) else type(original_samples).__name__
        raise TypeError(f"original_samples must be a floating-point tensor, images (M, C, ...) in [-1, 1], not {got}")
    if num_levels < 1:
        raise ValueError(f"num_levels must be at least 1, not {num_levels}")
    refuse_rules([term], "diagnose")
    if calls_model(term.estimator):
        raise ValueError(
            f"term {term.name!r}: diagnose has no network for {term.estimator!r}, which calls it again: omit"
            " estimator= (--reg_estimator) to diagnose the term with one_step"
        )
    if len(original_samples) < _FEWEST_IMAGES:
        raise ValueError(f"{len(original_samples)} images are too few: diagnose needs at least {_FEWEST_IMAGES}")
    if not original_samples.isfinite().all():
        raise ValueError("original_samples has non-finite values: remove these images")
    generator = torch.Generator().manual_seed(seed)
    known, held_out = _divided(original_samples, generator)
    context, given = (
        {name: cut(value, held_out, len(original_samples), name) for name, value in values.items()}
        for values in (context, model_kwargs or {})
    )
    known, held_out = original_samples[known].float(), original_samples[held_out].float()
    evaluate = LossOnImages(term, {**context, "original_samples": held_out})
    evaluate.check(held_out)
    data_spread = spread(known)
    if data_spread == 0:
        raise ValueError("all images are the same: there is nothing to learn")
    data, values, clean_gradient = _on_images(evaluate, held_out, known, data_spread, generator)

    schedule, *shares, chosen, nearest = _noise_levels(scheduler, snr_gamma, num_levels, timesteps)
    level = _at(schedule, chosen)
    training_shares, decided_shares = (
        torch.zeros(len(chosen), dtype=torch.float64).index_add(0, nearest, share).tolist() for share in shares
    )
    denoisers = {"ideal": IdealDenoiser(known), "linear": LinearDenoiser(known, held_out)}
    noise = torch.randn(held_out.shape, generator=generator)
    of_schedule, size = checked_weights(term, schedule).tolist(), held_out[0].numel()
    lambdas = [of_schedule[index] for index in chosen.tolist()]
    natural_weights = output_weight(scheduler, level.timesteps).tolist()
    found, responses = [], []
    for index in progress(range(len(level.snr))):
        alpha, sigma, weight = (x[index].item() for x in (level.alpha, level.sigma, level.denoising_weight))
        noisy_samples = alpha * held_out + sigma * noise
        evaluate.at(scheduler, level.timesteps[index], noisy_samples, noise)
        guesses = {name: denoiser(noisy_samples, alpha, sigma) for name, denoiser in denoisers.items()}
        source = min(guesses, key=lambda name: (guesses[name] - held_out).square().mean())
        gradients = term.weight * lambdas[index], weight, natural_weights[index]
        best = _guesses(source, guesses[source], held_out, values, clean_gradient, evaluate, *gradients)
        of_model = None
        if model is not None:
            x0_hat = _model_guesses(scheduler, model, noisy_samples, level.timesteps[index], given)
            of_model = _guesses("model", x0_hat, held_out, values, clean_gradient, evaluate, *gradients)
        path = response(evaluate, guesses[source], data_spread)
        found.append((best, of_model))
        responses.append(path)

    prospects = Prospects(schedule, *shares, chosen, [best.error for best, _ in found], responses, size)
    asked = prospects.displacements(term.weight, of_schedule) / data_spread
    constant = prospects.displacements(term.weight, [1.0] * len(of_schedule)) / data_spread
    levels = [
        LevelDiagnosis(
            timestep=level.timesteps[index].item(),
            snr=level.snr[index].item(),
            training_share=training_shares[index],
            decided_share=decided_shares[index],
            denoising_weight=weight,
            ratio=term.weight * lambdas[index] / weight,
            ratio_constant=term.weight / weight,
            displacement=asked[index],
            displacement_constant=constant[index],
            best=best,
            model=of_model,
        )
        for index, ((best, of_model), weight) in enumerate(zip(found, level.denoising_weight.tolist(), strict=True))
    ]
    has_arguments = isinstance(term.weighting, weighting.gated | weighting.signal_power)
    name = str(term.weighting) if has_arguments else getattr(term.weighting, "__name__", type(term.weighting).__name__)
    weightings = {known_name: getattr(weighting, known_name) for known_name in _PLAIN_WEIGHTINGS}
    if has_arguments:
        weightings[name] = term.weighting
    elif weightings.get(name) is not term.weighting:
        name = f"{term.weighting.__module__}:{name}"  # its name on the command line
        weightings[name] = term.weighting
    return Diagnosis(
        name=term.name,
        images=len(known),
        held_out=len(held_out),
        shape=tuple(held_out.shape[1:]),
        spread=data_spread,
        data=data,
        levels=tuple(levels),
        asked=prospects.cost(name, term.weight, of_schedule),
        affordable={share: prospects.affordable(weightings, share) for share in _AFFORDABLE},
        unbounded=any(path.unbounded for path in responses),
    )


def _divided(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns the indices of the images that guesses are computed from, and of the held-out images."""
    size = images[0].numel()
    number = max(min(_HELD_OUT, _VALUES // size, len(images) // 5), _FEWEST_IMAGES // 5)
    order = torch.randperm(len(images), generator=generator)
    return order[number : number + max(_SET_VALUES // size, number)], order[:number]


def _on_images(
    evaluate: LossOnImages, images: Tensor, known: Tensor, data_spread: float, generator: torch.Generator
) -> tuple[OnImages, Tensor, Tensor]:
    values, clean_gradient = evaluate(images)
    noise = _LEFTOVER_NOISE * data_spread * torch.randn(images.shape, generator=generator)
    noisy_values, gradient = evaluate(images + noise)
    halfway, _ = evaluate((images + noise + known.mean(0)) / 2)
    agreement, error = _mean(_cosines(gradient, noise))
    levels = np.percentile(values.double().numpy(), _PERCENTILES).tolist()
    on_images = OnImages(
        mean=values.double().mean().item(),
        standard_deviation=values.double().std().item(),
        percentiles=dict(zip(_PERCENTILES, levels, strict=True)),
        blurred=evaluate.single(known.mean(0)),
        agreement=agreement,
        agreement_error=error,
        effect=effect(gradient, clean_gradient, noise),
        noisy=_mean(noisy_values)[0],
        halfway=_mean(halfway)[0],
    )
    return on_images, values, clean_gradient


def _noise_levels(
    scheduler, snr_gamma: float | None, number: int, timesteps: Tensor | None
) -> tuple[NoiseLevel, Tensor, Tensor, Tensor, Tensor]:
    """Returns the usable timesteps of a training, SNR falling, with those of them at which to measure.

    These are: noise levels (T,), shares of the training and of a sample at each of them, indices (L,) of timesteps
    evenly spaced in log SNR, and for each timestep the place (T,) of the nearest one among these.
    """
    schedule, counts = _drawn(scheduler, timesteps)
    of_training = X0Regularization(scheduler, [], snr_gamma=snr_gamma)
    level = of_training.noise_level(schedule)
    usable = (level.snr > 0) & level.snr.isfinite() & level.denoising_weight.isfinite()
    if not usable.any():
        raise ValueError("no timestep has both image and noise: pass timesteps= as the training draws them")
    order = level.snr.argsort(descending=True, stable=True)  # the time of an AffineSchedule may run either way
    order = order[usable[order]]
    level, counts, snr = _at(level, order), counts[order].double(), level.snr[order].double()
    wanted = torch.linspace(snr[0].log(), snr[-1].log(), number, dtype=torch.float64)
    chosen = (snr.log()[None] - wanted[:, None]).abs().argmin(1).unique()
    nearest = (torch.arange(len(snr))[:, None] - chosen).abs().argmin(1)
    steps = snr.sqrt() - torch.cat([snr.sqrt()[1:], snr.new_zeros(1)])
    return level, counts / counts.sum(), steps / snr[0].sqrt(), chosen, nearest


def _at(level: NoiseLevel, index: Tensor) -> NoiseLevel:
    return NoiseLevel(**{field.name: getattr(level, field.name)[index] for field in fields(NoiseLevel)})


def _drawn(scheduler, timesteps: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the distinct timesteps of a training, and how often each is drawn."""
    if timesteps is not None:
        return torch.as_tensor(timesteps).detach().cpu().reshape(-1).unique(return_counts=True)
    draw_timesteps(scheduler, 0)  # raises without a training schedule
    with torch.random.fork_rng(devices=[]):
        schedule = draw_timesteps(scheduler, 64 * scheduler.config.num_train_timesteps).unique()
    return schedule, torch.ones_like(schedule)


def _guesses(
    source: str,
    x0_hat: Tensor,
    original_samples: Tensor,
    on_images: Tensor,
    clean_gradient: Tensor,
    evaluate: LossOnImages,
    auxiliary_weight: float,
    denoising_weight: float,
    natural_weight: float,
) -> Guesses:
    values, gradient = evaluate(x0_hat)
    error = x0_hat - original_samples
    size = error[0].numel()
    value, value_error = _mean(values)
    gap, gap_error = _mean(values - on_images)
    bad = values.isnan()
    cosine, cosine_error = _mean(torch.where(bad, torch.nan, _cosines(gradient, error)))
    # With respect to the model output: d x0_hat / d output = 1 / sqrt(w_d), with w_d of the unweighted denoising loss.
    slope = 1 / math.sqrt(natural_weight)
    return Guesses(
        source=source,
        error=error.double().square().mean().item(),
        value=value,
        value_error=value_error,
        gap=gap,
        gap_error=gap_error,
        denoising_gradient=2 * denoising_weight * slope * _norm(error) / size,
        auxiliary_gradient=auxiliary_weight * slope * _norm(gradient),
        cosine=cosine,
        cosine_error=cosine_error,
        effect=effect(gradient, clean_gradient, error),
        nonfinite=int(bad.sum()),
    )


@torch.no_grad()
def _model_guesses(scheduler, model: Callable, noisy_samples: Tensor, timestep: Tensor, given: dict) -> Tensor:
    guesses = []
    for part in torch.arange(len(noisy_samples)).split(64):
        samples, timesteps = noisy_samples[part], timestep.expand(len(part))
        model_kwargs = {name: values[part] for name, values in given.items()}
        output = model(scale_model_input(scheduler, samples, timesteps), timesteps, **model_kwargs)
        output = output if isinstance(output, Tensor) else output[0]
        guesses.append(predict_original_sample(scheduler, output, timesteps, samples))
    return torch.cat(guesses)


def _cosines(one: Tensor, other: Tensor) -> Tensor:
    """Cosine similarity of each image (B,); 0 if either tensor is 0."""
    return torch.nn.functional.cosine_similarity(one.flatten(1).double(), other.flatten(1).double(), eps=1e-30)


def _norm(tensor: Tensor) -> float:
    """Root mean square of the norms of all images."""
    return tensor.flatten(1).double().square().sum(1).mean().sqrt().item()


def _mean(values: Tensor) -> tuple[float, float]:
    """Mean of the finite values, and its standard error."""
    values = values[values.isfinite()].double()
    if len(values) < 2:
        return (values.item() if len(values) else math.nan), math.nan
    return values.mean().item(), values.std().item() / math.sqrt(len(values))
