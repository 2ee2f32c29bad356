"""The page of the demonstration: controls on the left, two runs on the right."""

from __future__ import annotations

import inspect
import math
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from functools import partial

import gradio as gr

from ..pipeline import RegDDPMPipeline
from ..regularizers import Regularizer
from ..samplers import fitting_samplers
from .sampling import Settings, watch
from .view import show

__all__ = ["Demonstration", "build_page"]

_TITLE = "reg_diffusers: what a loss on x̂₀ does"
_INTRODUCTION = """# What does a loss on x̂₀ do?

At every step a diffusion model estimates the finished image, x̂₀. **Guidance** moves this estimate towards a smaller
loss L', without any training. Both pictures start from the same noise. Change anything, and they are drawn again."""
_METHODS = [
    ("mpgd: without a gradient through the network", "mpgd"),
    ("dps: with a gradient through the network", "dps"),
    ("lgd: as dps, averaged over noisy copies", "lgd"),
]
# Largest scale, step of the slider, scale to start from: through the network the same effect takes a larger one.
_SCALES = {"mpgd": (0.5, 0.005, 0.05), "dps": (20, 0.1, 2), "lgd": (20, 0.1, 2)}
_LARGEST_SEED, _MOST_STEPS, _MOST_IMAGES = 2**31 - 1, 200, 16
_SETTLE_SECONDS = 0.15  # a slider has to rest so long before anything is drawn


class Demonstration:
    """What the page draws with, for all of its visitors at once.

    Args:
        pipeline: see `build_demo`.
        regularizers: see `build_demo`.

    Raises:
        ValueError: see `build_demo`.
    """

    def __init__(self, pipeline: RegDDPMPipeline, regularizers: Mapping[str, Regularizer]):
        self.unet = pipeline.unet
        self.classes: int | None = pipeline.unet.config.num_class_embeds
        self.samplers = fitting_samplers(pipeline)
        self.most_steps = min(_MOST_STEPS, pipeline.scheduler.config.num_train_timesteps)
        self.regularizers = dict(regularizers)
        self._newest: dict[str | None, object] = {}  # the latest drawing of each visitor
        self._check()

    def draw(
        self, regularizer, method, scale, seed, steps, scheduler, number, class_label, request: gr.Request
    ) -> Iterator[str]:
        """The result as HTML, again and again until it is done or the same visitor wants another one.

        Raises:
            gr.Error: an input is out of range, or something went wrong while sampling.
        """
        visitor, this = request.session_hash, object()
        self._newest[visitor] = this
        time.sleep(_SETTLE_SECONDS)
        if self._newest.get(visitor) is not this:
            return
        settings = Settings(
            make_scheduler=self.samplers[scheduler],
            regularizer=self.regularizers[regularizer],
            seed=_whole("Noise seed", seed, 0, _LARGEST_SEED),
            steps=_whole("Steps", steps, 1, self.most_steps),
            number=_whole("Images", number, 1, _MOST_IMAGES),
            class_label=None if self.classes is None else _whole("Class label", class_label, 0, self.classes - 1),
            guidance_method=method,
            guidance_scale=_between("Guidance scale", scale, 0, max(largest for largest, *_ in _SCALES.values())),
        )
        try:
            with closing(watch(self.unet, settings)) as looks:
                for plain, guided in looks:
                    if self._newest.get(visitor) is not this:
                        return
                    yield show(regularizer, _description(settings.regularizer), plain, guided)
        except Exception as error:  # also from a regularizer of the user's own
            message = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise gr.Error(message, print_exception=not isinstance(error, ValueError)) from error

    def forget(self, request: gr.Request) -> None:
        """Ends the drawing of a visitor who has left."""
        self._newest.pop(request.session_hash, None)

    def _check(self) -> None:
        if not self.regularizers:
            raise ValueError("the demo needs a regularizer")
        network, channels = self.unet.config, self.unet.config.out_channels
        if network.in_channels > channels:
            raise ValueError("the model is conditioned by an image, which the demo has no place for")
        known = () if self.classes is None else ("class_labels",)
        for name, regularizer in self.regularizers.items():
            if missing := [need for need in getattr(regularizer, "needs", ()) if need not in known]:
                raise ValueError(f"{name} needs {', '.join(missing)}, which a sample of this model has not")


