"""The callback of a pipeline after each step, as in diffusers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

__all__ = ["CALLBACK_TENSORS", "StepCallback"]

CALLBACK_TENSORS = ("latents", "model_output", "x0_hat")


class StepCallback:
    """Calls `callback_on_step_end` with its tensors, and takes the latents that it returns.

    Args:
        callback: `callback(pipeline, step_index, timestep, tensors)`, or None.
        tensor_inputs: names of the tensors passed to it, from `CALLBACK_TENSORS`; a diffusers callback object provides
            its own.

    Raises:
        ValueError: a name is unknown.
    """

    def __init__(self, callback: Callable | None, tensor_inputs: Sequence[str]):
        if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
            tensor_inputs = callback.tensor_inputs
        if unknown := [name for name in tensor_inputs if name not in CALLBACK_TENSORS]:
            hint = "; 'sample' is called 'latents', as in diffusers" if "sample" in unknown else ""
            known = ", ".join(CALLBACK_TENSORS)
            raise ValueError(f"callback_on_step_end_tensor_inputs: {', '.join(unknown)} not among {known}{hint}")
        self._callback = callback
        self._names = tuple(tensor_inputs)

    def wants(self, name: str) -> bool:
        """Whether the callback takes the tensor of this name."""
        return self._callback is not None and name in self._names

    def latents(self, pipeline, index: int, timestep, **tensors: Tensor | None) -> Tensor:
        """Runs the callback. Returns the latents, which it may have replaced.

        Args:
            pipeline: the pipeline that samples.
            index: index of the step, from 0.
            timestep: timestep of the step.
            **tensors: the tensors, by the names in `CALLBACK_TENSORS`.

        Raises:
            ValueError: the callback returned or replaced a tensor other than "latents".
        """
        latents = tensors["latents"]
        if self._callback is None:
            return latents
        handed = {name: tensors[name] for name in self._names}
        returned = self._callback(pipeline, index, timestep, dict(handed)) or {}
        for name, tensor in returned.items():
            if name != "latents" and tensor is not handed.get(name):
                raise ValueError(f"callback_on_step_end returned {name!r}: only 'latents' can be replaced")
        return returned.get("latents", latents)
