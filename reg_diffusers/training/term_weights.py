r"""Sets the weights of the terms during a training: to a number, by a share of the gradient, or by a target.

The rules use products of gradients at the network's output, summed over the images of a step on all processes;
`balancing` computes them anyway. With <.> a running mean over steps and g_d, g_k the gradients of the denoising loss
and of term k at the output, the unit of a term is the weight at which both have equal norms,

    unit_k = sqrt( <|g_d|^2> / <|g_k|^2> ).

auto:SHARE: weight_k = SHARE unit_k. Weights from gradient norms were introduced by Chen et al. 2018
(arXiv:1711.02257) and Wang, Teng & Perdikaris 2021 (arXiv:2001.04536). Here the norms are those at the output, which
need no further backward pass, and the weight is frozen, so that one fixed loss is minimized.

A target: minimize the denoising loss subject to E[L'] <= target, with E[L'] = <sum_i lambda_i L'_i> / <sum_i lambda_i>
over the images with a value. Dual ascent on the augmented Lagrangian (Nocedal & Wright 2006, ch. 17; taken during
the descent: Platt & Barr 1987; as a controller with a proportional and an integral part: Stooke et al. 2020,
arXiv:2007.03964), in dimensionless form,

    c = E[L'] / target - 1,   weight_k = max(0, mu + rho c) unit_k,   mu <- max(0, mu + eta c) after each step.

A slack constraint has c < 0, so mu and the weight decrease to 0.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from ..balancing import BalancedLoss
from ..runtime.errors import warn
from ..settings.optimization import OptimizationSettings
from ..weight_rules import WeightRule

__all__ = ["MEASURED_STEPS", "TermWeights", "measured_steps"]

MEASURED_STEPS = 100  # after the warmup of the learning rate; then units are frozen
_DECAY = 0.98  # of running means, per step: a window of about 50 steps
_TENSORS = ("means", "units", "multipliers", "weights")  # of the state


def measured_steps(optimization: OptimizationSettings) -> int:
    """Returns the number of optimizer steps until units are frozen."""
    return optimization.lr_warmup_steps + MEASURED_STEPS


class TermWeights:
    """Holds the weight of each term, and measures what the rules need.

    A measured rule starts with weight 0, because nothing is measured before the first step. It then uses the running
    estimate until the unit is frozen. A target takes effect when its unit is frozen. No step waits for an accelerator,
    except the one in which units are frozen and printed.

    Args:
        accelerator: accelerator of the training; all processes compute the same weights.
        rules: rule of each term, by name.
        means_on_data: mean of L' on the data by the names of the terms, for relative targets; the values of the main
            process are used.
        measured_steps: optimizer steps until units are frozen.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        rules: dict[str, WeightRule],
        means_on_data: dict[str, float],
        measured_steps: int,
    ):
        self.rules = rules
        self._accelerator = accelerator
        self._measured_steps = measured_steps
        ruled = [name for name, rule in rules.items() if rule.is_measured]
        self._place = {name: place for place, name in enumerate(ruled)}
        bounds = {name: rule.bound(means_on_data.get(name, 0.0)) for name, rule in rules.items()}
        bounds = {name: bound for name, bound in bounds.items() if bound is not None}
        self._targets: dict[str, float] = broadcast_object_list([bounds])[0]
        device = accelerator.device
        self._steps = 0
        self._means = torch.zeros(len(ruled), 4, device=device)  # |g_d|^2, |g_k|^2, sum lambda L', sum lambda
        self._step = torch.zeros_like(self._means)  # the same, summed over the current step
        self._units = torch.zeros(len(ruled), device=device)
        self._multipliers = torch.zeros(len(ruled), device=device)
        self._weights = torch.zeros(len(ruled), device=device)

    @property
    def names(self) -> list[str]:
        """The names of the terms with a weight set by a rule."""
        return list(self._place)

    @property
    def current(self) -> dict[str, float | Tensor]:
        """The weight of each term in the next step, before its schedule: a number, or a scalar on the device."""
        return {
            name: self._weights[self._place[name]] if name in self._place else rule.start
            for name, rule in self.rules.items()
        }

    def check_length(self, max_train_steps: int) -> None:
        """Warns of rules that need a longer training."""
        if max_train_steps > self._measured_steps:
            return
        measured = f"until step {self._measured_steps} (--lr_warmup_steps and {MEASURED_STEPS}), but the training has"
        for name in self._place:
            warn(self.rules[name].too_short(name, measured, max_train_steps))

    def update(self, output: BalancedLoss) -> None:
        """Adds a batch; one with a non-finite loss does not count."""
        if not self._place:
            return
        products, order = output.products.sum(0), list(output.gradients)
        rows = []
        for name in self._place:
            if output.factors.get(name) == 0:  # not measured: a row of zeros does not change the means
                rows += [torch.zeros_like(output.loss)] * 4
                continue
            place, values = order.index(name), output.per_image[name]
            lambdas = output.weightings[name].to(values, non_blocking=True)
            known = ~values.isnan()
            rows += [products[0, 0], products[place, place]]
            rows += [torch.where(known, lambdas * values, 0).sum(), (lambdas * known).sum()]
        found = torch.stack([row.to(self._step) for row in rows]).reshape(-1, 4)
        self._step += torch.where(output.loss.detach().isfinite(), found, 0)

    def compute(self) -> list[str]:
        """Sets the weights of the next step, after an optimizer step, on all processes; returns lines to print."""
        self._steps += 1
        if not self._place or (not self._targets and self._steps > self._measured_steps):
            return []
        found = self._accelerator.reduce(self._step, "sum")
        self._step = torch.zeros_like(self._step)
        is_good = found.isfinite().all() & (found[:, :1] > 0)  # else the step was skipped
        self._means = torch.where(is_good, _DECAY * self._means + (1 - _DECAY) * found, self._means)
        if self._steps <= self._measured_steps:
            of_denoising, of_term = self._means[:, 0], self._means[:, 1]
            self._units = torch.where(of_term > 0, (of_denoising / of_term).sqrt(), 0)
        for name, place in self._place.items():
            self._set(name, place)
        return self._report() if self._steps == self._measured_steps else []

    def _set(self, name: str, place: int) -> None:
        rule, unit, has_target = self.rules[name], self._units[place], name in self._targets
        if not has_target or self._steps >= self._measured_steps:
            excess = self._excess(name) if has_target else None
            controlled = rule.controlled(unit, excess, self._multipliers[place])
            self._weights[place], self._multipliers[place] = controlled

    def _excess(self, name: str) -> Tensor:
        """Computes c = E[L'] / target - 1; 0 until an image has a value."""
        _, _, value, weight = self._means[self._place[name]]
        return torch.where(weight > 0, value / (weight * self._targets[name]) - 1, 0)

    def _report(self) -> list[str]:
        lines = []
        for name, place in self._place.items():
            rule, unit = self.rules[name], self._units[place].item()
            if unit == 0:
                lines.append(f"weight of {name}: fixed at 0, because its gradient was 0 in all steps so far ({rule})")
            else:
                lines.append(rule.frozen(name, unit, self._steps, self._targets.get(name)))
        return lines

    def metrics(self) -> dict[str, float]:
        """Returns what to log: each weight, and for each target its multiplier and c. Waits for the device.

        Weights are those before a schedule.
        """
        found = {f"weight/{name}": float(weight) for name, weight in self.current.items()}
        for name in self._targets:
            found[f"multiplier/{name}"] = self._multipliers[self._place[name]].item()
            found[f"constraint/{name}"] = self._excess(name).item()
        return found

    def state_dict(self) -> dict:
        state = {"steps": self._steps, "rules": self._texts, "targets": dict(self._targets)}
        return state | {name: getattr(self, f"_{name}").cpu() for name in _TENSORS}

    def load_state_dict(self, state: dict) -> None:
        """Continues from a state. Changed rules apply as they are now; with other terms, the state is ignored.

        The bound of a relative target is that of the state, because each start measures it on as many images as time
        allows.
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
            elif (weight := self.rules[name].weight_at(self._units[place])) is not None:
                self._weights[place] = weight

    @property
    def _texts(self) -> dict[str, str]:
        return {name: str(self.rules[name]) for name in self._place}
