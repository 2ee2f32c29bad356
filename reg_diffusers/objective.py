r"""The training objective: a denoising loss with extra losses on the image it implies.

    L = mean ||o - target||^2 + sum_k weight_k mean_i [ lambda_k(t_i) L'_k(x0_hat_i) ]

One timestep per image, one network call (Ho et al. 2020, Algorithm 1). Data flow, with the names used everywhere:

    original_samples, noise, timesteps -> noisy_samples -> model_output -> x0_hat -> L'_k (B,) -> terms -> loss

`X0Regularization` is the extra part alone, for a training loop that exists; `RegularizedLoss` is the whole objective.
The network is an argument of both and a member of neither.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .nonfinite import NonFiniteGuard
from .prediction import (
    NoiseLevel,
    add_noise,
    noise_level,
    prediction_target,
    prediction_type,
    refuse_zero_terminal_snr,
    scale_model_input,
    without_learned_variance,
)
from .term import Term, TermError, checked_values, checked_weights, term_context

__all__ = ["LossOutput", "RegularizedLoss", "Term", "TermError", "X0Regularization", "draw_timesteps"]


@dataclass(frozen=True)
class LossOutput:
    """A loss with its parts.

    Attributes:
        loss: scalar, to call `backward` on.
        terms: scalars by name, each still attached to the graph: "denoising", where there is one, as it enters the
            loss, and for every `Term` the mean of weighting * L' over the batch, before `weight`.
        per_image: by the same names, the value of each image, (B,), detached: of "denoising" as it enters the loss, of
            a `Term` L' itself, nan for an image that was left out or dropped.
        weightings: by the terms' names, the weighting of each image, (B,), on the device of the timesteps.
        snr: (B,) signal-to-noise ratio of each image, on the device of the timesteps.
        model_output: (B, C, ...) what the network returned; `balancing.balance` takes gradients by it.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    per_image: dict[str, Tensor] = field(default_factory=dict)
    weightings: dict[str, Tensor] = field(default_factory=dict)
    snr: Tensor | None = None
    model_output: Tensor | None = None


