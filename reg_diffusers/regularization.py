r"""Extra losses for an existing training loop: sum_k weight_k mean_i [ lambda_k(t_i) L'_k(x0_hat_i) ].

Data flow from the arguments to the loss; every step runs on images with lambda_k != 0, and once for all terms that
share it:

    model_output, timesteps, sample -> estimator -> x0_hat -> view -> L'_k (n,) -> mean of lambda_k L'_k -> loss
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor, nn

from .adaptive_weights import AdaptiveWeights
from .description import describe
from .estimators import Prediction, calls_model, one_step
from .frozen import FrozenNetworks
from .inputs import (
    checked_loss_weight,
    checked_scheduler,
    checked_snr_gamma,
    handed_over,
    refuse_unknown,
    used_by,
    weightings_of,
)
from .loss_output import Denoising, LossOutput, Records, alias
from .nonfinite import NonFiniteGuard
from .parameterization import Factors
from .precision import full_precision
from .prediction import NoiseLevel, noise_level, output_weight
from .shown import sharing, show
from .term import Term, checked_terms
from .term_values import TermValues
from .watching import Watched, watched
from .weight_schedules import factors_of
from .weight_table import Weighted, WeightTable
from .wiring.check import FirstBatch, verify

__all__ = ["X0Regularization"]


class X0Regularization(nn.Module):
    """Adds losses on x0_hat to the loss of an existing training loop.

        regularization = X0Regularization(noise_scheduler, [Term(total_variation, weight=0.1)])
        loss = F.mse_loss(model_output, noise) + regularization(model_output, timesteps, noisy_samples).loss

    L' runs in float32 outside autocast (float64 is kept), only on images with non-zero weighting. The mean is over the
    whole batch, unless a term has `normalize="active"`. An image with non-finite L' or gradient contributes nothing
    and is counted in `nonfinite.dropped`; after `max_nonfinite_steps` such steps in a row, training stops with an
    error.

    A regularizer, estimator or view that is an `nn.Module` is moved by `.to(device)`. The module itself, not a copy,
    is frozen and kept in evaluation mode; its weights are not part of `parameters` and `state_dict`. With timesteps
    on the CPU, only the first call and every 100th, which reads the counts of dropped images, wait for an accelerator.

    Args:
        scheduler: the noise scheduler used in training.
        terms: extra losses with distinct names.
        snr_gamma: gamma if the denoising loss uses min-SNR weighting (arXiv:2303.09556), so that `matched` follows it.
        max_nonfinite_steps: consecutive steps with non-finite L' after which `FloatingPointError` is raised. None
            disables it, for training with several processes, where an error in one leaves the others waiting.

    Raises:
        TypeError: `terms` is not a sequence of `Term`, or `scheduler` is not a scheduler object.
        ValueError: two terms have the same name, or a term is named "denoising"; `snr_gamma` is not a finite number
            above 0; or `max_nonfinite_steps` is not an integer of at least 1.
    """

    def __init__(
        self,
        scheduler,
        terms: Iterable[Term],
        *,
        snr_gamma: float | None = None,
        max_nonfinite_steps: int | None = 10,
    ):
        super().__init__()
        self.scheduler = checked_scheduler(scheduler)
        self.terms = checked_terms(terms)
        self.snr_gamma = checked_snr_gamma(snr_gamma)
        parts = [part for term in self.terms for part in (term.regularizer, term.estimator, term.view)]
        self.networks = FrozenNetworks(part for part in parts if isinstance(part, nn.Module))
        self.adaptive = AdaptiveWeights(self.terms)
        self.nonfinite = NonFiniteGuard(max_nonfinite_steps, views={term.name: term.view for term in self.terms})
        self._sharing = sharing(self.terms)
        self.used = used_by(self.terms)
        self.table = WeightTable(scheduler, self.terms, snr_gamma)
        self._separate = tuple(term.name for term in self.terms if calls_model(term.estimator))
        self._values = TermValues(self.nonfinite)
        self._warned = False
        self._first_batch = FirstBatch()

    @property
    def names(self) -> list[str]:
        """Names of the terms, in order."""
        return [term.name for term in self.terms]

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of all keyword arguments that the regularizers need, without duplicates."""
        return tuple(dict.fromkeys(name for term in self.terms for name in term.needs))

    def forward(
        self,
        model_output=None,
        timesteps=None,
        sample: Tensor | None = None,
        *,
        x0_hat: Tensor | None = None,
        model: Callable | None = None,
        model_kwargs: dict | None = None,
        noise: Tensor | None = None,
        loss_weight: Tensor | float | None = None,
        image_mask: Tensor | None = None,
        training_step: int | None = None,
        **context,
    ) -> LossOutput:
        """Computes the weighted sum of the extra losses for one batch.

        Args:
            model_output: (B, C, ...) output of the network for `sample`, in the scheduler's prediction_type: a tensor,
                a tuple that starts with it, or a diffusers output.
            timesteps: (B,), or a scalar for the whole batch.
            sample: (B, C, ...) the noisy images x_t, in the coordinates of `scheduler.step`.
            x0_hat: (B, C, ...) instead of `model_output`, if the loop has already converted the output to an image;
                `sample` is then needed only by estimators other than `one_step`.
            model: the network, for estimators that call it again.
            model_kwargs: further arguments of the network, one entry per image or `Shared`.
            noise: (B, C, ...) eps, for estimators and regularizers that need it.
            loss_weight: (B,) or a number: factor of each image's squared error in the loop's own loss, ||o -
                target||^2 with `model_output` and ||x_0 - x0_hat||^2 with `x0_hat`, so that `matched` follows it.
                Default: 1 for the output of the scheduler's prediction_type.
            image_mask: (B,) bool, True for images that take part; the mean is over these.
            training_step: number of optimizer steps so far, for terms with a schedule.
            **context: arguments listed in the regularizers' `needs`, one entry per image or `Shared`. `timesteps` and
                `noise` are passed on automatically. If `noise` and `original_samples` are given, the first call checks
                sample = alpha original_samples + sigma noise, which waits for an accelerator once. `original_images`,
                (B, C', H', W'), replace what views show of `original_samples`, such as decoded latents.

        Returns:
            The loss, sum of weight * term, and the terms. Without active images the loss is 0 and still supports
            `backward`.

        Raises:
            TypeError: a keyword is neither a parameter nor in the `needs` of a term, or `model_output` contains no
                tensor.
            ValueError: both or neither of `model_output` and `x0_hat` are given, batch sizes differ, `loss_weight` is
                combined with `snr_gamma`, a timestep is out of the scheduler's range, `sample` does not match
                `original_samples` and `noise`, or a term has a schedule and `training_step` is missing.
            TermError: a regularizer does not return an attached (n,) tensor or needs an argument that is missing, or a
                weighting does not return a finite (B,) tensor.
            FloatingPointError: L' was non-finite for `max_nonfinite_steps` steps in a row.
        """
        refuse_unknown(context, self.used)
        needs_sample = any(term.estimator is not one_step for term in self.terms)
        given, timesteps = handed_over(model_output, timesteps, sample, x0_hat, needs_sample=needs_sample)
        self._first_batch.check(self.scheduler, timesteps, sample, context.get("original_samples"), noise, image_mask)
        if loss_weight is None:
            level, _, known, _ = self._weighted(timesteps, is_image=x0_hat is not None)
        else:
            level, known = self.noise_level(timesteps, loss_weight, is_image=x0_hat is not None), {}
        prediction = Prediction(
            self.scheduler,
            alias(given),
            timesteps,
            sample,
            model,
            model_kwargs,
            noise,
            context.get("original_samples"),
        )
        how = {"image_mask": image_mask, "is_image": x0_hat is not None, "training_step": training_step}
        output = self.at_level(level, prediction, context, known, **how)
        if given.requires_grad and not output.loss.requires_grad:  # no active image
            output = replace(output, loss=output.loss + given[:0].float().sum())
        return output

    def verify(
        self,
        model_output=None,
        timesteps=None,
        sample: Tensor | None = None,
        original_samples: Tensor | None = None,
        *,
        x0_hat: Tensor | None = None,
    ) -> float:
        """Checks that a training loop passes the right arguments; see `wiring.check` for the error and its limits.

            regularization.verify(target, timesteps, noisy_samples, original_samples)

        Args:
            model_output: (B, C, ...) the loop's own target, such as `noise`: the output of a perfect network.
            timesteps, sample, x0_hat: as in `forward`.
            original_samples: (B, C, ...) the images x_0.

        Returns:
            The largest error of the batch.

        Raises:
            ValueError: the error exceeds its limit; one line that names the likely mistake and its fix.
        """
        return verify(self.scheduler, model_output, timesteps, sample, original_samples, x0_hat=x0_hat)

    def watch(self, model: nn.Module, *, call: int = 0) -> AbstractContextManager[Watched]:
        """Observes x_t, timesteps and output of a network that an object of the loop calls, by a forward hook.

            with regularization.watch(unet) as seen:
                loss = gaussian_diffusion(images)  # makes x_t inside
                loss = loss + regularization(*seen).loss

        The forward that checkpointing repeats in the backward is ignored. Nothing is kept after the block.

        Args:
            model: the network; wrapped or compiled if the loop calls it so.
            call: 0 allows a single call in the block; -1 takes the last of several, as with self-conditioning.

        Raises:
            TypeError: `model` is not a module.
            ValueError: in the block, at a second call, unless `call` is -1, or if x_t and timesteps are not among its
                arguments; afterwards, if what was seen is used.
        """
        return watched(model, call)

    def at_level(
        self,
        level: NoiseLevel,
        prediction: Prediction,
        context: dict,
        known: Mapping[str, Tensor],
        *,
        denoising: Denoising | None = None,
        at: Factors | None = None,
        image_mask: Tensor | None = None,
        is_image: bool = False,
        training_step: int | None = None,
    ) -> LossOutput:
        """Computes the same as `forward` for a known noise level.

        Args:
            level: noise level of the timesteps, (B,).
            prediction: for the whole batch; with `is_image`, its model_output is x0_hat.
            context: at least the arguments in the regularizers' `needs`.
            known: by term, its weighting of each image, of those that need not be computed.
            denoising: the denoising loss, to be the first part of the output; None if the loop has it.
            at: the same noise level in the shape of the images; None: computed from the timesteps.
            image_mask, training_step: as in `forward`.
            is_image: whether the loop passed x0_hat instead of the model output.
        """
        factors = factors_of(self.terms, training_step)
        context = {**context, "timesteps": prediction.timesteps}
        if prediction.noise is not None:
            context["noise"] = prediction.noise
        dtype = full_precision(prediction.model_output.dtype)
        lambdas = weightings_of(self.terms, level, image_mask, factors, known)
        shown = show(self._sharing, lambdas, prediction, context, at=at, is_image=is_image, tried=self._values.tried)
        terms, per_image, counts = {}, {}, {}
        if denoising is not None:
            terms["denoising"], per_image["denoising"], counts["denoising"] = denoising
        for term in self.terms:
            name, weights = term.name, lambdas[term.name]
            counts[name] = term.images_in_mean(weights, image_mask)
            total, per_image[name] = self._values.sum(term, weights, shown[name], context, prediction.timesteps)
            terms[name] = (total / counts[name]).to(dtype)
        self.nonfinite.check()
        parts = {
            "terms": terms,
            "per_image": Records(per_image),
            "weightings": lambdas,
            "snr": level.snr,
            "model_output": prediction.model_output,
            "counts": counts,
            "separate": self._separate,
            "factors": factors,
        }
        adaptive = self.adaptive  # looked up once: a module finds its parts slowly
        if adaptive.has_rules:
            adaptive.update(LossOutput(None, **parts), prediction, level, context, is_image)
        weights, loss = adaptive.current(), None
        for name, factor in factors.items():
            weights[name] = weights[name] * factor
        for term in self.terms:
            weighted = weights[term.name] * terms[term.name]
            loss = weighted if loss is None else loss + weighted
        if denoising is not None:
            loss = denoising.loss if loss is None else denoising.loss + loss
        elif loss is None:
            loss = torch.zeros((), dtype=dtype, device=prediction.model_output.device)
        return LossOutput(loss, weights=weights, **parts)

    def noise_level(self, timesteps, loss_weight: Tensor | float | None = None, is_image: bool = False) -> NoiseLevel:
        """Computes the noise level of each timestep, (B,), with the weight of this training's denoising loss.

        Args:
            timesteps: (B,).
            loss_weight: as in `forward`.
            is_image: whether `loss_weight` refers to ||x_0 - x0_hat||^2 instead of the network's own output.

        Raises:
            ValueError: `loss_weight` has a wrong shape, is negative or non-finite, or is combined with `snr_gamma`.
        """
        level = noise_level(self.scheduler, timesteps)
        if loss_weight is None:
            return self.table.in_training(level)
        if self.snr_gamma is not None:
            raise ValueError("loss_weight and snr_gamma both specify the weight of the denoising loss: pass only one")
        loss_weight = checked_loss_weight(loss_weight, level)
        of_output = torch.ones_like(level.snr) if is_image else output_weight(self.scheduler, timesteps)
        return level.weighted_by(loss_weight * of_output)

    def _weighted(self, timesteps: Tensor, is_image: bool) -> Weighted:
        """Returns noise levels and weights for a loop that gives no weight of its own loss."""
        if is_image and self.snr_gamma is None:
            self._warn_of_unknown_weight()
        return self.table.at(timesteps)

    def describe(self, timesteps, loss_weight: Tensor | float | None = None) -> str:
        """Describes the effect of each term for a draw of timesteps, one line per term.

        The line lists the share of active images, of steps without any, and the range of weight * lambda / w_d.

        Args:
            timesteps: (N,) as the loop draws them, for steps of one image; or (S, B), S steps of B images.
            loss_weight: of the same shape, or a number; as in `forward`.
        """
        return describe(self.terms, self.noise_level, timesteps, loss_weight)

    def _warn_of_unknown_weight(self) -> None:
        if not self._warned and self.terms:
            warnings.warn(
                "x0_hat was passed without loss_weight: weightings assume that the loop's loss is the unweighted"
                " squared error of the scheduler's prediction_type; pass loss_weight=1.0 if it is that of x0_hat",
                stacklevel=4,
            )
        self._warned = True
