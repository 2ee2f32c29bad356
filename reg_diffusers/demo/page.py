"""The page of the demo: controls on the left, two runs on the right; on a phone, the runs above the controls."""

from __future__ import annotations

import inspect
import math
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from functools import partial
from types import MappingProxyType

import gradio as gr

from ..pipeline import RegDDPMPipeline
from ..regularizers import Regularizer
from ..sampling.schedulers import fitting_samplers
from ..term import needs_of
from .sampling import DemoSettings, watch
from .view import show

__all__ = ["Demonstration", "build_page"]

_TITLE = "reg_diffusers: the effect of a loss on x̂₀"
_HEADING = "# What does a loss on x̂₀ do?"
_INTRODUCTION = """At every step, a diffusion model estimates the finished image, x̂₀. **Guidance** moves this
estimate towards a smaller loss L', without any training. Both runs start from the same noise. A change of any control
samples them again."""
_METHODS = [
    ("mpgd: without a gradient through the network", "mpgd"),
    ("dps: with a gradient through the network", "dps"),
    ("lgd: like dps, averaged over noisy copies", "lgd"),
]
# Largest scale, step of the slider, initial scale. With the gradient through the network, the same effect needs more.
_SCALES = {"mpgd": (0.5, 0.005, 0.05), "dps": (20, 0.1, 2), "lgd": (20, 0.1, 2)}
_LARGEST_SEED, _MOST_STEPS, _MOST_IMAGES = 2**31 - 1, 200, 16
_LONGEST_TEXT = 1000  # characters
_MOST_DRAWINGS, _MOST_WAITING = 8, 16  # at the same time; a new drawing of a visitor ends the previous one
_SETTLE_SECONDS = 0.15  # a slider must rest this long before sampling starts


class Demonstration:
    """Samples for the page; one object serves all visitors.

    Args:
        pipeline: see `build_demo`.
        regularizers: see `build_demo`.
        means_on_data: see `build_demo`.
        text: see `build_demo`.

    Raises:
        ValueError: see `build_demo`.
    """

    def __init__(
        self,
        pipeline: RegDDPMPipeline,
        regularizers: Mapping[str, Regularizer],
        means_on_data: Mapping[str, float] = MappingProxyType({}),
        text: str = "",
    ):
        self.pipeline, self.text = pipeline, text
        self.classes: int | None = pipeline.num_classes
        self.samplers = fitting_samplers(pipeline)
        self.most_steps = min(_MOST_STEPS, pipeline.scheduler.config.num_train_timesteps)
        self.regularizers, self.means_on_data = dict(regularizers), dict(means_on_data)
        self._newest: dict[str | None, object] = {}  # the latest drawing of each visitor
        self._check()

    def draw(
        self, regularizer, method, scale, seed, steps, scheduler, number, class_label, text, request: gr.Request
    ) -> Iterator[str]:
        """Yields the state of both runs as HTML until they finish or the same visitor starts another drawing.

        Raises:
            gr.Error: if an input is out of range, or if sampling fails.
        """
        visitor, this = request.session_hash, object()
        self._newest[visitor] = this
        time.sleep(_SETTLE_SECONDS)
        if self._newest.get(visitor) is not this:
            return
        settings = DemoSettings(
            make_scheduler=self.samplers[_one_of("Scheduler", scheduler, self.samplers)],
            regularizer=self.regularizers[_one_of("Regularizer", regularizer, self.regularizers)],
            seed=_whole("Noise seed", seed, 0, _LARGEST_SEED),
            steps=_whole("Steps", steps, 1, self.most_steps),
            number=_whole("Images", number, 1, _MOST_IMAGES),
            class_label=None if self.classes is None else _whole("Class label", class_label, 0, self.classes - 1),
            prompt=_text("Text", text) if self.pipeline.takes_prompts else None,
            guidance_method=_one_of("Guidance method", method, _SCALES),
            regularizer_scale=_between("Regularizer scale", scale, 0, max(most for most, *_ in _SCALES.values())),
        )
        try:
            with closing(watch(self.pipeline, settings)) as looks:
                for plain, guided in looks:
                    if self._newest.get(visitor) is not this:
                        return
                    description = _description(settings.regularizer)
                    yield show(regularizer, description, plain, guided, self.means_on_data.get(regularizer))
        except Exception as error:  # also from a regularizer of the user's own
            message = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise gr.Error(message, print_exception=not isinstance(error, ValueError)) from error

    def forget(self, request: gr.Request) -> None:
        """Ends the drawing of a visitor who left the page."""
        self._newest.pop(request.session_hash, None)

    def _check(self) -> None:
        if not self.regularizers:
            raise ValueError("the demo needs a regularizer")
        if self.pipeline.condition_channels:
            raise ValueError("the model is conditioned on images, which the demo does not support")
        known = () if self.classes is None else ("class_labels",)
        for name, regularizer in self.regularizers.items():
            if missing := [need for need in needs_of(regularizer) if need not in known]:
                raise ValueError(f"{name} needs {', '.join(missing)}, which samples of this model lack")


