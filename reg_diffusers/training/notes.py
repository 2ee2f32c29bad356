"""What a run says at its start about the kind of its network."""

from __future__ import annotations

from torch import nn

from ..data.training_data import TrainingData
from ..networks import dit
from ..networks.build import GivenModel
from ..networks.trained import trained_parameters
from ..prediction import prediction_type
from ..runtime.amounts import size_text
from ..settings import Settings
from ..settings.optimization import OptimizationSettings
from .optimizer import bytes_of_moments

__all__ = ["memory_of_weights", "notes_on"]


def notes_on(
    settings: Settings,
    given: GivenModel,
    data: TrainingData,
    network: nn.Module,
    noise_scheduler,
    precision: str,
    vae: nn.Module | None,
) -> list[str]:
    """Returns what is particular to the network of a run, a line each.

    Args:
        settings: settings of the run.
        given: model to start from.
        data: data of the training.
        network: network of the training.
        noise_scheduler: scheduler of the training.
        precision: mixed precision of the training.
        vae: autoencoder of the training, or None.
    """
    if given.family is not None:
        whole = ["all weights are trained, not adapters: for those, pass --lora_rank 16"]
        memory = memory_of_weights(network, vae, settings.optimization, precision)
        return [*(whole if settings.model.lora_rank is None else []), memory]
    if not given.is_dit:
        return []
    dit.warn_of_names(given.class_names, data)
    is_flow = prediction_type(noise_scheduler) == "flow_prediction"
    drops_labels = settings.data.condition_dropout > 0
    return dit.notes(network, given.config, len(data.classes), drops_labels=drops_labels, is_flow=is_flow)


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
