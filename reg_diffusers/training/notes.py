"""What a run says at its start about the kind of its network."""

from __future__ import annotations

from torch import nn

from ..data.image_sizes import range_text
from ..data.training_data import TrainingData
from ..networks import dit
from ..networks.trained import trained_parameters
from ..prediction import prediction_type
from ..runtime.amounts import size_text
from ..settings import Settings
from ..settings.optimization import OptimizationSettings
from .loading import Loaded
from .optimizer import bytes_of_moments

__all__ = ["memory_of_weights", "notes_on"]


def notes_on(settings: Settings, loaded: Loaded, network: nn.Module, noise_scheduler, precision: str) -> list[str]:
    """Returns what is particular to the network of a run, a line each.

    Args:
        settings: settings of the run.
        loaded: model to start from, and the data.
        network: network of the training.
        noise_scheduler: scheduler of the training.
        precision: mixed precision of the training.
    """
    given, data = loaded.given, loaded.data
    if given.family is not None:
        whole = ["all weights are trained, not adapters: for those, pass --lora_rank 16"]
        memory = memory_of_weights(network, loaded.vae, settings.optimization, precision)
        sizes = [_sizes(loaded.images)] if loaded.takes_sizes else []
        return [*(whole if settings.model.lora_rank is None else []), memory, *sizes]
    if not given.is_dit:
        return []
    dit.warn_of_names(given.class_names, data)
    is_flow = prediction_type(noise_scheduler) == "flow_prediction"
    drops_labels = settings.data.condition_dropout > 0
    return dit.notes(network, given.config, len(data.classes), drops_labels=drops_labels, is_flow=is_flow)


def _sizes(images: TrainingData) -> str:
    _, height, width = images.shape
    return (
        f"takes the size of each image before it is resized ({range_text(images.original_sizes)}) and the corner of"
        f" its crop; samples count as {width} x {height} and uncropped, the default of the pipeline"
    )


def memory_of_weights(
    network: nn.Module, vae: nn.Module | None, optimization: OptimizationSettings, precision: str
) -> str:
    """Describes the memory that a training occupies in every step, in each process: an estimate by the weights.

    A trained weight counts 4 bytes each for itself, its gradient, the two moments of AdamW (1 with --use_8bit_adam)
    and its average, and 2 for the copy that mixed precision makes of it in a step.

    Args:
        network: network of the training.
        vae: autoencoder, which decodes for L'; or None.
        optimization: settings of the optimizer and the average.
        precision: mixed precision of the training: "no", "fp16" or "bf16".
    """
    trained = sum(parameter.numel() for parameter in trained_parameters(network))
    frozen = [value for module in (network, vae) if module for value in module.parameters() if not value.requires_grad]
    parts = {
        "trained weights": 4 * trained,
        "their gradients": 4 * trained,
        "AdamW": bytes_of_moments(trained_parameters(network), optimization),
        "average": 4 * trained * optimization.use_ema,
        "copies in half precision": 2 * trained * (precision != "no"),
        "frozen weights": sum(value.numel() * value.element_size() for value in frozen),
    }
    shown = ", ".join(f"{name} {size_text(size)}" for name, size in parts.items() if size)
    return f"at least {size_text(sum(parts.values()))} of memory: {shown}; activations need more"