def build_page(
    pipeline: RegDDPMPipeline, regularizers: Mapping[str, Regularizer], means_on_data: Mapping[str, float], text: str
) -> gr.Blocks:
    """Builds the page; see `build_demo`."""
    demonstration = Demonstration(pipeline, regularizers, means_on_data, text)
    with gr.Blocks(title=_TITLE, analytics_enabled=False) as page:
        gr.Markdown(_HEADING)
        with gr.Row():
            with gr.Column(scale=2, min_width=320, elem_id="controls"):
                gr.Markdown(_INTRODUCTION)
                prompt = _text_control(demonstration)
                guidance = _guidance_controls(demonstration)
                sampling, another_seed = _sampling_controls(demonstration)
            with gr.Column(scale=3, min_width=320):
                result = gr.HTML()
        (_, method, scale), (seed, *_) = guidance, sampling
        draw = {
            "fn": demonstration.draw,
            "inputs": [*guidance, *sampling, prompt],
            "outputs": result,
            "show_progress": "hidden",
            "trigger_mode": "multiple",  # a new drawing ends the old one itself
            "concurrency_limit": _MOST_DRAWINGS,
            "concurrency_id": "draw",
            "preprocess": False,  # `draw` checks the raw values and names the wrong one
            "api_visibility": "private",
        }
        gr.on([page.load, *(control.change for control in [*guidance, *sampling] if control is not method)], **draw)
        prompt.submit(**draw)
        # Each method has its own range of scales: the slider must adopt it before sampling starts.
        method.change(_scale_slider, method, scale, api_visibility="private", show_progress="hidden").then(**draw)
        another_seed.click(
            lambda: random.randint(0, 9999), None, seed, api_visibility="private", show_progress="hidden"
        )
        page.unload(demonstration.forget)
    return page.queue(max_size=_MOST_WAITING)  # further requests get "the queue is full"


def _text_control(demonstration: Demonstration) -> gr.Textbox:
    """Returns the field for the text of the images, which only a text-to-image model shows."""
    return gr.Textbox(
        demonstration.text,
        label="Text",
        info="What the images show. Enter samples them.",
        max_lines=1,
        max_length=_LONGEST_TEXT,
        visible=demonstration.pipeline.takes_prompts,
    )


def _guidance_controls(demonstration: Demonstration) -> list[gr.components.Component]:
    """Returns the controls for regularizer, method and scale."""
    with gr.Group():
        regularizer = gr.Dropdown(
            list(demonstration.regularizers),
            label="Regularizer L'",
            info="The property to improve: L' is small for images that have it.",
        )
        method = gr.Dropdown(_METHODS, label="Guidance method", info="How L' moves x̂₀. The last two take longer.")
        scale = _scale_slider("mpgd")
    return [regularizer, method, scale]


def _scale_slider(method: str) -> gr.Slider:
    largest, step, value = _SCALES[method]
    return gr.Slider(
        *(0, largest, value),
        step=step,
        label="Regularizer scale",
        info="Strength of the guidance; 0 is off. If it is too large, L' rises again.",
    )


def _sampling_controls(demonstration: Demonstration) -> tuple[list[gr.components.Component], gr.Button]:
    """Returns the controls for seed, steps, scheduler, number and class label, and the button for another seed."""
    classes = demonstration.classes
    with gr.Group():
        seed = gr.Number(0, label="Noise seed", info="Sets the initial noise: same seed, same images.", precision=0)
        another_seed = gr.Button("Another seed", size="sm")
        steps = gr.Slider(
            *(1, demonstration.most_steps, min(20, demonstration.most_steps)),
            step=1,
            label="Steps",
            info="Network calls: more steps take longer and look better, up to a point.",
        )
        scheduler = gr.Dropdown(
            list(demonstration.samplers),
            label="Scheduler",
            info="The update rule that computes each step from x̂₀ and the noise.",
        )
        usual = min(4, demonstration.pipeline.typical_batch)
        number = gr.Slider(1, _MOST_IMAGES, usual, step=1, label="Images", info="L' is the mean over these images.")
        class_label = gr.Slider(
            *(0, max(1, (classes or 1) - 1), 0),
            step=1,
            label="Class label",
            info="The class of the images; the model knows the classes by number.",
            visible=classes is not None,
        )
    return [seed, steps, scheduler, number, class_label], another_seed


def _description(regularizer: Regularizer) -> str:
    """Returns the first line of a regularizer's own docstring."""
    while isinstance(regularizer, partial):
        regularizer = regularizer.func
    text = regularizer.__doc__ if inspect.isroutine(regularizer) else vars(type(regularizer)).get("__doc__")
    return inspect.cleandoc(text or "").partition("\n")[0]


def _one_of(name: str, value, known: Mapping) -> str:
    if not isinstance(value, str) or value not in known:
        raise gr.Error(f"{name} must be one of {', '.join(known)}", print_exception=False)
    return value


def _text(name: str, value) -> str:
    if not isinstance(value, str) or len(value) > _LONGEST_TEXT:
        raise gr.Error(f"{name} must be a text of at most {_LONGEST_TEXT:,} characters", print_exception=False)
    return value


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
