r"""The weights of the terms while a model learns: given, set by a share of the gradient, or by a target.

All of it follows from sums over the images of a step, on all processes, of products of gradients at the network's
output, which `balancing` has anyway. With <.> a running mean over steps and g_d, g_k the gradients of the denoising
loss and of term k at the output, the unit of a term is the weight at which both are equally strong,

    unit_k = sqrt( <|g_d|^2> / <|g_k|^2> ).

auto:SHARE: weight_k = SHARE unit_k. Taking weights from norms of gradients goes back to Chen et al. 2018
(arXiv:1711.02257) and Wang, Teng & Perdikaris 2021 (arXiv:2001.04536); here the norms are those at the output, which
cost no further pass, and the weight is frozen, so that what is minimised is one loss.

A target: minimise the denoising loss subject to E[L'] <= target, with E[L'] = <sum_i lambda_i L'_i> / <sum_i lambda_i>
over the images that take part. Dual ascent on the augmented Lagrangian (Nocedal & Wright 2006, ch. 17; taken during
the descent: Platt & Barr 1987; as a controller with a proportional and an integral part: Stooke et al. 2020,
arXiv:2007.03964), without units,

    c = E[L'] / target - 1,   weight_k = max(0, mu + rho c) unit_k,   mu <- max(0, mu + eta c) after each step.

A constraint that is slack has c < 0, hence mu = 0 and weight 0 after a while.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from ..balancing import BalancedLoss
from .errors import warn
from .weight_rules import AutoWeight, Target

__all__ = ["MEASURED_STEPS", "TermWeights"]

MEASURED_STEPS = 100  # after the warmup of the learning rate; then units are frozen
_DECAY = 0.98  # of running means, per step: they remember some 50 steps
_RHO = 0.5  # proportional part of the controller: the weight in units for a relative excess of 1
_ETA = 1e-2  # integral part, per step
_TENSORS = ("means", "units", "multipliers", "weights")  # of the state
_LARGEST_EXCESS = 1.0  # of c: at the start x0_hat is noise, and L' any multiple of the target


class TermWeights:
    """Holds the weight of each term and, where a rule sets it, measures what the rule needs.

    The first step of a rule has weight 0, because nothing is measured yet; then the running estimate counts until it
    is frozen. A target starts to act when its unit is frozen. No step waits for an accelerator, but the one in which
    units are frozen and told.

    Args:
        accelerator: of the training; all processes come to the same weights.
        rules: by the name of each term: a plain weight, an `AutoWeight` or a `Target`.
        means_on_data: of L' by the names of the terms, for relative targets; those of the main process count.
        measured_steps: optimizer steps until units are frozen.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        rules: dict[str, float | AutoWeight | Target],
        means_on_data: dict[str, float],
        measured_steps: int,
    ):
        self.rules = rules
        self._accelerator = accelerator
        self._measured_steps = measured_steps
        ruled = [name for name, rule in rules.items() if isinstance(rule, AutoWeight | Target)]
        self._place = {name: place for place, name in enumerate(ruled)}  # among those with a rule
        targets = {name: rule for name, rule in rules.items() if isinstance(rule, Target)}
        bounds = {name: target.bound(means_on_data.get(name, 0.0)) for name, target in targets.items()}
        self._targets: dict[str, float] = broadcast_object_list([bounds])[0]
        device = accelerator.device
        self._steps = 0
        self._means = torch.zeros(len(ruled), 4, device=device)  # |g_d|^2, |g_k|^2, sum lambda L', sum lambda
        self._step = torch.zeros_like(self._means)  # the same, summed over the step under way
        self._units = torch.zeros(len(ruled), device=device)
        self._multipliers = torch.zeros(len(ruled), device=device)
        self._weights = torch.zeros(len(ruled), device=device)

    @property
    def names(self) -> list[str]:
        """The terms whose weight a rule sets."""
        return list(self._place)

    @property
    def current(self) -> dict[str, float | Tensor]:
        """The weight of each term in the next step: a number, or a scalar on the device."""
        return {
            name: self._weights[self._place[name]] if name in self._place else rule
            for name, rule in self.rules.items()
        }

    def check_length(self, max_train_steps: int) -> None:
        """Warns of rules that a training of so many steps is too short for."""
        if max_train_steps > self._measured_steps:
            return
        when = f"until step {self._measured_steps} (--lr_warmup_steps and {MEASURED_STEPS}), and there are"
        for name, rule in self.rules.items():
            if isinstance(rule, Target):
                warn(f"--reg_target {rule}: gradients are measured {when} {max_train_steps}: {name} has weight 0")
            elif isinstance(rule, AutoWeight):
                warn(f"--reg_weight {rule}: the weight of {name} is not frozen {when} {max_train_steps} only")

    def add(self, output: BalancedLoss) -> None:
        """Takes note of a batch; one whose loss is not finite does not count."""
        if not self._place:
            return
        products, order = output.products.sum(0), list(output.gradients)
        rows = []
        for name in self._place:
            place, values = order.index(name), output.per_image[name]
            lambdas = output.weightings[name].to(values, non_blocking=True)
            known = ~values.isnan()
            rows += [products[0, 0], products[place, place]]
            rows += [torch.where(known, lambdas * values, 0).sum(), (lambdas * known).sum()]
        found = torch.stack([row.to(self._step) for row in rows]).reshape(-1, 4)
        self._step += torch.where(output.loss.detach().isfinite(), found, 0)

    def update(self) -> list[str]:
        """Sets the weights of the next step, after an optimizer step, on all processes; returns what to tell."""
        self._steps += 1
        if not self._place or (not self._targets and self._steps > self._measured_steps):
            return []
        found = self._accelerator.reduce(self._step, "sum")
        self._step = torch.zeros_like(self._step)
        is_good = found.isfinite().all() & (found[:, :1] > 0)  # else the whole step was left out
        self._means = torch.where(is_good, _DECAY * self._means + (1 - _DECAY) * found, self._means)
        if self._steps <= self._measured_steps:
            of_denoising, of_term = self._means[:, 0], self._means[:, 1]
            self._units = torch.where(of_term > 0, (of_denoising / of_term).sqrt(), 0)
        for name, place in self._place.items():
            self._set(name, place)
        return self._told() if self._steps == self._measured_steps else []

    def _set(self, name: str, place: int) -> None:
        rule, unit = self.rules[name], self._units[place]
        if isinstance(rule, AutoWeight):
            self._weights[place] = rule.share * unit
        elif self._steps >= self._measured_steps:
            excess = self._excess(name).clamp(max=_LARGEST_EXCESS)
            multiplier = (self._multipliers[place] + _ETA * excess).clamp(min=0)
            self._multipliers[place] = multiplier
            self._weights[place] = (multiplier + _RHO * excess).clamp(min=0) * unit

    def _excess(self, name: str) -> Tensor:
        """c = E[L'] / target - 1; 0 as long as no image took part."""
        _, _, value, weight = self._means[self._place[name]]
        return torch.where(weight > 0, value / (weight * self._targets[name]) - 1, 0)

    def _told(self) -> list[str]:
        lines = []
        for name, place in self._place.items():
            rule, unit = self.rules[name], self._units[place].item()
            if unit == 0:
                lines.append(f"weight of {name}: 0 for good, its gradient was 0 in all steps so far ({rule})")
            elif isinstance(rule, AutoWeight):
                lines.append(f"weight of {name}: frozen at {rule.share * unit:.4g} ({rule}) after {self._steps} steps")
            else:
                lines.append(
                    f"weight of {name}: from now on what E[L'] <= {self._targets[name]:.4g} takes, in units of"
                    f" {unit:.4g}, at which both gradients are equally strong"
                )
        return lines

    def metrics(self) -> dict[str, float]:
        """What to log: each weight, and of each target the multiplier, in units, and c; waits for the device."""
        found = {f"weight/{name}": float(weight) for name, weight in self.current.items()}
        for name in self._targets:
            found[f"multiplier/{name}"] = self._multipliers[self._place[name]].item()
            found[f"constraint/{name}"] = self._excess(name).item()
        return found

    def state_dict(self) -> dict:
        state = {"steps": self._steps, "rules": self._said, "targets": dict(self._targets)}
        return state | {name: getattr(self, f"_{name}").cpu() for name in _TENSORS}

    def load_state_dict(self, state: dict) -> None:
        """Goes on from a state. Rules that have changed since count as they are now, for other terms from the start.

        The bound of a relative target is measured at each start, on as many images as time allows, and must not move.
        """
        before = state["rules"]
        if list(before) != self.names:
            return
        self._steps = state["steps"]
        for name in _TENSORS:
            setattr(self, f"_{name}", state[name].to(self._accelerator.device))
        for name, place in self._place.items():
            if before[name] == str(self.rules[name]) and name in state["targets"]:
                self._targets[name] = state["targets"][name]
            elif isinstance(self.rules[name], AutoWeight):
                self._set(name, place)

    @property
    def _said(self) -> dict[str, str]:
        return {name: str(self.rules[name]) for name in self._place}
