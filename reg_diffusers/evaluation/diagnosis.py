r"""Whether an extra loss makes sense on a data set, measured before anything is trained.

Images that were held out are made noisy at some timesteps, and the best guess of each is computed from all other
images (see `ideal_denoiser`). What the loss would do to the best guess can then be measured without a network: L' of
the guess beside L' of the image, the gradient of both losses, and how far the guess is moved (see `response`). The
relative rise of the denoising loss follows, because for the best guess D and any shift d of it

    E |x_0 - D - d|^2 = E |x_0 - D|^2 + E |d|^2,

the error of a conditional mean being uncorrelated with whatever depends on x_t alone. With a trained model its own
guesses are measured beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from .. import weighting
from ..objective import X0Regularization, draw_timesteps
from ..prediction import NoiseLevel, noise_level, predict_original_sample, scale_model_input
from ..regularizers import score
from ..term import Term, TermError, checked_values, checked_weights, term_context
from .diagnosis_result import Cost, Diagnosis, Guesses, LevelDiagnosis, OnImages
from .ideal_denoiser import IdealDenoiser, LinearDenoiser, spread
from .response import Response, response

__all__ = ["diagnose"]

_FEWEST_IMAGES = 20
_HELD_OUT = 256
_VALUES = 2**22  # of the held-out images of one level together
_SET_VALUES = 2**25  # of the images that guesses are computed from: 256 MB in double precision
_LEFTOVER_NOISE = 0.1  # of the data's spread: an error such as a network that has not learned enough leaves
_AFFORDABLE = (0.01, 0.05)
_PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


def diagnose(
    scheduler,
    term: Term,
    original_samples: Tensor,
    *,
    model: Callable | None = None,
    snr_gamma: float | None = None,
    num_levels: int = 20,
    seed: int = 0,
    progress: Callable[[Iterable], Iterable] = iter,
    **context: Tensor,
) -> Diagnosis:
    """Measures what a term would do to the best possible network on a data set.

    Args:
        scheduler: the noise scheduler of the training.
        term: with the weight and weighting that are asked about.
        original_samples: (M, C, H, W) images in [-1, 1]. Of large sets a part is used, about 2^25 values in all.
        model: a trained network, `(noisy_samples, timesteps)` -> output, whose guesses are measured too.
        snr_gamma: gamma if the denoising loss is weighted by min-SNR.
        num_levels: number of timesteps, evenly spaced in log SNR.
        seed: of the choice of images and of the noise.
        progress: wraps the loop over timesteps, such as `tqdm`.
        **context: what the regularizer lists in `needs`, (M, ...); `original_samples` is always there.

    Raises:
        ValueError: fewer than 20 images.
        TermError: the regularizer breaks its contract: no gradient, another shape than (B,), not finite on the images,
            dependent on the other images of the batch.
    """
    if len(original_samples) < _FEWEST_IMAGES:
        raise ValueError(f"{len(original_samples)} images are too few, {_FEWEST_IMAGES} are the least")
    generator = torch.Generator().manual_seed(seed)
    known, held_out = _divided(original_samples, generator)
    context = {name: tensor[held_out] for name, tensor in context.items()}
    known, held_out = original_samples[known].float(), original_samples[held_out].float()
    evaluate = _Evaluation(term, {**context, "original_samples": held_out})
    evaluate.check(held_out)
    data_spread = spread(known)
    if data_spread == 0:
        raise ValueError("all images are the same: there is nothing to learn")
    data, values = _on_images(evaluate, held_out, known, data_spread, generator)

    level, training_shares, decided_shares = _noise_levels(scheduler, snr_gamma, num_levels)
    denoisers = {"ideal": IdealDenoiser(known), "linear": LinearDenoiser(known, held_out)}
    noise = torch.randn(held_out.shape, generator=generator)
    lambdas, size = checked_weights(term, level).tolist(), held_out[0].numel()
    natural_weights = noise_level(scheduler, level.timesteps).denoising_weight.tolist()
    found, responses = [], []
    for index in progress(range(len(level.snr))):
        alpha, sigma, weight = (x[index].item() for x in (level.alpha, level.sigma, level.denoising_weight))
        noisy_samples = alpha * held_out + sigma * noise
        guesses = {name: denoiser(noisy_samples, alpha, sigma) for name, denoiser in denoisers.items()}
        source = min(guesses, key=lambda name: (guesses[name] - held_out).square().mean())
        gradients = term.weight * lambdas[index], weight, natural_weights[index]
        best = _guesses(source, guesses[source], held_out, values, evaluate, *gradients)
        of_model = None
        if model is not None:
            x0_hat = _model_guesses(scheduler, model, noisy_samples, level.timesteps[index])
            of_model = _guesses("model", x0_hat, held_out, values, evaluate, *gradients)
        path = response(evaluate, guesses[source], data_spread)
        found.append((best, of_model))
        responses.append(path)

    prospects = _Prospects(level, training_shares, decided_shares, [best.error for best, _ in found], responses, size)
    asked = prospects.displacements(term.weight, lambdas) / data_spread
    constant = prospects.displacements(term.weight, [1.0] * len(lambdas)) / data_spread
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
    name = getattr(term.weighting, "__name__", type(term.weighting).__name__)
    weightings = {known_name: getattr(weighting, known_name) for known_name in weighting.__all__}
    if weightings.get(name) is not term.weighting:
        name = f"{term.weighting.__module__}:{name}"  # as the command line names it
        weightings[name] = term.weighting
    return Diagnosis(
        name=term.name,
        images=len(known),
        held_out=len(held_out),
        shape=tuple(held_out.shape[1:]),
        spread=data_spread,
        data=data,
        levels=tuple(levels),
        asked=prospects.cost(name, term.weight, lambdas),
        affordable={share: prospects.affordable(weightings, share) for share in _AFFORDABLE},
        unbounded=any(path.unbounded for path in responses),
    )


class _Evaluation:
    """L' of images and its gradient, without a graph.

    Args:
        term: whose regularizer is asked.
        context: tensors of the held-out images, in their order.
    """

    def __init__(self, term: Term, context: dict[str, Tensor]):
        self._term, self._context = term, term_context(term, context)

    def __call__(self, x0_hat: Tensor) -> tuple[Tensor, Tensor]:
        """L' (B,) of the first B held-out images' guesses, and its gradient (B, C, H, W).

        Where one of them is no number, L' is nan and the gradient 0: as in a training, that image is left alone.
        """
        values, gradient = self._raw(x0_hat)
        finite = values.isfinite() & gradient.flatten(1).isfinite().all(1)
        shape = (len(values),) + (1,) * (gradient.ndim - 1)
        return torch.where(finite, values, torch.nan), torch.where(finite.view(shape), gradient, 0.0)

    def _raw(self, x0_hat: Tensor) -> tuple[Tensor, Tensor]:
        x0_hat = x0_hat.detach().requires_grad_()
        values = checked_values(self._term, x0_hat, self._part(slice(len(x0_hat))))
        return values.detach(), torch.autograd.grad(values.sum(), x0_hat)[0]

    def check(self, images: Tensor) -> None:
        """Raises `TermError` unless L' and its gradient are finite, and L' of an image is its own business."""
        name, (values, gradient) = self._term.name, self._raw(images)
        for what, finite in {"it": values.isfinite(), "its gradient": gradient.flatten(1).isfinite().all(1)}.items():
            if not finite.all():
                raise TermError(
                    f"regularizer {name!r}: {what} is not finite for {int((~finite).sum())} of {len(images)} real"
                    " images: look for a root, a logarithm or a quotient at 0, or a wish about another range than"
                    " [-1, 1]"
                )
        ones = (slice(0, 1), slice(1, 2))
        alone = torch.cat([score(self._term.regularizer, images[one], **self._part(one)) for one in ones])
        if not torch.allclose(alone, values[:2], rtol=1e-3, atol=1e-6):
            raise TermError(
                f"regularizer {name!r}: the value of an image depends on the other images of the batch: average over"
                " all dimensions but the first"
            )

    def single(self, image: Tensor) -> float:
        """L' of one image that is none of the data, with the context of the first held-out one."""
        return score(self._term.regularizer, image[None], **self._part(slice(1))).item()

    def _part(self, part: slice) -> dict[str, Tensor]:
        return {name: tensor[part] for name, tensor in self._context.items()}