class X0Regularization(nn.Module):
    """Extra losses on x0_hat, to be added to the loss of any existing training loop.

        regularization = X0Regularization(noise_scheduler, [Term(total_variation, weight=0.1)])
        loss = F.mse_loss(model_output, noise) + regularization(model_output, timesteps, noisy_samples).loss

    L' runs in float32 outside autocast (float64 stays), only on images whose weighting is not 0; the mean is over the
    whole batch all the same. An image whose L' or gradient of L' is not finite contributes nothing and is counted in
    `nonfinite.dropped`; after `max_nonfinite_steps` steps with such images in a row the run is stopped.

    A regularizer that is an `nn.Module` becomes a submodule, so that `.to(device)` moves it; that very object is
    frozen and kept in evaluation mode. With timesteps on the CPU nothing here waits for an accelerator.

    Args:
        scheduler: the noise scheduler of the training.
        terms: the extra losses; their names must differ.
        snr_gamma: gamma if the denoising loss is weighted by min-SNR (arXiv:2303.09556), so that `matched` follows it.
        max_nonfinite_steps: steps in a row with non-finite L' after which `FloatingPointError` is raised; None: never,
            because where several processes train together, an error of one leaves the others waiting.

    Raises:
        ValueError: two terms of one name, or one named "denoising".
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
        if isinstance(terms, Term):
            raise TypeError("terms must be a sequence of Term: [Term(...)]")
        self.scheduler = scheduler
        self.terms = tuple(terms)
        self.snr_gamma = snr_gamma
        if len({"denoising", *self.names}) <= len(self.terms):
            raise ValueError(f"terms need different names, none 'denoising', got {self.names}: Term(..., name=...)")
        self.networks = nn.ModuleList(
            term.regularizer.requires_grad_(False) for term in self.terms if isinstance(term.regularizer, nn.Module)
        ).eval()
        self.nonfinite = NonFiniteGuard(max_nonfinite_steps)

    @property
    def names(self) -> list[str]:
        """The terms' names, in order."""
        return [term.name for term in self.terms]

    def train(self, mode: bool = True) -> X0Regularization:
        """As in `nn.Module`, but networks inside regularizers stay in evaluation mode."""
        super().train(mode)
        self.networks.eval()
        return self

    def forward(self, model_output: Tensor, timesteps: Tensor, sample: Tensor, **context) -> LossOutput:
        """The weighted sum of the extra losses for one batch.

        Args:
            model_output: (B, C, ...) what the network returned for `sample`.
            timesteps: (B,), or a scalar for the whole batch.
            sample: (B, C, ...) the noisy images x_t, in the coordinates of `scheduler.step`.
            **context: what the regularizers list in `needs`; tensors with the batch as first dimension.

        Returns:
            The loss, sum of weight * term, and the terms.

        Raises:
            TermError: a regularizer returns something else than an attached (B,), or needs what is not in `context`; a
                weighting returns something else than a finite (B,).
            FloatingPointError: L' was not finite for `max_nonfinite_steps` steps in a row.
        """
        timesteps = torch.as_tensor(timesteps).expand(len(sample))
        return self.at_level(self.noise_level(timesteps), model_output, timesteps, sample, context)

    def at_level(
        self, level: NoiseLevel, model_output: Tensor, timesteps: Tensor, sample: Tensor, context: dict
    ) -> LossOutput:
        """As `forward`, where `noise_level` of the timesteps, (B,), is known already."""
        model_output = _alias(model_output)
        weights = {term.name: checked_weights(term, level) for term in self.terms}
        estimates = self._estimates(weights, model_output, timesteps, sample)
        terms, per_image = {}, {}
        for term in self.terms:
            seen, x0_hat = estimates[term.estimator]
            terms[term.name], per_image[term.name] = self._mean(
                term, weights[term.name], seen, x0_hat, timesteps, context
            )
        loss = sum((term.weight * terms[term.name] for term in self.terms), start=sample.new_zeros(()))
        self.nonfinite.check()
        return LossOutput(loss, terms, per_image, weights, level.snr, model_output)

    def noise_level(self, timesteps: Tensor) -> NoiseLevel:
        """The noise level of each timestep, (B,), with the weight that the denoising loss has in this training."""
        return self.in_training(noise_level(self.scheduler, timesteps))

    def in_training(self, level: NoiseLevel) -> NoiseLevel:
        """A noise level with the weight that the denoising loss has there in this training."""
        if self.snr_gamma is None:
            return level
        return replace(level, denoising_weight=level.snr.clamp(max=self.snr_gamma))

    def _estimates(self, weights: dict[str, Tensor], model_output: Tensor, timesteps: Tensor, sample: Tensor) -> dict:
        """By estimator: the images (n,) that any of its terms looks at, and their x0_hat, made once for all terms."""
        estimates = {}
        for estimator in dict.fromkeys(term.estimator for term in self.terms):
            wanted = [weights[term.name] != 0 for term in self.terms if term.estimator is estimator]
            seen = torch.stack(wanted).any(0).nonzero().flatten()
            chosen = (_select(tensor, seen) for tensor in (model_output, timesteps, sample))
            estimates[estimator] = seen, estimator(self.scheduler, *chosen) if len(seen) else sample[:0]
        return estimates

    def _mean(
        self, term: Term, weights: Tensor, seen: Tensor, x0_hat: Tensor, timesteps: Tensor, context: dict
    ) -> tuple[Tensor, Tensor]:
        """mean_i [ weight_i L'(x0_hat_i) ] over the whole batch, from the images `seen` whose weight is not 0.

        And L' of each image of the batch, (B,), nan where it was left out or dropped.
        """
        among_seen = weights[seen].nonzero().flatten()
        if len(among_seen) == 0:
            return x0_hat.new_zeros(()), x0_hat.new_full((len(weights),), torch.nan)
        active = seen[among_seen]
        context = {name: _select(value, active, len(weights)) for name, value in term_context(term, context).items()}
        values, seen_values = self._evaluate(term, _select(x0_hat, among_seen), context, timesteps[active])
        per_image = seen_values
        if len(active) < len(weights):
            per_image = seen_values.new_full((len(weights),), torch.nan)
            per_image[active.to(values.device, non_blocking=True)] = seen_values
        return (_select(weights, active).to(values, non_blocking=True) * values).sum() / len(weights), per_image

    def _evaluate(self, term: Term, x0_hat: Tensor, context: dict, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """L' of each image in full precision, (n,), 0 where it is not finite; and the same detached, nan there.

        An image where its gradient is not finite has none.
        """
        x0_hat = x0_hat.view_as(x0_hat)  # an alias of this term's own, so that its bad gradients spare the others
        if x0_hat.requires_grad:
            x0_hat.register_hook(lambda gradient: self.nonfinite.drop_gradients(term.name, gradient))
        values = checked_values(term, x0_hat, context)
        return self.nonfinite.drop_values(term.name, values, x0_hat, timesteps)


class RegularizedLoss(nn.Module):
    """The whole objective for one batch: denoising loss plus `Term`s, from clean images to a scalar.

        loss_fn = RegularizedLoss(noise_scheduler, [Term(total_variation, weight=0.1)])
        loss_fn(model, original_samples).loss.backward()

    Without terms and without `snr_gamma` the loss is `F.mse_loss(model_output, target)`, bit for bit.

    Args:
        scheduler: a diffusers noise scheduler; its prediction_type says what the network predicts.
        terms: the extra losses.
        snr_gamma: weigh the denoising loss by min(SNR, gamma) in x_0 units (Hang et al. 2023, arXiv:2303.09556).
        max_nonfinite_steps: as in `X0Regularization`.
    """

    def __init__(
        self,
        scheduler,
        terms: Iterable[Term] = (),
        *,
        snr_gamma: float | None = None,
        max_nonfinite_steps: int | None = 10,
    ):
        super().__init__()
        if snr_gamma is not None and prediction_type(scheduler) == "epsilon":
            refuse_zero_terminal_snr(scheduler)
        self.scheduler = scheduler
        self.snr_gamma = snr_gamma
        self.regularization = X0Regularization(
            scheduler, terms, snr_gamma=snr_gamma, max_nonfinite_steps=max_nonfinite_steps
        )

    def forward(
        self,
        model,
        original_samples: Tensor,
        *,
        noise: Tensor | None = None,
        timesteps: Tensor | None = None,
        model_kwargs: dict | None = None,
        **context,
    ) -> LossOutput:
        """The objective at one random noise level per image, with one call of the network.

        Args:
            model: `(noisy_samples, timesteps, **model_kwargs)` -> a tensor, a tuple or a diffusers output.
            original_samples: (B, C, H, W) images in [-1, 1].
            noise: (B, C, H, W); standard normal by default.
            timesteps: (B,); by default uniform over the training schedule, drawn on the CPU.
            model_kwargs: further arguments of the network, such as `class_labels`.
            **context: what the regularizers list in `needs`; `original_samples` is always there.

        Returns:
            The loss and its parts, "denoising" first.
        """
        if noise is None:
            noise = torch.randn_like(original_samples)
        if timesteps is None:
            timesteps = draw_timesteps(self.scheduler, len(original_samples))
        timesteps = torch.as_tensor(timesteps).expand(len(original_samples))
        level = noise_level(self.scheduler, timesteps)
        noisy_samples = add_noise(self.scheduler, original_samples, noise, level)
        model_input = scale_model_input(self.scheduler, noisy_samples, level)
        on_device = timesteps.to(original_samples.device, non_blocking=True)
        model_output = _alias(_tensor_of(model(model_input, on_device, **(model_kwargs or {}))))
        target = prediction_target(self.scheduler, original_samples, noise, level)
        in_training = self.regularization.in_training(level)
        weights = in_training.denoising_weight / level.denoising_weight
        denoising, per_image = self._denoising(model_output, target, weights)
        context["original_samples"] = original_samples
        extra = self.regularization.at_level(in_training, model_output, timesteps, noisy_samples, context)
        return LossOutput(
            denoising + extra.loss,
            {"denoising": denoising, **extra.terms},
            {"denoising": per_image, **extra.per_image},
            extra.weightings,
            extra.snr,
            model_output,
        )

    def _denoising(self, model_output: Tensor, target: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The denoising loss, a scalar, and its value for each image, (B,), detached.

        `weights`, (B,), are those of min-SNR; without it they are 1, and nothing is multiplied.
        """
        model_output = without_learned_variance(self.scheduler, model_output, target)
        model_output = model_output.to(torch.promote_types(target.dtype, torch.float32))
        target = target.to(model_output.dtype)
        if self.snr_gamma is None:
            with torch.no_grad():
                per_image = F.mse_loss(model_output, target, reduction="none").flatten(1).mean(1)
            return F.mse_loss(model_output, target), per_image
        squared_error = F.mse_loss(model_output, target, reduction="none").flatten(1).mean(1)
        per_image = weights.to(squared_error, non_blocking=True) * squared_error
        return per_image.mean(), per_image.detach()


def draw_timesteps(scheduler, batch_size: int) -> Tensor:
    """Timesteps to train at, uniform over the training schedule, on the CPU.

    There, what depends on them alone never waits for an accelerator. Flow matching draws sigma from {1/T, ..., 1}, and
    shifts it as the scheduler does for its own training schedule.

    Args:
        scheduler: the noise scheduler of the training.
        batch_size: B, one for each image.

    Returns:
        (B,) integers, or for flow matching numbers of the kind that its scheduler counts in.

    Raises:
        ValueError: the scheduler has no training schedule to draw from.
    """
    kind, steps = prediction_type(scheduler), scheduler.config.num_train_timesteps
    if kind == "trigflow" or hasattr(scheduler, "precondition_outputs"):
        raise ValueError(
            f"{type(scheduler).__name__} counts time by its noise, with no training schedule: pass timesteps"
        )
    timesteps = torch.randint(0, steps, (batch_size,))
    if kind != "flow_prediction":
        return timesteps
    sigma = (timesteps + 1) / steps
    if not scheduler.config.get("use_dynamic_shifting"):
        shift = scheduler.config.get("shift", 1.0)
        sigma = shift * sigma / (1 + (shift - 1) * sigma)
    return sigma * steps


def _alias(model_output: Tensor) -> Tensor:
    """The same values, by which `balance` can take gradients while hooks on the network's output wait for backward."""
    return model_output.view_as(model_output)


def _tensor_of(model_result) -> Tensor:
    return model_result if isinstance(model_result, Tensor) else model_result[0]


def _select(value, index: Tensor, batch_size: int | None = None):
    """The chosen images' part of a tensor; with `batch_size`, what is no tensor of so many images is left whole."""
    batched = isinstance(value, Tensor) and value.ndim > 0 and (batch_size is None or len(value) == batch_size)
    if not batched or len(index) == len(value):  # all of them, in order
        return value
    return value[index.to(value.device, non_blocking=True)]
