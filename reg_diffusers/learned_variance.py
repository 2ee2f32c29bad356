"""Networks with a learned variance, which fills half of their output channels (Nichol & Dhariwal 2021)."""

from __future__ import annotations

import inspect

from torch import Tensor

from .schedule import prediction_type

__all__ = ["image_channels", "learns_variance", "output_for_step", "without_learned_variance"]


def image_channels(out_channels: int, scheduler_config) -> int:
    """Returns how many of a network's output channels represent the image: half of them with a learned variance.

    Args:
        out_channels: number of output channels of the network.
        scheduler_config: config of the scheduler of the training, or of a scheduler created from it.
    """
    return out_channels // 2 if learns_variance(scheduler_config) else out_channels


def learns_variance(scheduler_config) -> bool:
    """Returns whether the network was trained with a learned variance, which fills half of its output channels."""
    return str(scheduler_config.get("variance_type")).startswith("learned")


def output_for_step(scheduler, model_output: Tensor, sample: Tensor) -> Tensor:
    """Prepares a model output for `scheduler.step`: removes a learned variance, except for schedulers that use it.

    Raises:
        ValueError: the scheduler removes it by [:, :3], as DPM-Solver does, and the image has more channels.
    """
    parameters = inspect.signature(type(scheduler).__init__).parameters
    if "variance_type" in parameters and "algorithm_type" not in parameters:
        return model_output
    image_part = without_learned_variance(scheduler, model_output, sample)
    is_cut = "variance_type" in parameters and learns_variance(scheduler.config) and image_part.shape[1] > 3
    if is_cut and prediction_type(scheduler) == "epsilon":
        name, channels = type(scheduler).__name__, image_part.shape[1]
        raise ValueError(f"{name} with a learned variance samples up to 3 channels, not {channels}: use DDIMScheduler")
    return image_part


def without_learned_variance(scheduler, model_output: Tensor, sample: Tensor) -> Tensor:
    """Returns the part of a model output that represents the image, in the shape of `sample`.

    Raises:
        ValueError: the shapes do not match.
    """
    if model_output.shape == sample.shape:
        return model_output
    learned = learns_variance(scheduler.config)
    if learned and model_output.ndim > 1 and model_output.shape[1] == 2 * sample.shape[1]:
        model_output = model_output[:, : sample.shape[1]]
    if model_output.shape != sample.shape:
        raise ValueError(f"model_output has shape {tuple(model_output.shape)}, sample {tuple(sample.shape)}")
    return model_output
