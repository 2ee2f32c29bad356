"""The demonstration in a browser; needs the extra `demo`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import gradio

    from ..pipeline import RegDDPMPipeline
    from ..regularizers import Regularizer

__all__ = ["build_demo"]


def build_demo(pipeline: RegDDPMPipeline, regularizers: Mapping[str, Regularizer]) -> gradio.Blocks:
    """A page that samples from a pipeline with and without guidance, side by side; `.launch()` serves it.

    Args:
        pipeline: the model; its own scheduler is left alone.
        regularizers: what it can be guided by, by the name to be shown; the first is chosen at the start.

    Raises:
        ImportError: gradio is not installed.
        ValueError: there is no regularizer, one needs what a sample has not, or the model is conditioned by an image.
    """
    try:
        from .page import build_page
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ImportError('the demo needs gradio: pip install "reg_diffusers[demo]"') from None
    return build_page(pipeline, regularizers)
