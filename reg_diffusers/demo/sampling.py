"""Samples twice from the same noise, without and with guidance, and shows both runs while they sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from threading import Event

import torch
from torch import Tensor

from ..pipeline import RegDDPMPipeline
from ..regularizers import Regularizer
from ..term import Term, needs_of, score

__all__ = ["DemoSettings", "Run", "watch"]


@dataclass(frozen=True)
class DemoSettings:
    """The choices of a visitor for one drawing.

    Attributes:
        make_scheduler: creates a scheduler, one for each run.
        regularizer: L'; it scores both runs and guides one of them.
        seed: the seed of the initial noise.
        steps: number of network calls.
        number: number of images.
        class_label: the class of all images, for a class-conditional network.
        prompt: the text of all images, for a text-to-image model.
        guidance_method: see `RegDDPMPipeline`.
        regularizer_scale: see `RegDDPMPipeline`.
    """

    make_scheduler: Callable
    regularizer: Regularizer
    seed: int = 0
    steps: int = 20
    number: int = 4
    class_label: int | None = None
    prompt: str | None = None
    guidance_method: str = "mpgd"
    regularizer_scale: float = 0.05


class Run:
    """One run, which another thread can read while it samples.

    Attributes:
        values: L' of x0_hat at each step so far, mean over the images.
        images: (B, C, H, W) float32 in about [-1, 1] on the CPU: x0_hat while sampling, the samples at the end.
        score: L' of the samples, mean over the images; None while sampling.
    """

    def __init__(self, settings: DemoSettings, regularizer_scale: float):
        self.settings = settings
        self.regularizer_scale = regularizer_scale
        self.values: list[float] = []
        self.images: Tensor | None = None
        self.score: float | None = None
        self._stopped = Event()

    def sample(self, pipeline: RegDDPMPipeline) -> None:
        """Samples until the end or until `stop`; all runs share the networks, but not the scheduler."""
        settings = self.settings
        drawing = pipeline.with_parts(scheduler=settings.make_scheduler())
        drawing.register_to_config(normalization=None)  # fields are shown and scored in the units of the network
        drawing.set_progress_bar_config(disable=True)
        text = {} if settings.prompt is None else {"prompt": settings.prompt}
        output = drawing(
            settings.number,
            torch.Generator().manual_seed(settings.seed),
            settings.steps,
            "latent",
            regularizers={"score": settings.regularizer},
            class_labels=settings.class_label,
            **text,
            guidance=[settings.regularizer],
            regularizer_scale=self.regularizer_scale,
            guidance_method=settings.guidance_method,
            callback_on_step_end=self._look,
            callback_on_step_end_tensor_inputs=["x0_hat"],
        )
        self.images = drawing.decode(output.images).float().cpu()
        self.score = output.scores["score"].mean().item()

    def stop(self) -> None:
        """Ends the run after the current step."""
        self._stopped.set()

    def _look(self, pipeline, index: int, timestep, tensors: dict[str, Tensor]) -> None:
        x0_hat = pipeline.decode(tensors["x0_hat"])
        context = {}
        if "class_labels" in needs_of(self.settings.regularizer):
            context["class_labels"] = torch.full((len(x0_hat),), self.settings.class_label, device=x0_hat.device)
        self.images = x0_hat.float().cpu()
        self.values.append(score(Term(self.settings.regularizer, 1.0), x0_hat, context).mean().item())
        pipeline._interrupt = self._stopped.is_set()


def watch(pipeline: RegDDPMPipeline, settings: DemoSettings, interval: float = 0.1) -> Iterator[tuple[Run, Run]]:
    """Samples without and with guidance in parallel; yields both runs every `interval` seconds and at the end.

    Closing the generator stops both runs.

    Args:
        pipeline: the model, which is not changed.
        settings: the choices of the visitor.
        interval: the time between two looks.

    Raises:
        Exception: the exception of a run that failed.
    """
    if settings.prompt is not None:
        pipeline._contexts(1, pipeline.default_guidance_scale, prompt=settings.prompt)  # copies share its embeddings
    runs = Run(settings, regularizer_scale=0.0), Run(settings, settings.regularizer_scale)
    with ThreadPoolExecutor(len(runs)) as executor:
        futures = [executor.submit(run.sample, pipeline) for run in runs]
        try:
            sampling = True
            while sampling:
                done, sampling = wait(futures, timeout=interval)
                for future in done:
                    future.result()
                yield runs
        finally:
            for run in runs:
                run.stop()
