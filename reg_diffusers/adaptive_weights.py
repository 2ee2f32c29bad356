r"""Sets the weights of terms by a rule, in any training loop.

Both rules compare gradients at the network's output. With g_d the gradient of the loop's own squared error, g_k that
of term k and <.> a running mean over measurements,

    unit_k = sqrt( <|g_d|^2> / <|g_k|^2> )

is the weight at which both have equal norms. `AutoWeight(share)` is share * unit_k. `Target` bounds E[L'] by dual
ascent, in these units, as `training.term_weights` describes for the script. g_d needs no backward pass: the loop's
loss is mean_i w_i |x_0 - x0_hat|^2 / N, so

    |g_d|^2 = sum_i ( 2 w_i |out_i| |x0_hat_i - x_0,i| / (B N) )^2,        out = d x0_hat / d o.

A term is measured in every tenth call in which it runs, reduced over the processes of torch.distributed. Its unit is
frozen after 20 measurements, so that one fixed loss is minimized from then on. The factor of a schedule comes on top:
calls in which it is 0 do not count.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from .estimators import Prediction, calls_model, one_step
from .loss_output import LossOutput
from .prediction import NoiseLevel, output_weight
from .term import Term, score
from .weight_rules import rule_of

__all__ = ["AdaptiveWeights"]

EVERY = 10  # calls of a term from one measurement to the next
MEASUREMENTS = 20  # until units are frozen
_DECAY = 0.9  # of running means, per measurement
_BY_TERM = ("names", "calls", "means", "on_data", "units", "multipliers", "weights")


class AdaptiveWeights(nn.Module):
    """Holds the weights of the terms of a loss: numbers, or scalars that a rule sets.

    Only terms with a rule have a state, which is part of the loss's `state_dict`. It is loaded by the names of the
    terms, in any order, and refused for terms with other names.

    Args:
        terms: terms of the loss.

    Raises:
        ValueError: a term with a rule has an estimator that calls the network again.
    """

    def __init__(self, terms: Sequence[Term]):
        super().__init__()
        self._terms = {term.name: term for term in terms if rule_of(term.weight).is_measured}
        self._fixed = {term.name: term.weight for term in terms if term.name not in self._terms}
        for name, term in self._terms.items():
            if calls_model(term.estimator):
                raise ValueError(
                    f"term {name!r}: {type(term.weight).__name__} measures gradients at the network's output, but"
                    f" {term.estimator!r} calls the network again: give the weight as a number"
                )
        self._calls = [0] * len(self._terms)  # the numbers in the buffer, known without waiting for the device
        if self._terms:
            number = len(self._terms)
            self.register_buffer("calls", torch.zeros(number, dtype=torch.long))
            self.register_buffer("names", torch.tensor([zlib.crc32(name.encode()) for name in self._terms]))
            self.register_buffer("means", torch.zeros(number, 4))  # |g_d|^2, |g_k|^2, sum lambda L', sum lambda
            self.register_buffer("on_data", torch.zeros(number, 2))  # sum of L' of the data, number of images
            for name in ("units", "multipliers", "weights"):
                self.register_buffer(name, torch.zeros(number))

    @property
    def has_rules(self) -> bool:
        """Whether a rule sets the weight of a term."""
        return bool(self._terms)

    def current(self) -> dict[str, float | Tensor]:
        """Returns the weight of each term by name, before its schedule: a number, or a scalar on the device."""
        found = dict(zip(self._terms, self.weights.clone(), strict=True)) if self._terms else {}
        return {**self._fixed, **found}

    def update(self, output: LossOutput, prediction: Prediction, level: NoiseLevel, context: dict, is_image: bool):
        """Measures each term in every tenth call in which it runs during training, and sets its weight.

        Args:
            output: output of this call, with terms attached to the graph; its loss is not used.
            prediction: network input and output of the whole batch.
            level: noise level, with the weight of the loop's own loss.
            context: further arguments of the regularizers, for the whole batch.
            is_image: whether the loop passed x0_hat instead of the output.

        Raises:
            ValueError: original_samples are missing, or a target is relative and L' of the data is not above 0.
        """
        is_training = self.training and torch.is_grad_enabled() and prediction.model_output.requires_grad
        if not is_training:
            return
        if prediction.original_samples is None:
            names = ", ".join(self._terms)
            raise ValueError(f"the weight of {names} follows from gradients: pass original_samples= to the loss")
        due = self._due(output.factors)
        if not due:
            return
        of_denoising = _of_denoising(prediction, level, is_image) if any(due.values()) else 0.0
        rows = []
        for name, is_measuring in due.items():
            values, lambdas = output.per_image[name], output.weightings[name].to(output.per_image[name])
            known = ~values.isnan()
            row = [of_denoising, _squared(output.terms[name], prediction.model_output) if is_measuring else 0.0]
            row += [torch.where(known, lambdas * values, 0).sum(), (lambdas * known).sum()]
            row += _on_data(self._terms[name], prediction.original_samples, context) if is_measuring else [0.0, 0.0]
            rows.append(torch.stack([torch.as_tensor(part).to(self.means) for part in row]))
        for name, found in zip(due, _over_processes(torch.stack(rows), prediction.model_output.device), strict=True):
            self._set(name, found, due[name])

    def _due(self, factors: dict[str, float]) -> dict[str, bool]:
        """Counts a call of each term that runs; returns the names to measure, and whether gradients are measured."""
        due = {}
        for place, (name, term) in enumerate(self._terms.items()):
            if factors.get(name) == 0:
                continue
            call = self._calls[place]
            self._calls[place] += 1
            self.calls[place] += 1
            is_measuring = call < EVERY * MEASUREMENTS
            if call % EVERY == 0 and (is_measuring or term.weight.follows_value):
                due[name] = is_measuring
        return due

    def _set(self, name: str, found: Tensor, is_measuring: bool) -> None:
        """Adds a measurement to the running means and the sums over the data, and sets the unit and the weight.

        Args:
            name: name of the term.
            found: measurement (6,), with the columns of `means` and of `on_data`.
            is_measuring: whether gradients and the data were measured.
        """
        place, rule = list(self._terms).index(name), self._terms[name].weight
        means, on_data = self.means[place], self.on_data[place]
        is_good = found.isfinite().all() & ((found[0] > 0) | (not is_measuring))
        columns = slice(None) if is_measuring else slice(2, 4)
        mixed = _DECAY * means[columns] + (1 - _DECAY) * found[:4][columns]
        means[columns] = torch.where(is_good, mixed, means[columns])
        on_data += found[4:]
        of_denoising, of_term, value, weight = means
        if is_measuring:
            self.units[place] = torch.where(of_term > 0, (of_denoising / of_term).sqrt(), 0)
        excess, is_first = None, self._calls[place] == 1
        if rule.follows_value:
            mean_on_data = on_data[0] / on_data[1]
            bound = rule.bound(mean_on_data)
            if rule.relative and is_first and not bound > 0:
                raise ValueError(
                    f"term {name!r}: L' of the data is {float(mean_on_data):.3g}, which gives Target(relative=True) no"
                    " scale: give the value itself"
                )
            excess = torch.where(weight > 0, value / (weight * bound) - 1, 0)
        controlled = rule.controlled(self.units[place], excess, self.multipliers[place], 1 if is_first else EVERY)
        self.weights[place], self.multipliers[place] = controlled

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        if self._terms and f"{prefix}names" in state_dict:
            saved, own = state_dict[f"{prefix}names"].tolist(), self.names.tolist()
            if sorted(saved) != sorted(own):
                error_msgs.append(
                    f"the state is that of {len(saved)} terms with AutoWeight or Target whose names are not"
                    f" {', '.join(self._terms)}: give the terms the names that they had"
                )
                return
            places = [saved.index(name) for name in own]
            rows = [f"{prefix}{name}" for name in _BY_TERM if f"{prefix}{name}" in state_dict]
            state_dict = {**state_dict, **{row: state_dict[row][places] for row in rows}}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if f"{prefix}calls" in state_dict:
            self._calls = self.calls.tolist()


def _of_denoising(prediction: Prediction, level: NoiseLevel, is_image: bool) -> Tensor:
    """Computes |g_d|^2 in closed form, a scalar."""
    output = prediction.model_output.detach()
    x0_hat = output if is_image else one_step(replace(prediction, model_output=output))
    error = (x0_hat - prediction.original_samples.to(x0_hat)).flatten(1)
    natural = torch.ones_like(level.snr)
    if not is_image:
        natural = output_weight(prediction.scheduler, prediction.timesteps)
    factor = (2 * level.denoising_weight / natural.sqrt()).to(error, non_blocking=True) / error.numel()
    return (factor**2 * error.square().sum(1)).nan_to_num(0.0, 0.0).sum()


def _squared(term: Tensor, model_output: Tensor) -> Tensor:
    """Computes |g_k|^2, a scalar; 0 without active images."""
    if not term.requires_grad:
        return model_output.new_zeros(())
    (gradient,) = torch.autograd.grad(term, model_output, retain_graph=True, allow_unused=True)
    return model_output.new_zeros(()) if gradient is None else gradient.float().square().sum()


def _on_data(term: Term, original_samples: Tensor, context: dict) -> list:
    """Returns the sum of L' over images of the data and their number; 0 and 1 if the rule does not need them."""
    if not term.weight.needs_data:
        return [0.0, 1.0]
    values = score(term, original_samples, context)
    known = values.isfinite()
    return [torch.where(known, values, 0).sum(), known.sum()]


def _over_processes(found: Tensor, device: torch.device) -> Tensor:
    """Sums over the processes, on the device of the images: NCCL has no sum on the CPU, where the state may be."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return found
    summed = found.to(device)
    torch.distributed.all_reduce(summed)
    return summed.to(found)