def build_page(pipeline: RegDDPMPipeline, regularizers: Mapping[str, Regularizer]) -> gr.Blocks:
    """See `build_demo`."""
    demonstration = Demonstration(pipeline, regularizers)
    with gr.Blocks(title=_TITLE, analytics_enabled=False) as page:
        gr.Markdown(_INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                guidance = _guidance_controls(demonstration)
                sampling, another_seed = _sampling_controls(demonstration)
            with gr.Column(scale=3, min_width=320):
                result = gr.HTML()
        (_, method, scale), (seed, *_) = guidance, sampling
        draw = {
            "fn": demonstration.draw,
            "inputs": [*guidance, *sampling],
            "outputs": result,
            "show_progress": "hidden",
            "trigger_mode": "multiple",  # a new drawing ends the old one itself
            "concurrency_limit": None,
            "preprocess": False,  # values as they were typed: `draw` says by its name which one is wrong
            "api_visibility": "private",
        }
        gr.on([page.load, *(control.change for control in [*guidance, *sampling] if control is not method)], **draw)
        # Another method has another range of scales, which the slider takes before anything is drawn.
        method.change(_scale_slider, method, scale, api_visibility="private", show_progress="hidden").then(**draw)
        another_seed.click(
            lambda: random.randint(0, 9999), None, seed, api_visibility="private", show_progress="hidden"
        )
        page.unload(demonstration.forget)
    return page


def _guidance_controls(demonstration: Demonstration) -> list[gr.components.Component]:
    """Regularizer, method, scale."""
    with gr.Group():
        regularizer = gr.Dropdown(
            list(demonstration.regularizers),
            label="Regularizer L'",
            info="The wish for the image: L' is small where it is fulfilled.",
        )
        method = gr.Dropdown(_METHODS, label="Guidance method", info="How L' moves x̂₀. The last two take longer.")
        scale = _scale_slider("mpgd")
    return [regularizer, method, scale]


def _scale_slider(method: str) -> gr.Slider:
    largest, step, value = _SCALES[method]
    return gr.Slider(
        *(0, largest, value),
        step=step,
        label="Guidance scale",
        info="How strongly: 0 is none. Too much, and L' rises again.",
    )


def _sampling_controls(demonstration: Demonstration) -> tuple[list[gr.components.Component], gr.Button]:
    """Seed, steps, scheduler, number, class label; and the button for another seed."""
    classes = demonstration.classes
    with gr.Group():
        seed = gr.Number(0, label="Noise seed", info="Names the starting noise: same seed, same images.", precision=0)
        another_seed = gr.Button("Another seed", size="sm")
        steps = gr.Slider(
            *(1, demonstration.most_steps, min(20, demonstration.most_steps)),
            step=1,
            label="Steps",
            info="Calls of the network: more take longer and look better, up to a point.",
        )
        scheduler = gr.Dropdown(
            list(demonstration.samplers),
            label="Scheduler",
            info="The rule that takes each step from x̂₀ and the noise.",
        )
        number = gr.Slider(1, _MOST_IMAGES, 4, step=1, label="Images", info="L' is the mean of so many images.")
        class_label = gr.Slider(
            *(0, max(1, (classes or 1) - 1), 0),
            step=1,
            label="Class label",
            info="What the images are to show; the model knows the classes by number.",
            visible=classes is not None,
        )
    return [seed, steps, scheduler, number, class_label], another_seed


def _description(regularizer: Regularizer) -> str:
    """The first line of a regularizer's own docstring."""
    while isinstance(regularizer, partial):
        regularizer = regularizer.func
    text = regularizer.__doc__ if inspect.isroutine(regularizer) else vars(type(regularizer)).get("__doc__")
    return inspect.cleandoc(text or "").partition("\n")[0]


def _whole(name: str, value, low: int, high: int) -> int:
    if not _is_number(value) or value != round(value) or not low <= value <= high:
        raise gr.Error(f"{name} must be a whole number from {low} to {high}", print_exception=False)
    return int(value)


def _between(name: str, value, low: float, high: float) -> float:
    if not _is_number(value) or not low <= value <= high:
        raise gr.Error(f"{name} must be a number from {low} to {high}", print_exception=False)
    return float(value)


def _is_number(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
