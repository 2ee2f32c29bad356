"""Saves checkpoints and the pipeline of a training, draws grids of samples, and uploads."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..networks.conditions import Conditions
from ..networks.lora import keep_trained_only
from ..networks.sharded import SampledNetwork
from ..networks.text_to_image import RegTextToImagePipeline
from ..networks.whole_pipeline import save_whole_pipeline
from ..pipeline import RegDDPMPipeline
from ..runs.checkpoint import Checkpoints
from ..runtime.errors import UsageError
from .monitors import Monitors
from .output import save_pipeline
from .preparation import Training
from .preview import Previews, draw_samples, sampling_pipeline
from .run import Run
from .terms import of_images
from .validation import Validation

__all__ = ["Saves"]


class Saves:
    """Saves one training and draws its previews, each at its own interval.

    Resumes from the checkpoint that the settings name.

    Args:
        run: run of the training.
        training: training before its first step.
        monitors: monitors of the training; a checkpoint holds their states.
        output_dir: folder of the model.

    Attributes:
        pipeline: model to save, with the weights to sample from; it may save adapters only.

    Raises:
        UsageError: the checkpoint cannot be resumed from.
    """

    def __init__(
        self,
        run: Run,
        training: Training,
        monitors: Monitors,
        output_dir: Path,
    ):
        output, accelerator = run.settings.output, training.accelerator
        self._run, self._training, self._monitors = run, training, monitors
        self._output, self._output_dir = output, output_dir
        self._validation = _validation(run, training, output_dir)
        streams = {"stream": training.dataloader.batch_sampler} if run.settings.data.streaming else {}
        self._checkpoints = Checkpoints(
            accelerator,
            output_dir,
            training.states | monitors.states | ({"validation": self._validation} if self._validation else {}),
            run.mathematics,
            output.checkpoints_total_limit or None,
            monitors.counters | streams,
            run.ending.command,
        )
        keep_trained_only(accelerator, training.unet)
        self._checkpoints.resume(output)
        self._preview_steps = output.preview_steps or output.save_images_epochs * training.steps_per_epoch
        self._pipeline_steps = output.save_model_epochs * training.steps_per_epoch
        self._sampled = SampledNetwork(accelerator, training.unet, training.ema)
        self.pipeline, draw = _sampled_model(run, self._sampled.unet, training.noise_scheduler)
        grids = (output.eval_batch_size, output.ddpm_num_inference_steps, run.settings.optimization.seed)
        self._previews = Previews(
            accelerator,
            draw,
            *grids,
            run.loaded.images,
            output_dir,
            of_images(run.terms),  # also for the plain model of a comparison, so that its captions are alike
            run.means_on_data(run.terms),
            run.interruption,
            run.ending,
            training.trackers,
        )

    def stop(self, step: int, problem: UsageError) -> None:
        """Saves a checkpoint, and raises the problem to end the training."""
        self._checkpoints.save(step)
        raise problem

    def save(self, step: int) -> None:
        """Measures, saves a checkpoint and, with the weights to sample from, pipeline, grid and upload, when due.

        A checkpoint holds the measurement of its step.
        """
        if self._validation and self._validation.is_due(step):
            self._validation.measure(step, self.pipeline, self._sampled.ready)
        is_checkpoint = self._is_checkpoint(step)
        if is_checkpoint:
            self._checkpoints.save(step)
        is_saved, is_shown = step % self._pipeline_steps == 0, step % self._preview_steps == 0
        is_compared = self._output_dir != self._run.output_dir  # the plain model, which is not uploaded
        is_uploaded = is_checkpoint and not is_compared and self._run.settings.hub.hub_strategy == "checkpoint"
        if step == self._training.max_train_steps or not (is_saved or is_shown or is_uploaded):
            return
        with self._sampled.ready():
            if is_saved:
                self._save_pipeline()
            if is_shown:
                self._previews.draw(step)
            if is_uploaded and self._run.uploads:
                self._run.uploads.in_background(self.pipeline, self._output_dir, step)

    def finish(self, step: int, *, is_resumed_later: bool) -> None:
        """Saves the pipeline and its last grid, and a checkpoint if another start continues from here."""
        if is_resumed_later and not self._is_checkpoint(step):
            self._monitors.count()
            self._checkpoints.save(step)
        self._sampled.finish()
        self._save_pipeline()
        self.pipeline.register_to_config(_name_or_path=str(self._output_dir.absolute()))  # for `push_to_hub`
        if self._validation:
            self._validation.finish()
        self._training.accelerator.wait_for_everyone()
        if not self._run.interruption:
            self._previews.draw(step)

    def _is_checkpoint(self, step: int) -> bool:
        return step % self._output.checkpointing_steps == 0

    def _save_pipeline(self) -> None:
        if self._training.accelerator.is_main_process:
            save_pipeline(self.pipeline, self._output_dir)


def _validation(run: Run, training: Training, output_dir: Path) -> Validation | None:
    """Returns the validation of a training; a plain model is measured with the terms of the other, too."""
    held_out, settings = run.loaded.held_out, run.settings
    if held_out is None:
        return None
    return Validation(
        training,
        held_out.data,
        held_out.source,
        run.terms,
        settings.loss,
        seed=settings.optimization.seed,
        interval=settings.validation.validation_steps or settings.output.checkpointing_steps,
        keeps_best=settings.validation.keep_best,
        output_dir=output_dir,
        ending=run.ending,
    )


def _sampled_model(run: Run, unet, noise_scheduler) -> tuple[RegDDPMPipeline, Callable[..., Tensor]]:
    """Returns the model to save, and the function that draws its samples, see `draw_samples`."""
    loaded = run.loaded
    if loaded.family is None:
        pipeline = sampling_pipeline(unet, noise_scheduler, loaded.data, loaded.vae)
        return pipeline, partial(draw_samples, pipeline)
    size, null = loaded.images.shape[1:], loaded.data.prompts.null
    parts, save = (loaded.family, unet, noise_scheduler, loaded.vae, size), None
    if loaded.base is not None:
        component, base = loaded.family.component, loaded.base

        def save(folder) -> None:
            save_whole_pipeline(unet, component, base, Path(folder))

    pipeline = RegTextToImagePipeline.assembled(*parts, null=null, save=save)
    pipeline.set_progress_bar_config(disable=True)

    def draw(number: int, steps: int, seed: int, **_: Tensor) -> Tensor:
        in_turn = torch.arange(number) % len(next(iter(loaded.previews.values())))
        return draw_samples(pipeline, number, steps, seed, **Conditions(loaded.previews).of_images(in_turn))

    return pipeline, draw
