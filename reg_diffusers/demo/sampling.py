"""Two runs from the same noise, without and with guidance, watched while they sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from threading import Event

import torch
from torch import Tensor

from ..pipeline import RegDDPMPipeline
from ..regularizers import Regularizer, score

__all__ = ["Run", "Settings", "watch"]


@dataclass(frozen=True)
class Settings:
    """What is to be drawn.

    Attributes:
        make_scheduler: makes the sampler, one for each run.
        regularizer: L', which scores both runs and guides one.
        seed: of the noise.
        steps: calls of the network.
        number: of images.
        class_label: of them all, for a class-conditional network.
        guidance_method: as in `RegDDPMPipeline`.
        guidance_scale: as in `RegDDPMPipeline`.
    """

    make_scheduler: Callable
    regularizer: Regularizer
    seed: int = 0
    steps: int = 20
    number: int = 4
    class_label: int | None = None
    guidance_method: str = "mpgd"
    guidance_scale: float = 0.05


class Run:
    """One run, to be looked at from another thread while it samples.

    Attributes:
        values: L' of x0_hat at each step so far, the mean over the images.
        images: (B, C, H, W) float32 in about [-1, 1] on the CPU: x0_hat, and the samples in the end.
        score: L' of the samples, the mean over the images; None while sampling.
    """

    def __init__(self, settings: Settings, guidance_scale: float):
        self.settings = settings
        self.guidance_scale = guidance_scale
        self.values: list[float] = []
        self.images: Tensor | None = None
        self.score: float | None = None
        self._stopped = Event()

    def sample(self, unet) -> None:
        """Samples until the end, or until `stop`; the network is shared by all runs, everything else is this run's."""
        settings = self.settings
        # The identity in place of the picture's or field's own units: samples come as they are, not clipped.
        pipeline = RegDDPMPipeline(unet, settings.make_scheduler(), {"offset": [0.0], "scale": [1.0]})
        pipeline.set_progress_bar_config(disable=True)
        output = pipeline(
            settings.number,
            torch.Generator().manual_seed(settings.seed),
            settings.steps,
            "pt",
            regularizers={"score": settings.regularizer},
            class_labels=settings.class_label,
            guidance=[settings.regularizer],
            guidance_scale=self.guidance_scale,
            guidance_method=settings.guidance_method,
            callback_on_step_end=self._look,
            callback_on_step_end_tensor_inputs=["x0_hat"],
        )
        self.images = output.images.float().cpu()
        self.score = output.scores["score"].mean().item()

    def stop(self) -> None:
        """Ends the run after the current step."""
        self._stopped.set()

    def _look(self, pipeline, index: int, timestep, tensors: dict[str, Tensor]) -> None:
        x0_hat = tensors["x0_hat"]
        context = {}
        if "class_labels" in getattr(self.settings.regularizer, "needs", ()):
            context["class_labels"] = torch.full((len(x0_hat),), self.settings.class_label, device=x0_hat.device)
        self.images = x0_hat.float().cpu()
        self.values.append(score(self.settings.regularizer, x0_hat, **context).mean().item())
        pipeline._interrupt = self._stopped.is_set()


def watch(unet, settings: Settings, interval: float = 0.1) -> Iterator[tuple[Run, Run]]:
    """Samples twice at the same time: (without guidance, with it), again every `interval` seconds and in the end.

    Whoever closes this generator stops both runs.

    Raises:
        Exception: whatever went wrong in a run.
    """
    runs = Run(settings, guidance_scale=0.0), Run(settings, settings.guidance_scale)
    with ThreadPoolExecutor(len(runs)) as executor:
        futures = [executor.submit(run.sample, unet) for run in runs]
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
