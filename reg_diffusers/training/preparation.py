"""Prepares the network, data, optimizer, EMA and seeds of one training with Accelerate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn

from ..data.parts import parts_of
from ..data.training_data import TrainingData, make_dataloader
from ..networks.attention import use_explicit_attention
from ..networks.build import build_unet, load_given_model
from ..networks.computation import CompiledForBatches, Computation
from ..networks.ema import build_ema
from ..networks.noise_schedule import build_noise_scheduler
from ..networks.trained import trained_parameters
from ..runs.checkpoint import Progress
from ..runs.run_folder import PROFILE_FOLDER
from ..runtime.engine import build_accelerator
from ..runtime.hardware import frozen_precision
from ..runtime.profiling import StepProfile
from ..settings.advice import advise_on_warmup
from ..settings.machine import MachineSettings
from ..settings.model import ModelSettings
from ..settings.optimization import OptimizationSettings
from ..settings.output import OutputSettings
from .ending import Ending
from .optimizer import build_optimizer
from .trackers import Trackers

__all__ = ["Training", "build_lr_scheduler", "prepare"]


@dataclass(frozen=True)
class Training:
    """One training before its first step.

    Attributes:
        accelerator: accelerator of this training.
        noise_scheduler: scheduler with the noise levels of the training.
        unet: network, as prepared by Accelerate.
        network: network that a step calls: `unet`, or its compiled form.
        as_called: returns a network as the loss calls it, see `GivenModel.as_called`.
        trained: trained parameters of the network.
        optimizer: their optimizer, as prepared by Accelerate.
        lr_scheduler: learning rate scheduler of the optimizer.
        ema: average of the trained parameters; None without EMA.
        dataloader: dataloader, as prepared by Accelerate.
        progress: number of finished steps and batches.
        steps_per_epoch: optimizer steps per epoch.
        max_train_steps: total number of optimizer steps.
        trackers: logger.
        profile: profile of the time of a step.
    """

    accelerator: Accelerator
    noise_scheduler: object
    unet: nn.Module
    network: Callable
    as_called: Callable[[Callable], Callable]
    trained: list[nn.Parameter]
    optimizer: object
    lr_scheduler: object
    ema: EMAModel | None
    dataloader: object
    progress: Progress
    steps_per_epoch: int
    max_train_steps: int
    trackers: Trackers
    profile: StepProfile

    @property
    def states(self) -> dict[str, object]:
        """The states that are equal on all processes, by their names in a checkpoint."""
        states = {"progress": self.progress, "lr_scheduler": self.lr_scheduler}
        return states | ({"ema": self.ema} if self.ema else {})


def prepare(
    data: TrainingData,
    output_dir: Path,
    ending: Ending,
    *,
    model: ModelSettings,
    optimization: OptimizationSettings,
    machine: MachineSettings,
    computation: Computation,
    output: OutputSettings,
    has_no_class: bool = False,
    cache_dir: str | None = None,
    workers: int = 0,
    hyperparameters: dict | None = None,
) -> Training:
    """Builds one training; its weights, order of the data and noise depend on the seed only.

    Afterwards each process draws different noise.

    Args:
        data: data of the training.
        output_dir: folder of this training, for the logger's files and the profile.
        ending: ending of the run, which records failures of the logger.
        model: settings of the network and the noise schedule to start from.
        optimization: settings of the optimizer.
        machine: settings of the machine.
        computation: precision and attention of the network.
        output: settings of the logger and the profile.
        has_no_class: see `build_unet`.
        cache_dir: folder of downloads.
        workers: number of data loading workers per process.
        hyperparameters: settings to pass to the logger, by name.

    Raises:
        UsageError: the model does not fit the data, or the logger cannot be started.
    """
    accelerator = build_accelerator(
        computation.mixed_precision.value,
        optimization.gradient_accumulation_steps,
        optimization.seed,
        output.logger,
        output_dir / output.logging_dir,
    )
    trackers = Trackers(
        accelerator,
        output.logger,
        ending,
        output_dir=output_dir,
        project=output.tracker_project_name,
        hyperparameters=hyperparameters or {},
    )
    set_seed(optimization.seed)
    given = load_given_model(model, cache_dir, frozen_precision(machine.mixed_precision))
    noise_scheduler = build_noise_scheduler(model, given.scheduler)
    unet = build_unet(machine, given, data, has_no_class=has_no_class)
    batch_size = optimization.train_batch_size
    if computation.attention.value == "explicit":
        use_explicit_attention(unet)
    adamw = build_optimizer(optimization, unet)
    progress = Progress()
    dataloader = make_dataloader(data, optimization, workers, accelerator, progress)
    unet, optimizer, dataloader = accelerator.prepare(unet, adamw, dataloader)
    batches_per_step = optimization.gradient_accumulation_steps
    max_train_steps = optimization.max_train_steps or math.ceil(
        optimization.num_epochs * len(dataloader) / batches_per_step
    )
    training = Training(
        accelerator=accelerator,
        noise_scheduler=noise_scheduler,
        unet=unet,
        network=CompiledForBatches(unet, batch_size, sizes=len(parts_of(data))) if machine.compile else unet,
        as_called=partial(given.as_called, data=data),
        trained=trained_parameters(unet),
        optimizer=optimizer,
        lr_scheduler=build_lr_scheduler(optimization, adamw, max_train_steps),
        ema=build_ema(optimization, unet),  # of the part of the weights that each process holds
        dataloader=dataloader,
        progress=progress,
        steps_per_epoch=math.ceil(len(dataloader) / batches_per_step),
        max_train_steps=max_train_steps,
        trackers=trackers,
        profile=StepProfile(accelerator, output.profile, output_dir / PROFILE_FOLDER),
    )
    set_seed(optimization.seed, device_specific=True)
    return training


def build_lr_scheduler(settings: OptimizationSettings, optimizer: torch.optim.Optimizer, max_train_steps: int):
    """Builds the schedule of --lr_scheduler; it advances once per optimizer step, for any number of processes."""
    advise_on_warmup(settings, max_train_steps)
    return get_scheduler(
        settings.lr_scheduler,
        optimizer,
        num_warmup_steps=settings.lr_warmup_steps,
        num_training_steps=max_train_steps,
    )