def _divided(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices of the images that guesses are computed from, and of those that are guessed."""
    size = images[0].numel()
    number = max(min(_HELD_OUT, _VALUES // size, len(images) // 5), _FEWEST_IMAGES // 5)
    order = torch.randperm(len(images), generator=generator)
    return order[number : number + max(_SET_VALUES // size, number)], order[:number]


def _on_images(
    evaluate: _Evaluation, images: Tensor, known: Tensor, data_spread: float, generator: torch.Generator
) -> tuple[OnImages, Tensor]:
    values, _ = evaluate(images)
    noise = _LEFTOVER_NOISE * data_spread * torch.randn(images.shape, generator=generator)
    _, gradient = evaluate(images + noise)
    agreement, error = _mean(_cosines(gradient, noise))
    levels = np.percentile(values.double().numpy(), _PERCENTILES).tolist()
    on_images = OnImages(
        mean=values.double().mean().item(),
        standard_deviation=values.double().std().item(),
        percentiles=dict(zip(_PERCENTILES, levels, strict=True)),
        blurred=evaluate.single(known.mean(0)),
        agreement=agreement,
        agreement_error=error,
    )
    return on_images, values


def _noise_levels(scheduler, snr_gamma: float | None, number: int) -> tuple[NoiseLevel, list[float], list[float]]:
    """Timesteps evenly spaced in log SNR, with the shares of the training and of a sample that each stands for."""
    with torch.random.fork_rng(devices=[]):
        schedule = draw_timesteps(scheduler, 64 * scheduler.config.num_train_timesteps).unique()
    of_training = X0Regularization(scheduler, [], snr_gamma=snr_gamma)
    level = of_training.noise_level(schedule)
    usable = (level.snr > 0) & level.snr.isfinite() & level.denoising_weight.isfinite()
    schedule, snr = schedule[usable], level.snr[usable].double()
    wanted = torch.linspace(snr[0].log(), snr[-1].log(), number, dtype=torch.float64)
    chosen = (snr.log()[None] - wanted[:, None]).abs().argmin(1).unique()
    nearest = (torch.arange(len(schedule))[:, None] - chosen).abs().argmin(1)
    steps = snr.sqrt() - torch.cat([snr.sqrt()[1:], snr.new_zeros(1)])
    training = torch.bincount(nearest, minlength=len(chosen)).double() / len(schedule)
    decided = torch.zeros(len(chosen), dtype=torch.float64).index_add(0, nearest, steps) / snr[0].sqrt()
    return of_training.noise_level(schedule[chosen]), training.tolist(), decided.tolist()


def _guesses(
    source: str,
    x0_hat: Tensor,
    original_samples: Tensor,
    on_images: Tensor,
    evaluate: _Evaluation,
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
    # By the model output: the derivative of x0_hat by it is 1 / sqrt(w_d), of the plain denoising loss.
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
        nonfinite=int(bad.sum()),
    )


@torch.no_grad()
def _model_guesses(scheduler, model: Callable, noisy_samples: Tensor, timestep: Tensor) -> Tensor:
    guesses = []
    for samples in noisy_samples.split(64):
        timesteps = timestep.expand(len(samples))
        output = model(scale_model_input(scheduler, samples, timesteps), timesteps)
        output = output if isinstance(output, Tensor) else output[0]
        guesses.append(predict_original_sample(scheduler, output, timesteps, samples))
    return torch.cat(guesses)


class _Prospects:
    """From what was measured at each level to what any weight and weighting will do."""

    def __init__(
        self,
        level: NoiseLevel,
        training_shares: list[float],
        decided_shares: list[float],
        errors: list[float],
        responses: list[Response],
        size: int,
    ):
        self._level, self._responses, self._size = level, responses, size
        self._counts = np.array(training_shares) * level.denoising_weight.double().numpy()
        self._decided = np.array(decided_shares)
        self._errors = np.array(errors)
        self._loss = (self._counts * self._errors).sum()

    def displacements(self, weight: float, lambdas: list[float]) -> np.ndarray:
        """Root mean square of x0_hat* - D at each level."""
        taus = self._taus(weight, lambdas)
        return np.sqrt([path.displacement_at(tau) for path, tau in zip(self._responses, taus, strict=True)])

    def cost(self, name: str, weight: float, lambdas: list[float]) -> Cost:
        before = (self._decided * np.array([path.start for path in self._responses])).sum()
        taus = self._taus(weight, lambdas)
        after = [path.value_at(tau) for path, tau in zip(self._responses, taus, strict=True)]
        fall = float((before - (self._decided * after).sum()) / abs(before)) if before else 0.0
        largest = float((self.displacements(weight, lambdas) ** 2 / self._errors).max())
        acting = [time for time, value in zip(self._level.timesteps.tolist(), lambdas, strict=True) if value]
        return Cost(name, weight, self._rise(weight, lambdas), largest, fall, max(acting, default=None))

    def affordable(self, weightings: dict[str, Callable], rise: float) -> tuple[Cost, ...]:
        """For each weighting the weight that makes the denoising loss rise so much."""
        costs = []
        for name, function in weightings.items():
            lambdas = function(self._level).double().tolist()
            if not all(map(math.isfinite, lambdas)):
                continue
            low, high = -20.0, 20.0  # decades of the weight
            if not self._rise(10**high, lambdas) > rise > self._rise(10**low, lambdas):
                continue
            for _ in range(40):
                middle = (low + high) / 2
                low, high = (low, middle) if self._rise(10**middle, lambdas) > rise else (middle, high)
            costs.append(self.cost(name, 10**low, lambdas))
        return tuple(sorted(costs, key=lambda cost: (cost.largest_rise > 1, -cost.fall)))

    def _rise(self, weight: float, lambdas: list[float]) -> float:
        return float((self._counts * self.displacements(weight, lambdas) ** 2).sum() / self._loss)

    def _taus(self, weight: float, lambdas: list[float]) -> np.ndarray:
        return weight * np.array(lambdas) * self._size / (2 * self._level.denoising_weight.double().numpy())


def _cosines(one: Tensor, other: Tensor) -> Tensor:
    """Of each image (B,); 0 where one of the two is 0."""
    return torch.nn.functional.cosine_similarity(one.flatten(1).double(), other.flatten(1).double(), eps=1e-30)


def _norm(tensor: Tensor) -> float:
    """Root mean square over images of the norm of each."""
    return tensor.flatten(1).double().square().sum(1).mean().sqrt().item()


def _mean(values: Tensor) -> tuple[float, float]:
    """Mean of what is a number, and its standard error."""
    values = values[values.isfinite()].double()
    if len(values) < 2:
        return (values.item() if len(values) else math.nan), math.nan
    return values.mean().item(), values.std().item() / math.sqrt(len(values))
