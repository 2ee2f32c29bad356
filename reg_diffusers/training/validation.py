"""Measures the losses on held-out images during a training, and keeps the best model.

Each measurement has the same images, noise, timesteps and random numbers, so two measurements differ by the weights of
the network alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from ..data.buckets import part_of
from ..data.parts import of_one_size, parts_of
from ..data.training_data import TrainingData
from ..evaluation.measuring import WithoutGradient
from ..loss_weighting import DENSITIES, LOSS_WEIGHTINGS
from ..objective import RegularizedLoss, timesteps_of_training
from ..runs.run_folder import BEST_FOLDER, LOGS, VALIDATION_FILE, VALIDATION_PICTURE
from ..runtime.errors import warn
from ..runtime.files import write_whole
from ..runtime.messages import say
from ..settings.loss import LossSettings
from ..term import Term
from ..trial.checks import random_numbers_as_before
from .batches import Context
from .ending import Ending
from .metrics import JsonLines
from .output import save_pipeline
from .preparation import Training
from .validation_figure import draw_validation

__all__ = ["Validation"]

DENOISING, RAW = "validation/denoising", "validation/raw/"
_IMAGES = 1024  # at most
_NOISE_LEVELS = 256  # at least, in total: of few images, each has several
_AT_A_TIME = 8  # the same for any batch size and number of processes
_FIX = "the training continues; --validation_steps sets the interval"


class Validation:
    """The measurements of one training on held-out images, by the main process, with the weights to sample from.

    Args:
        training: training before its first step.
        data: held-out images as the network sees them.
        source: their origin, for the record.
        terms: terms of the loss; L' is measured without its weight, where the weighting of the term is not 0.
        loss: settings of the denoising loss.
        seed: seed of the noise.
        interval: steps between measurements.
        keeps_best: whether to save the pipeline with the lowest denoising loss.
        output_dir: folder of the training.
        ending: ending of the run, which records failures.

    Attributes:
        last: the last measurement by name, with its step; empty before the first.
        best: that with the lowest denoising loss.
    """

    def __init__(
        self,
        training: Training,
        data: TrainingData,
        source: str,
        terms: tuple[Term, ...],
        loss: LossSettings,
        *,
        seed: int,
        interval: int,
        keeps_best: bool,
        output_dir: Path,
        ending: Ending,
    ):
        self._training, self._source, self._seed = training, source, seed
        self._interval, self._keeps_best = interval, keeps_best
        self._output_dir, self._ending = output_dir, ending
        self._log = JsonLines(output_dir / LOGS[0])
        rows = np.linspace(0, len(data) - 1, min(len(data), _IMAGES)).astype(int).tolist()
        self._data, self._number = part_of(data, rows), len(data)
        self._density = DENSITIES[loss.timestep_sampling]
        self._loss_fn = RegularizedLoss(
            training.noise_scheduler,
            [replace(term, weight=1.0, schedule=None) for term in terms],
            snr_gamma=loss.snr_gamma,
            loss_weighting=LOSS_WEIGHTINGS[loss.loss_weighting],
            max_nonfinite_steps=None,
        ).to(training.accelerator.device)
        self.last: dict[str, float] = {}
        self.best: dict[str, float] = {}

    def is_due(self, step: int) -> bool:
        return step % self._interval == 0 or step == self._training.max_train_steps

    def measure(self, step: int, pipeline, ready: Callable[[], AbstractContextManager]) -> None:
        """Measures the network of a pipeline, logs the result, and keeps the pipeline if it is the best so far.

        Args:
            step: steps of the training so far.
            pipeline: the model to save, with its network.
            ready: gives the network the weights to sample from, see `SampledNetwork`; for all processes.
        """
        with ready():
            if self._training.accelerator.is_main_process:
                what = f"the validation of step {step}"
                self._ending.attempt(what, _FIX, partial(self._measure, step, pipeline))

    def finish(self) -> None:
        """Writes validation.json and validation.png, on the main process; a failure does not end the run."""
        if self.last and self._training.accelerator.is_main_process:
            fix = "metrics.jsonl has the numbers; --resume auto writes them again"
            self._ending.attempt(str(self._output_dir / VALIDATION_FILE), fix, self._write)

    def state_dict(self) -> dict:
        return {"last": self.last, "best": self.best}

    def load_state_dict(self, state: dict) -> None:
        self.last, self.best = state["last"], state["best"]

    def _measure(self, step: int, pipeline) -> None:
        found = self._means(pipeline.unet)
        self._log.append({"step": step, **found})
        self._training.trackers.log(found, step)
        shown = ", ".join(f"{_shown(name)} {value:.5g}" for name, value in found.items())
        if not math.isfinite(found[DENOISING]):
            warn(f"step {step:,}: held-out images: {shown}")
            return
        self.last = {"step": step, **found}
        is_best = found[DENOISING] < self.best.get(DENOISING, math.inf)
        if is_best:
            self.best = self.last
            if self._keeps_best:
                save_pipeline(pipeline, self._output_dir / BEST_FOLDER)
        say(f"step {step:,}: held-out images: {shown}{', the lowest so far' if is_best else ''}")

    def _means(self, network: nn.Module) -> dict[str, float]:
        """Measures a network: the denoising loss, and L' of each term over the images where it is active."""
        device, names = self._training.accelerator.device, self._loss_fn.regularization.names
        values: dict[str, list[Tensor]] = {"denoising": [], **{name: [] for name in names}}
        called = WithoutGradient(self._training.as_called(network))
        with random_numbers_as_before(device):
            torch.manual_seed(self._seed)  # of estimators and views that draw
            for rows, timesteps, noise in self._batches():
                batch = send_to_device(self._data.__getitems__(rows), device)
                context = Context.of_batch(self._data, batch)
                model, arguments = context.conditions.bind(called)
                output = self._loss_fn(
                    model,
                    self._data.normalization.normalize(batch["values"]),
                    noise=noise.to(device),
                    timesteps=timesteps,
                    model_kwargs={"return_dict": False, **arguments},
                    **context.needed(self._loss_fn.regularization.needs),
                )
                for name, parts in values.items():
                    parts.append(output.per_image[name].double().cpu())
        found = {DENOISING: torch.cat(values.pop("denoising")).mean().item()}
        means = {name: torch.cat(parts).nanmean().item() for name, parts in values.items()}
        # A term without an active image has no mean.
        return found | {f"{RAW}{name}": mean for name, mean in means.items() if math.isfinite(mean)}

    def _batches(self) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Yields the rows of a few images of one size, their timesteps, and noise.

        The timesteps are evenly spread over those of the training.
        """
        generator = torch.Generator().manual_seed(self._seed)
        number = len(self._data) * math.ceil(_NOISE_LEVELS / len(self._data))
        quantiles = (torch.randperm(number, generator=generator) + 0.5) / number
        timesteps = timesteps_of_training(self._training.noise_scheduler, quantiles, self._density)
        for part, members in zip(parts_of(self._data), of_one_size(self._data), strict=True):
            of_size = [place for place in range(number) if place % len(self._data) in members]
            for places in torch.tensor(of_size).split(_AT_A_TIME):
                noise = torch.randn(len(places), *part.shape, generator=generator)
                yield (places % len(self._data)).tolist(), timesteps[places], noise

    def _write(self) -> None:
        weights = "averaged" if self._training.ema else "trained"
        content = {
            "source": self._source,
            "images": len(self._data),
            "held_out": self._number,
            "weights": weights,
            "seed": self._seed,
            "best_is_kept": self._keeps_best,
            "last": self.last,
            "best": self.best,
        }
        path = self._output_dir / VALIDATION_FILE
        write_whole(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n"))
        picture = self._output_dir / VALIDATION_PICTURE
        write_whole(picture, lambda temporary: draw_validation(temporary, self._output_dir / LOGS[0], weights))


def _shown(name: str) -> str:
    return name.removeprefix(RAW).removeprefix("validation/")
