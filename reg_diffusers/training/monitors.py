"""Monitors one training: what is logged, which steps and images are skipped, and the weights of the terms.

    output = balance(loss_fn(...), monitors.weights.current)
    monitors.update(output)                  # after each batch
    monitors.step()                          # after each optimizer step
    monitors.look(step); monitors.write(step)

Nothing is read from the device between two calls of `look`. `look` and `write` do nothing in steps in which they are
not due.
"""

from __future__ import annotations

from pathlib import Path

from tqdm.auto import tqdm

from ..balancing import BalancedLoss
from ..regularization import X0Regularization
from ..runtime.errors import UsageError, warn
from ..runtime.messages import bars_are_hidden, detail, say
from ..settings.optimization import OptimizationSettings
from ..weight_rules import WeightRule
from .bad_steps import BadSteps
from .dropped_images import DroppedImages
from .loss_parts import LossParts
from .metrics import MetricsLog
from .preparation import Training
from .term_weights import TermWeights, measured_steps
from .terms import describe_schedules

__all__ = ["LOG_INTERVAL", "Monitors"]

LOG_INTERVAL = 10  # steps between two reads of the metrics; a read waits for an accelerator


class Monitors:
    """Owns the monitors of one training, their files and the progress bar.

    Args:
        training: training before its first step.
        output_dir: folder of metrics.jsonl and bad_steps.jsonl.
        regularization: extra part of the loss.
        rules: rules of the weights, by term.
        means_on_data: mean of L' on the data, by term.
        optimization: settings with the length of the warmup and the number of bad steps that ends a training.
        checkpointing_steps: steps between checkpoints; `look` reads before each of them.
        title: what the progress bar begins with.

    Attributes:
        weights: weights of the terms.
        bad_steps: steps with a non-finite loss or gradient.
        bar: progress bar; None before `start`.
    """

    def __init__(
        self,
        training: Training,
        output_dir: Path,
        regularization: X0Regularization,
        rules: dict[str, WeightRule],
        means_on_data: dict[str, float],
        optimization: OptimizationSettings,
        checkpointing_steps: int,
        title: str = "training",
    ):
        accelerator, names = training.accelerator, regularization.names
        limit = optimization.max_bad_steps
        measured = measured_steps(optimization)
        self.weights = TermWeights(accelerator, rules, means_on_data, measured)
        self.weights.check_length(training.max_train_steps)
        for line in describe_schedules(regularization.terms, training.max_train_steps):
            warn(line)
        self.bad_steps = BadSteps(accelerator, output_dir / "bad_steps.jsonl", limit)
        self._metrics = MetricsLog(accelerator, output_dir / "metrics.jsonl")
        self._loss_parts = LossParts(accelerator, names, means_on_data)
        self._dropped = DroppedImages(accelerator, regularization.nonfinite, names, limit)
        self._scheduled = [term for term in regularization.terms if term.schedule is not None]
        self._training, self._means_on_data = training, means_on_data
        self._checkpointing_steps = checkpointing_steps
        self.bar = None
        self._bar_settings = {
            "desc": title,
            "total": training.max_train_steps,
            "disable": not accelerator.is_local_main_process or bars_are_hidden(),
            "dynamic_ncols": True,
        }

    @property
    def counters(self) -> dict[str, object]:
        """The counters that each process keeps for itself, by their names in a checkpoint."""
        return {
            "metrics": self._metrics,
            "loss_parts": self._loss_parts,
            "bad_steps": self.bad_steps,
            "nonfinite": self._dropped,
        }

    @property
    def states(self) -> dict[str, object]:
        """The states that are equal on all processes, by their names in a checkpoint."""
        return {"term_weights": self.weights} if self.weights.names else {}

    def start(self, step: int) -> tqdm:
        """Removes steps after this one from the logs. Returns the progress bar, which the caller closes."""
        for log in (self._metrics, self.bad_steps):
            log.forget_later_than(step)
        self.bar = tqdm(initial=step, **self._bar_settings)
        return self.bar

    def update(self, output: BalancedLoss) -> None:
        """Adds a batch."""
        self._metrics.update({"loss": output.loss, **output.terms})
        self._loss_parts.update(output)
        self.weights.update(output)

    def step(self) -> None:
        """Finishes an optimizer step, and sets the weights of the next one."""
        self._dropped.update()
        for line in self.weights.compute():
            say(line)
        self.bar.update()

    def look(self, step: int) -> UsageError | None:
        """Counts skipped steps and images, if due; returns the error that must end the training, or None."""
        if not (self._is_logged(step) or step % self._checkpointing_steps == 0):
            return None
        self.count()
        return self.bad_steps.problem() or self._dropped.problem()

    def count(self) -> None:
        """Counts skipped steps and images since the last call."""
        self._dropped.compute()
        self.print_lines(self.bad_steps.compute())

    def write(self, step: int) -> None:
        """Writes the means since the last write to metrics.jsonl, the logger and the progress bar, if it is due."""
        if not self._is_logged(step):
            return
        means = self._metrics.write(
            step,
            lr=self._training.lr_scheduler.get_last_lr()[0],
            bad_steps=self.bad_steps.count,
            **self._dropped.counts(),
            **self._loss_parts.compute(),
            **self._weights(step),
        )
        self._training.trackers.log(means, step)
        shown = self._shown(means)
        self.bar.set_postfix(shown)
        if self._training.accelerator.is_main_process:
            detail(f"step {step:,}: {', '.join(f'{name} {value}' for name, value in shown.items())}")

    def _shown(self, means: dict[str, float]) -> dict[str, str]:
        """Returns what the bar shows: the denoising loss, L' beside that of the data, the learning rate.

        Not weight * lambda * L', which jumps with the noise levels of a batch and looks like a divergence.
        """
        shown = {"denoising": f"{means['denoising']:.4f}"}
        for name in self.weights.rules:
            value = means.get(f"raw/{name}")
            data = f" (data {self._means_on_data[name]:.3g})" if name in self._means_on_data else ""
            shown[name] = "no active image" if value is None else f"{value:.3g}{data}"
        return {**shown, "lr": f"{means['lr']:.1e}"}

    def _weights(self, step: int) -> dict[str, float]:
        """Returns what to log of the weights; one with a schedule times its mean factor since the last line."""
        found = self.weights.metrics()
        first = (step - 1) // LOG_INTERVAL * LOG_INTERVAL
        for term in self._scheduled:
            found[f"weight/{term.name}"] *= sum(map(term.schedule, range(first, step))) / (step - first)
        return found

    def print_lines(self, lines: list[str]) -> None:
        """Prints lines above the progress bar, with --quiet, too: skipped steps, and a profile that was asked for."""
        for line in lines:
            tqdm.write(line)

    def _is_logged(self, step: int) -> bool:
        return step == self._training.max_train_steps or step % LOG_INTERVAL == 0
