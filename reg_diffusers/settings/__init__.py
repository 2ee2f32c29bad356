"""The settings of a training run: frozen dataclasses that define the command line, the YAML file and the records."""

from .data import DataSettings
from .hub import HubSettings
from .loss import LossSettings
from .machine import MachineSettings
from .model import ModelSettings
from .optimization import OptimizationSettings
from .output import OutputSettings
from .run import Settings
from .validation import ValidationSettings

__all__ = [
    "DataSettings",
    "HubSettings",
    "LossSettings",
    "MachineSettings",
    "ModelSettings",
    "OptimizationSettings",
    "OutputSettings",
    "Settings",
    "ValidationSettings",
]
