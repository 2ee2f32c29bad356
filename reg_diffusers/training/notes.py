"""What a run says at its start about the kind of its network."""

from __future__ import annotations

from torch import nn

from ..data.training_data import TrainingData
from ..networks import dit
from ..networks.build import GivenModel
from ..prediction import prediction_type
from ..settings import Settings

__all__ = ["notes_on"]


def notes_on(
    settings: Settings, given: GivenModel, data: TrainingData, network: nn.Module, noise_scheduler
) -> list[str]:
    """Returns what is particular to the network of a run, a line each."""
    if not given.is_dit:
        return []
    dit.warn_of_names(given.class_names, data)
    is_flow = prediction_type(noise_scheduler) == "flow_prediction"
    drops_labels = settings.data.condition_dropout > 0
    return dit.notes(network, given.config, len(data.classes), drops_labels=drops_labels, is_flow=is_flow)
