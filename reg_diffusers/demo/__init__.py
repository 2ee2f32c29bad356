"""The browser demo; needs the optional dependencies `demo`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import gradio

    from ..pipeline import RegDDPMPipeline
    from ..regularizers import Regularizer

__all__ = ["build_demo"]


def build_demo(
    pipeline: RegDDPMPipeline,
    regularizers: Mapping[str, Regularizer],
    means_on_data: Mapping[str, float] | None = None,
    text: str = "",
) -> gradio.Blocks:
    """Builds a page that samples from a pipeline with and without guidance, side by side; `.launch()` serves it.

    Args:
        pipeline: the model, for images or in latents; its own scheduler is not changed.
        regularizers: the losses to choose from, by display name; the first is the initial choice.
        means_on_data: the mean of L' over images of the data, by the same names; a reference where it is known.
        text: the text that the page begins with, for a text-to-image model.

    Raises:
        ImportError: if gradio is not installed.
        ValueError: if there is no regularizer, if one needs a condition that samples lack, or if the model is
            conditioned on images.
    """
    try:
        from .page import build_page
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ImportError('the demo needs gradio: pip install "reg_diffusers[demo]"') from None
    return build_page(pipeline, regularizers, means_on_data or {}, text)
